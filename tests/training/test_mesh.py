"""Every axis of the mesh, alone and in pairs, micro-batches and back ends, through `train` itself: the losses of one
device."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest

from steerjax.config import resolve
from steerjax.report.records import read_metrics
from steerjax.training import train as training

NAMES = ("helpfulness", "correctness", "coherence", "complexity", "verbosity")
CASES = {  # of eight devices -> objective, micro-batches, attention; every axis is met by both objectives
    "data=8": ("regression", 1, "blockwise"),
    "fsdp=8": ("sft", 1, "chunked"),
    "tensor=8": ("regression", 4, "blockwise"),
    "context=8": ("sft", 2, "blockwise"),
    "data=4,fsdp=2": ("sft", 1, "blockwise"),
    "data=2,tensor=4": ("regression", 4, "chunked"),
    "data=4,context=2": ("regression", 2, "blockwise"),
    "fsdp=2,tensor=4": ("sft", 2, "chunked"),
    "fsdp=4,context=2": ("regression", 1, "chunked"),
    "tensor=2,context=4": ("sft", 4, "blockwise"),
}
OTHER = {"regression": "sft", "sft": "regression"}


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> Path:
    """Made-up ratings: two answers to each of 40 questions."""
    random = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    with path.open("w") as file:
        for row in range(80):
            ratings = dict(zip(NAMES, random.integers(0, 5, len(NAMES)).tolist(), strict=True))
            text = " ".join(random.choice(["rivers", "trees", "stones"], random.integers(4, 40)))
            turns = [{"role": "user", "content": f"Question {row // 2}?"}]
            turns += [{"role": "assistant", "content": text, "ratings": ratings}]
            file.write(json.dumps({"turns": turns}) + "\n")
    return path


def losses(rows: Path, workdir: Path, objective: str, mesh: str, micro_batches: int, attention: str) -> np.ndarray:
    """Of three steps and the evaluation after them; on one device without a mesh."""
    axes = {name: int(size) for name, size in (axis.split("=") for axis in mesh.split(",") if axis)}
    devices, make_mesh = jax.devices() if mesh else jax.devices()[:1], training.make_mesh
    experiment = resolve({
        "objectives": (objective,),
        "data": {"train": (str(rows),), "validation_fraction": 0.2},
        "model": {"hidden_size": 32, "intermediate_size": 64, "num_layers": 2, "num_heads": 8, "num_kv_heads": 8},
        "batch": {"rows": 8, "row_length": 256, "micro_batches": micro_batches, "evaluation_rows": 8},
        "compute": {"attention": attention, "attention_chunk": 32, "loss_chunk": 32},
        "mesh": {"data": 1} | axes,
        "optimizer": {"learning_rate": 1e-3, "warmup_steps": 1, "epsilon": 1e-6},
        "train": {"steps": 3, "plots": False},
    })  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "make_mesh", lambda config: make_mesh(config, devices))
        training.train(experiment, workdir)
    records = read_metrics(workdir / "metrics.jsonl")
    assert [record["split"] for record in records] == ["train"] * 3 + ["validation"]
    return np.array([record["loss"] for record in records])


@pytest.fixture(scope="module")
def alone(rows, tmp_path_factory) -> dict[str, np.ndarray]:
    """On one device, by objective."""
    return {
        objective: losses(rows, tmp_path_factory.mktemp(objective), objective, "", 1, "chunked")
        for objective in ("regression", "sft")
    }


@pytest.mark.slow
@pytest.mark.parametrize("mesh", CASES)
def test_every_mesh_trains_as_one_device(rows, alone, tmp_path, mesh):
    objective, *options = CASES[mesh]
    np.testing.assert_allclose(losses(rows, tmp_path, objective, mesh, *options), alone[objective], rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", CASES)
def test_the_other_objective_too(rows, alone, tmp_path, mesh):
    objective, *options = CASES[mesh]
    objective = OTHER[objective]
    np.testing.assert_allclose(losses(rows, tmp_path, objective, mesh, *options), alone[objective], rtol=1e-5)
