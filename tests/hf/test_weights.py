"""Import: every tensor in its place, in shards, and a clear word for every folder that is not whole."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from steerjax.bundle.opening import abstract_parameters
from steerjax.config import MeshConfig
from steerjax.errors import ModelError
from steerjax.hf.config import read_config
from steerjax.hf.weights import FolderWeights, load_parameters, resolve_source
from steerjax.models.llama import CausalLM, Compute
from steerjax.models.reward_head import RewardModel
from steerjax.parallel.mesh import make_mesh
from tests.hf_folders import CLASSIFIER, TINY, oracle, random_tensors, write_folder

MESHES = {
    "one": (MeshConfig(data=1), 1),
    "fsdp-8": (MeshConfig(data=1, fsdp=8), 8),
    "mixed": (MeshConfig(data=2, fsdp=2, tensor=2), 8),
    "replicated": (MeshConfig(data=8), 8),
}
# changes of TINY, number of files, frozen layers
CASES = {
    "tied": ({}, 1, 0),
    "untied-sharded": ({"tie_word_embeddings": False}, 3, 0),
    "bfloat16": ({"torch_dtype": "bfloat16"}, 2, 1),
    "float16": ({"torch_dtype": "float16"}, 1, 0),
    "biases": ({"attention_bias": True, "mlp_bias": True}, 1, 1),
    "head-dim": ({"head_dim": 12, "num_key_value_heads": 4}, 1, 0),
    "classifier": (CLASSIFIER, 2, 0),
    "bare": ({"architectures": ["LlamaModel"]}, 1, 0),
    "all-frozen": ({}, 1, 3),
}


def abstract(config, mesh, frozen: int = 0) -> dict:
    if config.labels:
        model = RewardModel(config.model, len(config.labels), frozen=frozen)
    else:
        model = CausalLM(config.model, Compute(), frozen)
    return abstract_parameters(model, mesh, "float32")


def by_path(tree) -> dict:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("case", CASES)
def test_parameters_equal_the_folder(case, mesh, tmp_path):
    change, shards, frozen = CASES[case]
    raw = TINY | change
    tensors = random_tensors(raw)
    folder = write_folder(tmp_path / "model", raw, tensors, shards)
    config = read_config(folder)
    mesh_config, devices = MESHES[mesh]
    wanted = abstract(config, make_mesh(mesh_config, jax.devices()[:devices]), frozen)
    found, expected = by_path(load_parameters(folder, config, wanted)), oracle(tensors, raw, frozen)
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
    wanted = abstract_parameters(RewardModel(config.model, 5), mesh, "bfloat16")
    del wanted["reward_head"]
    found = load_parameters(folder, config, wanted)
    assert found.keys() == {"llama"}
    expected = oracle(tensors, raw)["llama/layers/mlp/up/kernel"].astype(jnp.bfloat16)
    np.testing.assert_array_equal(found["llama"]["layers"]["mlp"]["up"]["kernel"], expected)


def test_loaded_parameters_may_be_donated(tmp_path):
    """Replicas share no memory with one another, nor with the reader's arrays."""
    folder = write_folder(tmp_path / "model", TINY, random_tensors(TINY))
    config = read_config(folder)
    params = load_parameters(folder, config, abstract(config, make_mesh(MeshConfig(data=8))))
    expected = jax.tree.map(lambda x: np.asarray(x) + 1, params)
    step = jax.jit(lambda tree: jax.tree.map(lambda x: x + 1, tree), donate_argnums=0)
    jax.tree.map(np.testing.assert_array_equal, step(params), expected)


def test_only_asked_parts_are_read(tmp_path, monkeypatch):
    """A device that holds a quarter of a weight causes the reading of a quarter."""
    folder = write_folder(tmp_path / "model", TINY, random_tensors(TINY))
    config, read = read_config(folder), 0
    original = FolderWeights.read

    def counting(self, name, index=()):
        nonlocal read
        value = original(self, name, index)
        read += value.nbytes
        return value

    mesh = make_mesh(MeshConfig(data=1, fsdp=4, tensor=2))
    wanted = abstract(config, mesh)
    monkeypatch.setattr(FolderWeights, "read", counting)
    load_parameters(folder, config, wanted)
    stored = sum(np.prod(shape) * 4 for shape in FolderWeights(folder).shapes.values())
    assert read == stored  # every byte once, though 8 devices took their part


@pytest.mark.parametrize(("architecture", "group"), [("LlamaModel", "lm_head"), ("LlamaForCausalLM", "reward_head")])
def test_a_group_that_the_folder_lacks(tmp_path, architecture, group):
    raw = TINY | {"architectures": [architecture], "tie_word_embeddings": group != "lm_head"}
    folder = write_folder(tmp_path / "model", raw, random_tensors(raw))
    config = read_config(folder)
    model = CausalLM(config.model) if group == "lm_head" else RewardModel(config.model, 5)
    with pytest.raises(ModelError, match=f"is a {architecture} and has no {group}"):
        load_parameters(folder, config, abstract_parameters(model, make_mesh(MeshConfig()), "float32"))


def test_old_files_rope_frequencies_are_left_alone(tmp_path):
    tensors = random_tensors(TINY)
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(4, np.float32)
    folder = write_folder(tmp_path / "model", TINY, tensors)
    assert len(FolderWeights(folder).expected(read_config(folder))) == len(tensors) - 1


def test_a_second_copy_of_a_tied_head(tmp_path):
    """vllm#16555: harmless where it is the embedding; a head of its own must not be lost."""
    tensors = random_tensors(TINY)
    same = write_folder(tmp_path / "same", TINY, tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"]})
    assert len(FolderWeights(same).expected(read_config(same))) == len(tensors)
    other = tensors["model.embed_tokens.weight"].copy()
    other[-1, -1] += 1
    differs = write_folder(tmp_path / "differs", TINY, tensors | {"lm_head.weight": other})
    with pytest.raises(ModelError, match=r"lm_head.weight is not the embedding, and config.json says tie_word_embed"):
        FolderWeights(differs).expected(read_config(differs))


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


def index_lies(folder, tensors):
    write_folder(folder, TINY, tensors, shards=2)
    index = folder / "model.safetensors.index.json"
    listed = json.loads(index.read_text())
    listed["weight_map"]["model.norm.weight"] = "model-00001-of-00002.safetensors"
    listed["weight_map"]["model.embed_tokens.weight"] = "model-00002-of-00002.safetensors"
    index.write_text(json.dumps(listed))


def broken_index(folder, tensors):
    write_folder(folder, TINY, tensors, shards=2)
    (folder / "model.safetensors.index.json").write_text("{")


def twice(folder, tensors):
    write_folder(folder, TINY, tensors, shards=2)
    save_file(tensors, folder / "model-00002-of-00002.safetensors")


def pickle_only(folder, tensors):
    write_folder(folder, TINY, tensors)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def no_weights(folder, tensors):
    write_folder(folder, TINY, tensors)
    (folder / "model.safetensors").unlink()


BROKEN = {
    missing_tensor: r"lacks model.layers.1.mlp.up_proj.weight of a LlamaForCausalLM",
    untied_without_head: r"lacks lm_head.weight",
    extra_tensor: r"has model.layers.0.self_attn.q_norm.weight, which a LlamaForCausalLM does not have",
    wrong_shape: r"model.safetensors': model.layers.2.self_attn.k_proj.weight has shape \[32, 32\] .* \[16, 32\]",
    wrong_dtype: r"model.layers.2.self_attn.k_proj.weight has dtype I8, which is not read",
    truncated: r"model.safetensors' is truncated or no safetensors file",
    not_safetensors: r"model.safetensors' is truncated or no safetensors file",
    missing_file: r"index.json' names 'model-00002-of-00002.safetensors' \(for model.*\), which is not there",
    index_outside_the_folder: r"names '../a.safetensors' \(for a\), which is not there",
    index_lies: r"says that model.* is in 'model-0000.-of-00002.safetensors', where it is not",
    broken_index: r"is no index of safetensors",
    twice: r"is both in '.*model-00001-of-00002.safetensors' and in '.*model-00002",
    pickle_only: r"has no safetensors, only pytorch_model.bin, which may be pickles",
    no_weights: r"has neither model.safetensors nor model.safetensors.index.json",
}


@pytest.mark.parametrize("breaks", BROKEN, ids=lambda f: f.__name__)
def test_broken_folders(breaks, tmp_path):
    folder = tmp_path / "model"
    breaks(folder, random_tensors(TINY))
    with pytest.raises(ModelError, match=BROKEN[breaks]) as caught:
        FolderWeights(folder).expected(read_config(folder))
    assert "cure:" in str(caught.value)


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
    with pytest.raises(ModelError, match=r"'no/such' is no folder here, and cannot be had from the hub: offline"):
        resolve_source("no/such")
    with pytest.raises(ModelError, match=r"no model folder './nowhere/at/all'"):
        resolve_source("./nowhere/at/all")
