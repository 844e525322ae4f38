"""A checkpoint's parameters by slices."""

import json
import shutil

import jax
import numpy as np
import pytest

from steerjax.bundle.opening import abstract_parameters
from steerjax.bundle.reader import CheckpointReader, is_checkpoint, load_checkpoint
from steerjax.config import MeshConfig
from steerjax.errors import CheckpointError
from steerjax.hf.config import read_config
from steerjax.models.llama import CausalLM, Compute
from steerjax.parallel.mesh import make_mesh
from tests.hf.test_export import EIGHT, imported
from tests.hf.test_weights import by_path
from tests.hf_folders import TINY, oracle, random_tensors, save_checkpoint, write_folder

SHAPES = {"llama/layers/mlp/up/kernel": (6, 8, 4), "llama/frozen_layers/attention_norm/scale": (2, 8), "head": (8, 3)}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Checkpoint and values, a kernel cut over eight devices."""
    random = np.random.default_rng(0)
    values = {path: random.standard_normal(shape).astype(np.float32) for path, shape in SHAPES.items()}
    mesh = make_mesh(MeshConfig(data=1, fsdp=4, tensor=2))
    tree: dict = {}
    for path, value in values.items():
        *groups, name = path.split("/")
        node = tree
        for group in groups:
            node = node.setdefault(group, {})
        spec = (None, "fsdp", "tensor") if value.ndim == 3 else ()
        node[name] = jax.device_put(value, jax.NamedSharding(mesh, jax.P(*spec)))
    return save_checkpoint(tmp_path_factory.mktemp("run"), tree, {"kind": "chat", "data": {"é.jsonl": "00"}}), values


@pytest.mark.short
def test_any_part_can_be_read(saved):
    directory, values = saved
    reader = CheckpointReader(directory)
    assert reader.shapes == SHAPES
    assert reader.frozen_layers == 2
    assert reader.provenance == {"kind": "chat", "data": {"é.jsonl": "00"}}
    for path, value in values.items():
        whole = tuple(slice(0, size) for size in value.shape)
        np.testing.assert_array_equal(reader.read(path, whole), value)
        part = tuple(slice(size // 2, size) for size in value.shape)
        np.testing.assert_array_equal(reader.read(path, part), value[part])


def test_a_path_through_the_folder_above(saved):
    """tensorstore refuses ".." in a path."""
    around = saved[0].parent / ".." / saved[0].parent.name / saved[0].name
    np.testing.assert_array_equal(CheckpointReader(around).read("head", (slice(0, 8), slice(0, 3))), saved[1]["head"])


def test_layers_lie_apart(saved):
    """A stack is written layer by layer, so that one can be read without the others."""
    reader = CheckpointReader(saved[0])
    assert reader._stores["llama/layers/mlp/up/kernel"].chunk_layout.read_chunk.shape == (1, 2, 2)


def test_what_is_no_whole_checkpoint(saved, tmp_path):
    directory, _ = saved
    assert is_checkpoint(directory)
    assert not is_checkpoint(directory.parent)
    with pytest.raises(CheckpointError, match="is no checkpoint of steerjax; cure: give WORKDIR/checkpoints/STEP"):
        CheckpointReader(directory.parent)

    odd = shutil.copytree(directory, tmp_path / "a %20#?b")
    assert CheckpointReader(odd).shapes == SHAPES
    broken = shutil.copytree(directory, tmp_path / "7")
    (broken / "provenance" / "metadata").write_text("{")
    with pytest.raises(CheckpointError, match="7' is broken"):
        CheckpointReader(broken)
    (broken / "provenance" / "metadata").write_text(json.dumps({}))
    shutil.rmtree(broken / "params" / "d")
    with pytest.raises(CheckpointError, match="cannot be read"):
        CheckpointReader(broken).read("head", (slice(0, 8), slice(0, 3)))


@pytest.mark.parametrize("stored", [0, 1, 3])
@pytest.mark.parametrize("wanted", [0, 1, 2, 3])
def test_another_number_of_frozen_layers(stored, wanted, tmp_path):
    tensors = random_tensors(TINY)
    folder = write_folder(tmp_path / "source", TINY, tensors)
    checkpoint = imported(folder, tmp_path / "run", EIGHT, frozen=stored)
    model, mesh = CausalLM(read_config(folder).model, Compute(), wanted), make_mesh(MeshConfig(data=2, fsdp=4))
    found = by_path(load_checkpoint(CheckpointReader(checkpoint), abstract_parameters(model, mesh, "float32")))
    expected = oracle(tensors, TINY, wanted)
    assert found.keys() == expected.keys()
    for path, value in expected.items():
        np.testing.assert_array_equal(found[path], value, err_msg=path)


@pytest.mark.parametrize("layers", [2, 4])
def test_another_number_of_layers(layers, tmp_path):
    folder = write_folder(tmp_path / "source", TINY, random_tensors(TINY))
    reader = CheckpointReader(imported(folder, tmp_path / "run"))
    other = write_folder(tmp_path / "other", TINY | {"num_hidden_layers": layers}, {"x": np.ones(1)})
    abstract = abstract_parameters(CausalLM(read_config(other).model), make_mesh(MeshConfig()), "float32")
    with pytest.raises(CheckpointError, match=r"has 3 layers, and 2|has shape \(3, 32, .*, and \(4, 32"):
        load_checkpoint(reader, abstract)
