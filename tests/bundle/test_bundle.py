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

from steerjax.bundle import describe, locate, open_bundle
from steerjax.bundle.build import abstract_parameters, random_parameters, stored_parameters
from steerjax.checksums import LIST, write_list
from steerjax.errors import CheckpointError, ConfigError, ModelError
from steerjax.export import export
from steerjax.hf.config_json import read_config
from steerjax.models.llama import CausalLM, RewardModel
from steerjax.parallel.mesh import MeshConfig, make_mesh
from steerjax.schema import HELPSTEER, Attribute, Schema
from tests.hf.test_export import EIGHT, environment, imported
from tests.hf_folders import CLASSIFIER, TINY, oracle, provenance, random_tensors, save_checkpoint, write_folder
from tests.refusals import refused
from tests.reward_models import reward_folder

TOKENS = np.random.default_rng(0).integers(5, 4096, (4, 16))


def leaves(tree) -> dict:
    found = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in found}


def ratings(bundle) -> np.ndarray:
    """[4, 16, A], of rows that are one text each."""
    inputs = TOKENS, np.arange(16)[None].repeat(4, 0), np.full((4, 16), 16)
    with jax.set_mesh(bundle.mesh):
        return np.asarray(jax.jit(bundle.module.apply)({"params": bundle.params}, *inputs))


@pytest.fixture(scope="module")
def reward(tmp_path_factory):
    """A run of a reward model, its export, and the tensors."""
    folder = tmp_path_factory.mktemp("reward")
    raw = TINY | CLASSIFIER
    tensors = random_tensors(raw)
    imported(write_folder(folder / "source", raw, tensors), folder / "run")
    export(str(folder / "run"), folder / "out")
    return folder, raw, tensors


@pytest.mark.parametrize("name", ["run", "run/checkpoints/7", "run/checkpoints", "out"])
def test_a_reward_model(reward, name):
    folder, raw, tensors = reward
    bundle = open_bundle(folder / name, EIGHT)
    d = bundle.description
    assert (d.kind, d.template.name, d.readout, d.schema) == ("reward", "extra_id", "last", HELPSTEER)
    assert d.path == locate(folder / name) == folder / ("out" if name == "out" else "run/checkpoints/7")
    assert d.tokenizer.files[0].name in ("embedded.model", "tokenizer.model")  # not the converted one
    assert d.provenance["step"] == 7
    assert isinstance(bundle.module, RewardModel)
    found, expected = leaves(bundle.params), oracle(tensors, raw)
    assert found.keys() == expected.keys()
    for path, value in expected.items():
        np.testing.assert_array_equal(found[path], value, err_msg=path)
    assert found["llama/layers/mlp/up/kernel"].sharding.spec == jax.P(None, "fsdp", "tensor")


@pytest.fixture(scope="module")
def gentle(tmp_path_factory):
    """A run whose ratings lie between about -1 and 1, and its export."""
    folder = tmp_path_factory.mktemp("gentle")
    imported(reward_folder(folder / "source"), folder / "run")
    export(str(folder / "run"), folder / "out")
    return folder


def test_a_run_rates_as_its_export_on_any_mesh(gentle):
    run = open_bundle(gentle / "run", EIGHT)
    found = ratings(run)
    assert found.shape == (4, 16, 5)
    assert np.ptp(found) > 0.1
    np.testing.assert_array_equal(ratings(open_bundle(gentle / "out", EIGHT)), found)
    inputs = TOKENS, np.arange(16)[None].repeat(4, 0), np.full((4, 16), 16)
    alone = run.module.apply({"params": jax.device_get(run.params)}, *inputs)  # one device, no mesh
    for mesh in (EIGHT, MeshConfig(data=4, fsdp=2), MeshConfig(data=1, fsdp=4, tensor=2), MeshConfig()):
        opened = open_bundle(gentle / "run", mesh)
        for path, leaf in leaves(opened.params).items():
            np.testing.assert_array_equal(leaf, leaves(run.params)[path], err_msg=path)
        np.testing.assert_allclose(ratings(opened), alone, rtol=0, atol=1e-5)


def test_bfloat16(gentle):
    """The head stays float32; the ratings are about the same."""
    narrow, wide = (open_bundle(gentle / "run", dtype=dtype) for dtype in ("bfloat16", "auto"))
    assert narrow.module.compute.dtype == jnp.bfloat16
    assert wide.module.compute.dtype == jnp.float32  # a CPU's
    dtypes = {path: leaf.dtype.name for path, leaf in leaves(narrow.params).items()}
    assert dtypes.pop("reward_head") == "float32"
    assert set(dtypes.values()) == {"bfloat16"}
    exact = ratings(wide)
    error = np.sqrt(np.square(ratings(narrow) - exact).mean())
    assert 0 < error < 0.05 * exact.std()


def test_a_chat_model(tmp_path):
    tensors = random_tensors(TINY)
    imported(write_folder(tmp_path / "source", TINY, tensors), tmp_path / "run", default_ratings={"helpfulness": 4.0})
    export(str(tmp_path / "run"), tmp_path / "out")
    for path, template in ((tmp_path / "run", None), (tmp_path / "out", None), (tmp_path / "source", "extra_id")):
        bundle = open_bundle(path, EIGHT, template=template, dtype="bfloat16")
        assert bundle.description.kind == "chat"
        assert isinstance(bundle.module, CausalLM)
        if template is None:
            assert bundle.description.default_ratings == {"helpfulness": 4.0}
            assert bundle.renderer().schema == HELPSTEER
        for name, value in oracle(tensors, TINY).items():
            np.testing.assert_array_equal(leaves(bundle.params)[name], value.astype(jnp.bfloat16), err_msg=name)


def test_a_classifier_with_labels_of_its_own(tmp_path):
    """Of somebody else's: names that are no attributes, and a number of them that no preset has."""
    folder = reward_folder(tmp_path / "other", id2label={"0": "LABEL_0", "1": "is it good?", "2": "x"}, label2id={})
    bundle = open_bundle(folder, template="chatml")
    assert bundle.description.schema is None
    assert bundle.module.num_attributes == 3
    assert ratings(bundle).shape == (4, 16, 3)


def test_a_head_with_a_bias_and_the_mean(tmp_path):
    config = read_config(write_folder(tmp_path / "source", TINY, random_tensors(TINY))).model
    module = RewardModel(config, 2, "mean", use_bias=True)
    params = random_parameters(module, abstract_parameters(module, make_mesh(EIGHT)), seed=1)
    params["reward_bias"] = jnp.array([2.0, -3.0])
    schema = Schema((Attribute("wit", 1, 5), Attribute("depth", 1, 10)))
    said = provenance(config, "reward", readout="mean", attributes=schema.to_json())
    save_checkpoint(tmp_path / "run", params, said)
    bundle = open_bundle(tmp_path / "run", EIGHT)
    assert bundle.description.schema == schema
    assert (bundle.module.readout, bundle.module.use_bias, bundle.module.num_attributes) == ("mean", True, 2)
    np.testing.assert_array_equal(bundle.params["reward_bias"], [2.0, -3.0])
    assert np.abs(ratings(bundle).mean((0, 1)) - [2.0, -3.0]).max() < 1.0


@pytest.mark.parametrize("name", ["run", "out"])
def test_the_first_layers(reward, name):
    """What config.model.keep_layers reads, of a run as of a folder."""
    folder, raw, tensors = reward
    about = describe(folder / name)
    module = RewardModel(dataclasses.replace(about.model, num_layers=2), 5)
    found = leaves(stored_parameters(about, abstract_parameters(module, make_mesh(EIGHT))))
    for path, value in oracle(tensors, raw).items():
        expected = value[:2] if "/layers/" in path else value
        np.testing.assert_array_equal(found[path], expected, err_msg=path)


def test_describing_needs_no_jax_and_inference_no_training(reward):
    probe = (
        "import sys; from steerjax.bundle import describe\n"
        f"d = describe({str(reward[0] / 'run')!r}); print(d.kind, 'jax' in sys.modules)\n"
        "import steerjax.bundle.build, steerjax.inference.scorer\n"
        "print([m for m in sys.modules if m.startswith(('steerjax.training', 'steerjax.objectives'))])"
    )
    seen = subprocess.run([sys.executable, "-c", probe], env=environment(), capture_output=True, text=True, check=True)
    assert seen.stdout.splitlines() == ["reward False", "[]"]


def test_the_newest_checkpoint(reward, tmp_path):
    run = shutil.copytree(reward[0] / "run", tmp_path / "run")
    shutil.copytree(run / "checkpoints" / "7", run / "checkpoints" / "12")
    shutil.copytree(run / "checkpoints" / "7", run / "checkpoints" / "99.orbax-checkpoint-tmp")
    (run / "checkpoints" / "100").mkdir()  # begun only
    assert locate(run) == describe(run).path == run / "checkpoints" / "12"


def test_a_run_that_was_moved_keeps_its_tokenizer(reward, tmp_path):
    """The copy in WORKDIR/tokenizer goes first; another tokenizer is refused by its hash."""
    run = shutil.copytree(reward[0] / "run", tmp_path / "run")
    (run / "tokenizer").mkdir()
    copy = run / "tokenizer" / "tokenizer.model"
    shutil.copyfile(reward[0] / "source" / "tokenizer.model", copy)
    assert describe(run).tokenizer.files == (copy,)
    with copy.open("ab") as file:
        file.write(b"\x9a\x06\x00")  # an unknown field: the same pieces, another file
    with refused(CheckpointError, str(run / "checkpoints" / "7"), str(run / "tokenizer"), "sha256"):
        describe(run)


def edit_provenance(run, **changes) -> None:
    file = run / "checkpoints" / "7" / "provenance" / "metadata"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    write_list(run / "checkpoints" / "7")


def test_missing_things_are_named(reward, tmp_path):
    source = reward[0] / "source"
    (tmp_path / "begun" / "checkpoints").mkdir(parents=True)
    (tmp_path / "begun" / "config.json").write_text("{}")
    (tmp_path / "weights").mkdir()
    shutil.copyfile(source / "model.safetensors", tmp_path / "weights" / "model.safetensors")
    (tmp_path / "file").write_text("")
    for path, template, error, facts in (
        (source, None, ModelError, [source, "--template"]),
        (reward[0] / "out", "chatml", ModelError, [reward[0] / "out", "extra_id", "chatml"]),
        (source, "vicuna", ModelError, ["vicuna", "chatml"]),
        ("./nothing", None, ModelError, ["./nothing"]),
        ("gs://bucket/run", None, ModelError, ["gs://bucket/run"]),
        (tmp_path, None, ModelError, [tmp_path, "checkpoints/STEP", "config.json"]),
        (tmp_path / "file", None, ModelError, [tmp_path / "file", "checkpoints/STEP", "config.json"]),
        (tmp_path / "weights", None, ModelError, [tmp_path / "weights", "config.json"]),
        (tmp_path / "begun", None, CheckpointError, [tmp_path / "begun"]),
    ):
        with refused(error, *map(str, facts)):
            describe(path, template=template)
    with refused(ConfigError, "compute.dtype", "float16"):
        open_bundle(source, template="extra_id", dtype="float16")
    with refused(ConfigError, "config.compute.attention", "splash"):
        open_bundle(source, template="extra_id", attention="splash")

    run = shutil.copytree(reward[0] / "run", tmp_path / "run")
    edit_provenance(run, tokenizer={"source": str(tmp_path / "gone"), "sha256": "00"})
    with refused(ModelError, str(run / "checkpoints" / "7"), "tokenizer", str(tmp_path / "gone")):
        describe(run)
    edit_provenance(run, tokenizer={"sha256": "00"})
    with refused(CheckpointError, "metadata.tokenizer.source"):
        describe(run)


def test_a_run_of_the_first_edition_is_refused_in_one_sentence(reward, tmp_path):
    run = shutil.copytree(reward[0] / "run", tmp_path / "run")
    said = run / "checkpoints" / "7" / "provenance" / "metadata"
    said.write_text(json.dumps({"steerjax": "0.1", "kind": "reward", "config": {"task": "reward"}}))
    (run / "checkpoints" / "7" / LIST).unlink()
    for use in (describe, open_bundle, lambda path: export(str(path), tmp_path / "out")):
        with refused(CheckpointError, str(run / "checkpoints" / "7"), "edition 1", cure="train again"):
            use(run)
    assert not (tmp_path / "out").exists()


def test_contradictions_are_refused(reward, tmp_path):
    out = shutil.copytree(reward[0] / "out", tmp_path / "out")
    about = json.loads((out / "steerjax.json").read_text())
    (out / "steerjax.json").write_text(json.dumps(about | {"attributes": about["attributes"][::-1]}))
    write_list(out)
    with refused(ModelError, str(out), "steerjax.json", "config.json", cure="export again"):
        describe(out)
    (out / "steerjax.json").write_text(json.dumps(about | {"provenance": {"tokenizer": "mine"}}))
    write_list(out)
    with refused(ModelError, str(out / "steerjax.json"), "provenance.tokenizer", "mine"):
        describe(out)
    shutil.copyfile(reward[0] / "out" / "steerjax.json", out / "steerjax.json")
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(config | {"vocab_size": 4095}))
    write_list(out)
    with refused(ModelError, str(out), "tokenizer", "4096", "embedding", "4095"):
        describe(out)

    # The parameters are of another architecture than the provenance says.
    run = shutil.copytree(reward[0] / "run", tmp_path / "run")
    model = json.loads((run / "checkpoints" / "7" / "provenance" / "metadata").read_text())["model"]
    edit_provenance(run, model=model | {"intermediate_size": 50})
    for use in (open_bundle, lambda path: export(str(path), tmp_path / "other")):
        with refused(ModelError, "llama/layers/mlp/down/kernel", "(3, 48, 32)", "(3, 50, 32)"):
            use(run)


def test_descriptions_are_frozen(reward):
    with pytest.raises(dataclasses.FrozenInstanceError):
        describe(reward[0] / "out").kind = "chat"
