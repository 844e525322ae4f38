"""Import: every tensor in its place, in shards, and a clear word for every folder that is not whole."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from steerjax.bundle.build import abstract_parameters
from steerjax.errors import ModelError
from steerjax.hf import weights
from steerjax.hf.config_json import read_config
from steerjax.hf.export import convert_folder
from steerjax.hf.weights import FolderReader, load_parameters, read_headers, resolve_source
from steerjax.models.llama import CausalLM, RewardModel
from steerjax.parallel.mesh import MeshConfig, make_mesh
from tests.hf_folders import CLASSIFIER, TINY, oracle, random_tensors, write_folder
from tests.refusals import refused

MESHES = {
    "one": (MeshConfig(data=1), 1),
    "fsdp-8": (MeshConfig(data=1, fsdp=8), 8),
    "mixed": (MeshConfig(data=2, fsdp=2, tensor=2), 8),
    "replicated": (MeshConfig(data=8), 8),
}
# changes of TINY, number of files
CASES = {
    "tied": ({}, 1),
    "untied-sharded": ({"tie_word_embeddings": False}, 3),
    "bfloat16": ({"torch_dtype": "bfloat16"}, 2),
    "float16": ({"torch_dtype": "float16"}, 1),
    "biases": ({"attention_bias": True, "mlp_bias": True}, 1),
    "head-dim": ({"head_dim": 12, "num_key_value_heads": 4}, 1),
    "classifier": (CLASSIFIER, 2),
    "bare": ({"architectures": ["LlamaModel"]}, 1),
}


def abstract(config, mesh) -> dict:
    labels = len(config.labels)
    return abstract_parameters(RewardModel(config.model, labels) if labels else CausalLM(config.model), mesh)


def by_path(tree) -> dict:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("case", CASES)
def test_parameters_equal_the_folder(case, mesh, tmp_path):
    change, shards = CASES[case]
    raw = TINY | change
    tensors = random_tensors(raw)
    folder = write_folder(tmp_path / "model", raw, tensors, shards)
    config = read_config(folder)
    mesh_config, devices = MESHES[mesh]
    wanted = abstract(config, make_mesh(mesh_config, jax.devices()[:devices]))
    found, expected = by_path(load_parameters(FolderReader(folder, config), wanted)), oracle(tensors, raw)
    assert found.keys() == expected.keys()
    for path, leaf in by_path(wanted).items():
        assert found[path].sharding == leaf.sharding
        assert found[path].dtype == jnp.float32
        for shard in found[path].addressable_shards:
            np.testing.assert_array_equal(shard.data, expected[path][shard.index], err_msg=path)


@pytest.mark.short
def test_a_reward_model_starts_from_a_causal_model(tmp_path):
    """Groups that are left out are not read, nor missed; parameters may be had in bfloat16."""
    raw = TINY | {"tie_word_embeddings": False}
    tensors = random_tensors(raw)
    folder = write_folder(tmp_path / "model", raw, tensors)
    config = read_config(folder)
    mesh = make_mesh(MeshConfig(fsdp=2))
    wanted = abstract_parameters(RewardModel(config.model, 5), mesh, jnp.bfloat16)
    del wanted["reward_head"]
    found = load_parameters(FolderReader(folder, config), wanted)
    assert found.keys() == {"llama"}
    expected = oracle(tensors, raw)["llama/layers/mlp/up/kernel"].astype(jnp.bfloat16)
    np.testing.assert_array_equal(found["llama"]["layers"]["mlp"]["up"]["kernel"], expected)


def test_the_first_layers_only(tmp_path):
    tensors = random_tensors(TINY)
    folder = write_folder(tmp_path / "model", TINY, tensors)
    config = read_config(folder)
    less, more = (dataclasses.replace(config.model, num_layers=layers) for layers in (2, 4))
    mesh = make_mesh(MeshConfig(fsdp=2))
    found = by_path(load_parameters(FolderReader(folder, config), abstract_parameters(CausalLM(less), mesh)))
    for path, value in oracle(tensors, TINY).items():
        np.testing.assert_array_equal(found[path], value[:2] if "/layers/" in path else value, err_msg=path)
    with refused(ModelError, str(folder), "llama/layers/attention/k/kernel", "(3, 32, 2, 8)", "(4, 32, 2, 8)"):
        load_parameters(FolderReader(folder, config), abstract_parameters(CausalLM(more), mesh))


def test_loaded_parameters_may_be_donated(tmp_path):
    """Replicas share no memory with one another, nor with the reader's arrays."""
    folder = write_folder(tmp_path / "model", TINY, random_tensors(TINY))
    config = read_config(folder)
    params = load_parameters(FolderReader(folder, config), abstract(config, make_mesh(MeshConfig(data=8))))
    expected = jax.tree.map(lambda x: np.asarray(x) + 1, params)
    step = jax.jit(lambda tree: jax.tree.map(lambda x: x + 1, tree), donate_argnums=0)
    jax.tree.map(np.testing.assert_array_equal, step(params), expected)


def test_only_asked_parts_are_read(tmp_path, monkeypatch):
    """A device that holds a quarter of a weight causes the reading of a quarter."""
    folder = write_folder(tmp_path / "model", TINY, random_tensors(TINY))
    config, read = read_config(folder), 0
    original = weights.read_tensor

    def counting(*arguments):
        nonlocal read
        value = original(*arguments)
        read += value.nbytes
        return value

    mesh = make_mesh(MeshConfig(data=1, fsdp=4, tensor=2))
    wanted = abstract(config, mesh)
    monkeypatch.setattr(weights, "read_tensor", counting)
    load_parameters(FolderReader(folder, config), wanted)
    stored = sum(np.prod(tensor.shape) * 4 for tensor in read_headers(folder).values())
    assert read == stored  # every byte once, though 8 devices took their part


@pytest.mark.parametrize(("architecture", "group"), [("LlamaModel", "lm_head"), ("LlamaForCausalLM", "reward_head")])
def test_a_group_that_the_folder_lacks(tmp_path, architecture, group):
    raw = TINY | {"architectures": [architecture], "tie_word_embeddings": group != "lm_head"}
    folder = write_folder(tmp_path / "model", raw, random_tensors(raw))
    config = read_config(folder)
    model = CausalLM(config.model) if group == "lm_head" else RewardModel(config.model, 5)
    with refused(ModelError, str(folder), group, cure="another model"):
        load_parameters(FolderReader(folder, config), abstract_parameters(model, make_mesh(MeshConfig())))


def test_numbers_that_are_none_are_named(tmp_path):
    tensors = random_tensors(TINY)
    tensors["model.layers.0.mlp.up_proj.weight"][1, 2] = np.nan
    folder = write_folder(tmp_path / "model", TINY, tensors)
    config, mesh = read_config(folder), make_mesh(MeshConfig(data=8))
    with refused(ModelError, "llama/layers/mlp/up/kernel", "1", cure="step"):
        load_parameters(FolderReader(folder, config), abstract(config, mesh))
    with refused(ModelError, "model.layers.0.mlp.up_proj.weight"):
        convert_folder(folder, tmp_path / "out", dtype="auto", max_shard_size="5GB")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_old_files_rope_frequencies_are_left_alone(tmp_path):
    tensors = random_tensors(TINY)
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(4, np.float32)
    folder = write_folder(tmp_path / "model", TINY, tensors)
    assert FolderReader(folder, read_config(folder)).shapes.keys() == oracle(tensors, TINY).keys()


def test_a_second_copy_of_a_tied_head(tmp_path):
    """vllm#16555: harmless where it is the embedding; a head of its own must not be lost."""
    tensors = random_tensors(TINY)
    same = write_folder(tmp_path / "same", TINY, tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"]})
    assert "lm_head" not in FolderReader(same, read_config(same)).shapes
    other = tensors["model.embed_tokens.weight"].copy()
    other[-1, -1] += 1
    differs = write_folder(tmp_path / "differs", TINY, tensors | {"lm_head.weight": other})
    with refused(ModelError, str(differs), "lm_head.weight", "tie_word_embeddings"):
        FolderReader(differs, read_config(differs))


def missing_tensor(folder, tensors):
    del tensors["model.layers.1.mlp.up_proj.weight"]
    write_folder(folder, TINY, tensors)


def untied_without_head(folder, tensors):
    write_folder(folder, TINY | {"tie_word_embeddings": False}, tensors)


def extra_tensor(folder, tensors):
    write_folder(folder, TINY, tensors | {"model.layers.0.self_attn.q_norm.weight": np.ones(8, np.float32)})


def wrong_shape(folder, tensors):
    tensors["model.layers.2.self_attn.k_proj.weight"] = np.ones((32, 32), np.float32)
    write_folder(folder, TINY, tensors)


def wrong_dtype(folder, tensors):
    tensors["model.layers.2.self_attn.k_proj.weight"] = np.ones((16, 32), np.int8)
    write_folder(folder, TINY, tensors)


def truncated(folder, tensors):
    write_folder(folder, TINY, tensors)
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def not_safetensors(folder, tensors):
    write_folder(folder, TINY, tensors)
    (folder / "model.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")


def missing_file(folder, tensors):
    write_folder(folder, TINY, tensors, shards=2)
    (folder / "model-00002-of-00002.safetensors").unlink()


def index_outside_the_folder(folder, tensors):
    write_folder(folder, TINY, tensors, shards=2)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../a.safetensors"}}))


def index_outside_that_is_there(folder, tensors):
    index_outside_the_folder(folder, tensors)
    save_file({"a": np.ones(1, np.float32)}, folder.parent / "a.safetensors")


def index_lies(folder, tensors):
    write_folder(folder, TINY, tensors, shards=2)
    index = folder / "model.safetensors.index.json"
    listed = json.loads(index.read_text())
    listed["weight_map"]["model.norm.weight"] = "model-00001-of-00002.safetensors"
    listed["weight_map"]["model.embed_tokens.weight"] = "model-00002-of-00002.safetensors"
    index.write_text(json.dumps(listed))


def index_lists_more(folder, tensors):
    write_folder(folder, TINY, tensors, shards=2)
    index = folder / "model.safetensors.index.json"
    listed = json.loads(index.read_text())
    listed["weight_map"]["model.more.weight"] = "model-00001-of-00002.safetensors"
    index.write_text(json.dumps(listed))


def broken_index(folder, tensors):
    write_folder(folder, TINY, tensors, shards=2)
    (folder / "model.safetensors.index.json").write_text("{")


def index_of_numbers(folder, tensors):
    write_folder(folder, TINY, tensors, shards=2)
    (folder / "model.safetensors.index.json").write_text('{"metadata": {}, "weight_map": {"a": 1}}')


def index_without_map(folder, tensors):
    write_folder(folder, TINY, tensors, shards=2)
    (folder / "model.safetensors.index.json").write_text('{"metadata": {}}')


def twice(folder, tensors):
    write_folder(folder, TINY, tensors, shards=2)
    save_file(tensors, folder / "model-00002-of-00002.safetensors")


def pickle_only(folder, tensors):
    write_folder(folder, TINY, tensors)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def no_weights(folder, tensors):
    write_folder(folder, TINY, tensors)
    (folder / "model.safetensors").unlink()


# What the error names.
BROKEN = {
    missing_tensor: ("LlamaForCausalLM", "model.layers.1.mlp.up_proj.weight", "absent", "(48, 32)"),
    untied_without_head: ("lm_head.weight", "absent", "(4096, 32)"),
    extra_tensor: ("model.layers.0.self_attn.q_norm.weight", "(8,)", "absent"),
    wrong_shape: ("model.layers.2.self_attn.k_proj.weight", "(32, 32)", "(16, 32)"),
    wrong_dtype: ("model.safetensors", "model.layers.2.self_attn.k_proj.weight", "I8"),
    truncated: ("model.safetensors", "truncated"),
    not_safetensors: ("model.safetensors", "safetensors file"),
    missing_file: ("model-00002-of-00002.safetensors", "missing"),
    index_outside_the_folder: ("../a.safetensors", "missing"),
    index_outside_that_is_there: ("a", "(1,)", "absent"),
    broken_index: ("model.safetensors.index.json", "line 1 column 2"),
    index_of_numbers: ("model.safetensors.index.json.weight_map.a", "1"),
    index_without_map: ("model.safetensors.index.json.weight_map",),
    twice: ("model.embed_tokens.weight", "model-00002-of-00002.safetensors", "model-00001-of-00002.safetensors"),
    pickle_only: ("pytorch_model.bin", "model.safetensors", "model.safetensors.index.json"),
    no_weights: ("model.safetensors", "model.safetensors.index.json"),
}


@pytest.mark.parametrize("wrongs", [index_lies, index_lists_more], ids=lambda f: f.__name__)
def test_files_say_themselves_what_they_hold(wrongs, tmp_path):
    """An index that is wrong about whole files does no harm."""
    tensors = random_tensors(TINY)
    wrongs(tmp_path / "model", tensors)
    reader = FolderReader(tmp_path / "model", read_config(tmp_path / "model"))
    for path, value in oracle(tensors, TINY).items():
        np.testing.assert_array_equal(reader.read(path, tuple(slice(0, n) for n in value.shape), np.float32), value)


@pytest.mark.parametrize("breaks", BROKEN, ids=lambda f: f.__name__)
def test_broken_folders(breaks, tmp_path):
    folder = tmp_path / "model"
    breaks(folder, random_tensors(TINY))
    with refused(ModelError, str(folder), *BROKEN[breaks]):
        FolderReader(folder, read_config(folder))


def test_sources(tmp_path, monkeypatch):
    """A folder goes before the hub; a download takes neither pickles nor code."""
    import huggingface_hub

    asked = {}

    def download(source, **options):
        if source == "no/such":
            raise OSError("offline")
        asked.update(options, source=source)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert resolve_source(str(tmp_path)) == tmp_path
    assert not asked
    assert resolve_source("owner/name") == tmp_path
    assert not {"*", "*.bin", "*.py", "*.safetensors"} & set(asked["allow_patterns"])
    with refused(ModelError, "no/such", "offline"):
        resolve_source("no/such")
    with refused(ModelError, "./nowhere/at/all"):
        resolve_source("./nowhere/at/all")
