"""Both notebooks run top to bottom on tiny recipes: in a checkout, and outside one from a wheel."""

import json
import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import nbformat
import pytest

TINY = {
    "model.hidden_size": 32, "model.intermediate_size": 64, "model.num_layers": 1, "model.num_heads": 2,
    "model.num_kv_heads": 1, "batch.rows": 8, "optimizer.warmup_steps": 0, "train.steps": 2,
    "train.evaluate_every": 0, "train.checkpoint_every": 0,
}  # fmt: skip
SHOWN = os.environ.get("STEERJAX_PICTURES")  # a folder that executed notebooks are left in, to look at


def execute(path: Path, place: Path, kernel: str, steerjax: str = "", **parameters) -> str:
    """Runs a notebook in a kernel of its own, in the folder `place`; returns what it printed.

    `steerjax` goes into its form field, `parameters` take the place of its own.
    """
    from nbclient import NotebookClient

    notebook = nbformat.read(path, as_version=4)
    field = next(cell for cell in notebook.cells if 'STEERJAX = ""' in cell.source)
    field.source = field.source.replace('STEERJAX = ""', f"STEERJAX = {steerjax!r}")
    tagged = next(i for i, cell in enumerate(notebook.cells) if "parameters" in cell.metadata.get("tags", ()))
    lines = [f"{name} = {value!r}" for name, value in parameters.items()]
    notebook.cells.insert(tagged + 1, nbformat.v4.new_code_cell("\n".join(lines)))
    NotebookClient(notebook, timeout=500, kernel_name=kernel, resources={"metadata": {"path": str(place)}}).execute()
    if SHOWN:
        nbformat.write(notebook, Path(SHOWN) / f"{kernel}-{path.name}")
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    return "".join("<image>" if "image/png" in o.get("data", {}) else o.get("text", "") for o in outputs)


@pytest.fixture
def walk(repository, monkeypatch):
    """Runs both notebooks one after the other in a folder, as a reader does, and looks at what they say."""
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")

    def run(place: Path, work: Path, **where) -> None:
        folder = repository / "notebooks"
        said = execute(folder / "steerlm.ipynb", place, CHANGES=TINY, WORK=str(work), MAX_NEW_TOKENS=4, **where)
        facts = ("cpu", "MSE mean rating", "people:", "accuracy of the next token", "verbosity=4", "model.safetensors")
        assert [fact for fact in facts if fact not in said] == []
        assert said.count("<image>") == 4
        said = execute(folder / "reward_model.ipynb", place, MODEL=f"{work}/rm-hf", **where)
        assert said.count("'helpfulness'") == 3
        assert said.count("<image>") == 1

    return run


@pytest.fixture
def fresh(tmp_path, monkeypatch) -> str:
    """The name of a kernel whose environment has all packages but steerjax; pip adds that to it."""
    venv.create(tmp_path / "env", symlinks=True)
    spec = tmp_path / "jupyter" / "kernels" / "fresh"
    spec.mkdir(parents=True)
    command = [str(tmp_path / "env" / "bin" / "python"), "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    packages = {"PYTHONPATH": sysconfig.get_path("purelib"), "PIP_NO_DEPS": "1", "PIP_NO_BUILD_ISOLATION": "0"}
    (spec / "kernel.json").write_text(json.dumps({"argv": command, "display_name": "fresh", "env": packages}))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "jupyter"))
    return "fresh"


@pytest.fixture(scope="module")
def clone(repository, tmp_path_factory) -> Path:
    """The checkout as a reader has it; a build leaves its files there."""
    folder = tmp_path_factory.mktemp("clone") / "steerjax"
    subprocess.run(["git", "clone", "--quiet", str(repository), str(folder)], check=True)
    return folder


@pytest.mark.slow
def test_in_a_checkout(clone, tmp_path, fresh, walk):
    """Steerjax is installed from the checkout that the notebook lies in."""
    walk(clone / "notebooks", tmp_path / "work", kernel=fresh)


@pytest.mark.slow
def test_outside_a_checkout(repository, clone, tmp_path, fresh, walk):
    """Without steerjax the first cell says what to set; with a wheel it is installed and all runs."""
    from nbclient.exceptions import CellExecutionError

    with pytest.raises(CellExecutionError, match="steerjax is not installed: set STEERJAX above"):
        execute(repository / "notebooks" / "steerlm.ipynb", tmp_path, kernel=fresh)
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--quiet"]
    subprocess.run([*build, "-w", str(tmp_path), str(clone)], check=True)
    (wheel,) = tmp_path.glob("*.whl")
    walk(tmp_path, tmp_path / "work", kernel=fresh, steerjax=str(wheel))


@pytest.mark.short
@pytest.mark.parametrize("name", ["steerlm", "reward_model"])
def test_notebooks_are_stored_without_outputs(repository, name):
    notebook = nbformat.read(repository / "notebooks" / f"{name}.ipynb", as_version=4)
    nbformat.validate(notebook)
    assert not any(cell.get("outputs") for cell in notebook.cells)
