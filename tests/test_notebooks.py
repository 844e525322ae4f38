"""Both notebooks run top to bottom, on the tiny recipes."""

from pathlib import Path

import nbformat
import pytest

TINY = [
    f"--config.{key}"
    for key in (
        "model.hidden_size=32", "model.intermediate_size=64", "model.num_layers=1", "model.num_heads=2",
        "model.num_kv_heads=1", "batch.rows=8", "optimizer.warmup_steps=0", "train.steps=2", "train.evaluate_every=0",
        "train.checkpoint_every=0",
    )
]  # fmt: skip


def execute(path: Path, repository: Path, **parameters) -> str:
    """Runs a notebook in a kernel of its own, with other values for its parameters; returns what it printed."""
    from nbclient import NotebookClient

    notebook = nbformat.read(path, as_version=4)
    place = next(i for i, cell in enumerate(notebook.cells) if "parameters" in cell.metadata.get("tags", ()))
    lines = [f"{name} = {value!r}" for name, value in parameters.items()]
    notebook.cells.insert(place + 1, nbformat.v4.new_code_cell("\n".join(lines)))
    client = NotebookClient(notebook, timeout=500, resources={"metadata": {"path": str(repository / "notebooks")}})
    client.execute()
    outputs = (output for cell in notebook.cells for output in cell.get("outputs", ()))
    return "".join(output.get("text", "<image>") for output in outputs)


def test_both_notebooks(repository, tmp_path, monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setenv("PYTHONPATH", str(repository))
    folder = repository / "notebooks"
    work = str(tmp_path / "walk")
    said = execute(folder / "steerlm.ipynb", repository, TRAIN_OPTIONS=TINY, WORK=work, MAX_NEW_TOKENS=4)
    for words in (
        "cpu",
        "MSE mean rating",
        "people:",
        "accuracy of the next token",
        "verbosity=4",
        "model.safetensors",
    ):
        assert words in said
    assert said.count("<image>") == 4
    said = execute(folder / "reward_model.ipynb", repository, MODEL=f"{work}/rm-hf", WORK=str(tmp_path / "rate"))
    assert said.count("'helpfulness'") == 3
    assert said.count("<image>") == 1


@pytest.mark.short
@pytest.mark.parametrize("name", ["steerlm", "reward_model"])
def test_notebooks_are_stored_without_outputs(repository, name):
    notebook = nbformat.read(repository / "notebooks" / f"{name}.ipynb", as_version=4)
    nbformat.validate(notebook)
    assert not any(cell.get("outputs") for cell in notebook.cells)
