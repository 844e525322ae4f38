"""A checkpoint's parameters by slices."""

import dataclasses
import shutil

import jax
import numpy as np
import pytest

from steerjax.bundle.build import abstract_parameters
from steerjax.bundle.reader import CheckpointReader, is_checkpoint
from steerjax.errors import CheckpointError, ModelError
from steerjax.hf.config_json import read_config
from steerjax.hf.weights import load_parameters
from steerjax.models.config import LlamaConfig
from steerjax.models.llama import CausalLM
from steerjax.parallel.mesh import MeshConfig, make_mesh
from tests.hf.test_export import EIGHT, imported
from tests.hf_folders import TINY, oracle, provenance, random_tensors, save_checkpoint, write_folder
from tests.refusals import refused

SHAPES = {"llama/layers/mlp/up/kernel": (6, 8, 4), "llama/layers/attention_norm/scale": (6, 8), "head": (8, 3)}


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
    return save_checkpoint(tmp_path_factory.mktemp("run"), tree, provenance(LlamaConfig())), values


@pytest.mark.short
def test_any_part_can_be_read(saved):
    directory, values = saved
    reader = CheckpointReader(directory)
    assert reader.shapes == SHAPES
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
    odd = shutil.copytree(directory, tmp_path / "a %20#?b")
    assert CheckpointReader(odd).shapes == SHAPES
    broken = shutil.copytree(directory, tmp_path / "7")
    shutil.rmtree(broken / "params" / "d")
    with refused(CheckpointError, str(broken), "head"):
        CheckpointReader(broken).read("head", (slice(0, 8), slice(0, 3)))
    (broken / "params" / "_METADATA").write_text("{}")
    with refused(CheckpointError, str(broken)):
        CheckpointReader(broken)


@pytest.mark.parametrize("layers", [1, 2, 3, 4])
def test_the_first_layers_of_a_stack(layers, tmp_path):
    """`keep_layers` reads no more than it keeps; more than there are is an error."""
    tensors = random_tensors(TINY)
    folder = write_folder(tmp_path / "source", TINY, tensors)
    reader = CheckpointReader(imported(folder, tmp_path / "run", EIGHT))
    config = dataclasses.replace(read_config(folder).model, num_layers=layers)
    abstract = abstract_parameters(CausalLM(config), make_mesh(MeshConfig(data=2, fsdp=4)))
    if layers > 3:
        with refused(ModelError, "llama/layers/attention/k/kernel", "(3, 32, 2, 8)", "(4, 32, 2, 8)"):
            load_parameters(reader, abstract)
        return
    found = jax.tree_util.tree_leaves_with_path(load_parameters(reader, abstract))
    expected = oracle(tensors, TINY)
    assert len(found) == len(expected)
    for path, leaf in found:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        value = expected[name][:layers] if "/layers/" in name else expected[name]
        np.testing.assert_array_equal(leaf, value, err_msg=name)
