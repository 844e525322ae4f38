"""One way to open a model, whatever it is, or a word on what is missing."""

import dataclasses
import json
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from steerjax.bundle.opening import describe_model, open_model
from steerjax.config import MeshConfig
from steerjax.errors import CheckpointError, ConfigError, ModelError
from steerjax.export import export
from steerjax.models.attention.mask import Layout
from steerjax.models.llama import CausalLM
from steerjax.models.reward_head import RewardInputs, RewardModel
from steerjax.schema import HELPSTEER
from tests.hf.test_export import OPTIONS, environment, imported
from tests.hf_folders import CLASSIFIER, TINY, oracle, random_tensors, write_folder

ONE = MeshConfig(data=-1, fsdp=2, tensor=2)


def leaves(tree) -> dict:
    found = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in found}


@pytest.fixture(scope="module")
def reward(tmp_path_factory):
    """A run of a reward model with a frozen layer, its export, and the tensors."""
    folder = tmp_path_factory.mktemp("reward")
    raw = TINY | CLASSIFIER
    tensors = random_tensors(raw)
    imported(write_folder(folder / "source", raw, tensors), folder / "run", frozen=1)
    export(str(folder / "run"), folder / "out", **OPTIONS)
    return folder, raw, tensors


@pytest.mark.parametrize("name", ["run", "run/checkpoints/7", "run/checkpoints", "out"])
def test_a_reward_model(reward, name):
    folder, raw, tensors = reward
    opened = open_model(folder / name, ONE)
    d = opened.description
    assert (d.kind, d.template.name, d.readout, d.schema) == ("reward", "extra_id", "last", HELPSTEER)
    assert d.path == folder / ("out" if name == "out" else "run/checkpoints/7")
    assert d.tokenizer.files[0].name in ("embedded.model", "tokenizer.model")  # not the converted one
    assert d.provenance["step"] == 7
    assert isinstance(opened.model, RewardModel)
    assert opened.model.frozen == 0
    found, expected = leaves(opened.params), oracle(tensors, raw)
    assert found.keys() == expected.keys()
    for path, value in expected.items():
        np.testing.assert_array_equal(found[path], value, err_msg=path)
    assert found["llama/layers/mlp/up/kernel"].sharding.spec == jax.P(None, "fsdp", "tensor")


def test_run_and_export_score_alike(reward):
    folder, _, _ = reward
    tokens = jnp.asarray(np.random.default_rng(0).integers(5, 4096, (4, 16)))
    layout = Layout(jnp.ones((4, 16), jnp.int32), jnp.zeros((4, 16), jnp.int32))
    inputs = RewardInputs(tokens, jnp.arange(16)[None].repeat(4, 0), layout, jnp.full((4, 1), 15))
    scores = []
    for name in ("run", "out"):
        opened = open_model(folder / name, ONE)
        with jax.set_mesh(opened.mesh):
            scores.append(jax.jit(opened.model.apply)({"params": opened.params}, inputs))
    assert scores[0].shape == (4, 1, 5)
    np.testing.assert_array_equal(scores[0], scores[1])


def test_a_chat_model(tmp_path):
    tensors = random_tensors(TINY)
    imported(write_folder(tmp_path / "source", TINY, tensors), tmp_path / "run", default_ratings={"helpfulness": 4.0})
    export(str(tmp_path / "run"), tmp_path / "out", **OPTIONS)
    for path, template in ((tmp_path / "run", None), (tmp_path / "out", None), (tmp_path / "source", "extra_id")):
        opened = open_model(path, ONE, template=template, dtype="bfloat16")
        assert opened.description.kind == "chat"
        assert isinstance(opened.model, CausalLM)
        assert opened.model.compute.dtype == jnp.bfloat16
        if template is None:
            assert opened.description.default_ratings == {"helpfulness": 4.0}
        for name, value in oracle(tensors, TINY).items():
            np.testing.assert_array_equal(leaves(opened.params)[name], value.astype(jnp.bfloat16), err_msg=name)


def test_a_reward_head_stays_float32(reward):
    params = open_model(reward[0] / "out", dtype="bfloat16").params
    assert params["reward_head"].dtype == jnp.float32
    assert params["llama"]["embedding"].dtype == jnp.bfloat16


def test_describing_needs_no_jax(reward):
    probe = (
        "import sys; from steerjax.bundle.opening import describe_model\n"
        f"d = describe_model({str(reward[0] / 'run')!r}); print(d.kind, 'jax' in sys.modules)"
    )
    seen = subprocess.run([sys.executable, "-c", probe], env=environment(), capture_output=True, text=True, check=True)
    assert seen.stdout.split() == ["reward", "False"]


def test_the_newest_checkpoint(reward, tmp_path):
    run = shutil.copytree(reward[0] / "run", tmp_path / "run")
    shutil.copytree(run / "checkpoints" / "7", run / "checkpoints" / "12")
    shutil.copytree(run / "checkpoints" / "7", run / "checkpoints" / "99.orbax-checkpoint-tmp")
    (run / "checkpoints" / "100").mkdir()  # begun only
    assert describe_model(run).path == run / "checkpoints" / "12"


def test_a_run_that_was_moved_keeps_its_tokenizer(reward, tmp_path):
    """The copy in WORKDIR/tokenizer goes first; another tokenizer is refused by its hash."""
    run = shutil.copytree(reward[0] / "run", tmp_path / "run")
    (run / "tokenizer").mkdir()
    shutil.copyfile(reward[0] / "source" / "tokenizer.model", run / "tokenizer" / "embedded.model")
    assert describe_model(run).tokenizer.files == (run / "tokenizer" / "embedded.model",)
    with (run / "tokenizer" / "embedded.model").open("ab") as file:
        file.write(b"\x9a\x06\x00")  # an unknown field: the same pieces, another file
    with pytest.raises(CheckpointError, match=r"was trained with another tokenizer"):
        describe_model(run)


def edit_provenance(run, **changes) -> None:
    file = run / "checkpoints" / "7" / "provenance" / "metadata"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_missing_things_are_named(reward, tmp_path):
    source = reward[0] / "source"
    with pytest.raises(ModelError, match=r"does not say which chat template .*\n  cure: --template, one of extra_id"):
        describe_model(source)
    with pytest.raises(ModelError, match=r"was trained with the template extra_id, not chatml"):
        describe_model(reward[0] / "out", template="chatml")
    with pytest.raises(ModelError, match=r"unknown chat template 'vicuna'"):
        describe_model(source, template="vicuna")
    with pytest.raises(ModelError, match=r"no model folder './nothing'"):
        describe_model("./nothing")
    with pytest.raises(ModelError, match=r"is neither a run .* nor a Hugging Face folder"):
        describe_model(tmp_path)
    (tmp_path / "begun" / "checkpoints").mkdir(parents=True)
    (tmp_path / "begun" / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"begun' has no whole checkpoint yet"):
        describe_model(tmp_path / "begun")
    with pytest.raises(ConfigError, match=r"dtype is 'float16'"):
        open_model(source, template="extra_id", dtype="float16")

    run = shutil.copytree(reward[0] / "run", tmp_path / "run")
    edit_provenance(run, tokenizer={"source": str(tmp_path / "gone"), "sha256": "00"})
    with pytest.raises(ModelError, match=r"its tokenizer cannot be read. no tokenizer at"):
        describe_model(run)
    edit_provenance(run, tokenizer={})
    with pytest.raises(CheckpointError, match=r"provenance lacks 'source'"):
        describe_model(run)


def test_contradictions_are_refused(reward, tmp_path):
    out = shutil.copytree(reward[0] / "out", tmp_path / "out")
    about = json.loads((out / "steerjax.json").read_text())
    (out / "steerjax.json").write_text(json.dumps(about | {"attributes": about["attributes"][::-1]}))
    with pytest.raises(ModelError, match=r"steerjax.json and config.json contradict each other [^$]*export again"):
        describe_model(out)
    (out / "steerjax.json").write_text("[1]")
    with pytest.raises(ModelError, match=r"steerjax.json' cannot be read"):
        describe_model(out)

    # The parameters are of another architecture than the provenance says.
    run = shutil.copytree(reward[0] / "run", tmp_path / "run")
    said = describe_model(run).provenance["config"]
    edit_provenance(run, config=said | {"model": said["model"] | {"intermediate_size": 50}})
    with pytest.raises(CheckpointError, match=r"parameter llama/frozen_layers/mlp/down/kernel has shape \(1, 48, 32\)"):
        open_model(run)
    with pytest.raises(ModelError, match=r"parameter llama/frozen_layers/mlp/down/kernel has shape \(1, 48, 32\)"):
        export(str(run), tmp_path / "other", **OPTIONS)


def test_descriptions_are_frozen(reward):
    with pytest.raises(dataclasses.FrozenInstanceError):
        describe_model(reward[0] / "out").kind = "chat"
