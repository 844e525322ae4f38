"""Adapters: their gradients by the chain rule, what is trained and kept, and one function with or without them."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from steerjax import export, merge
from steerjax.bundle import locate, open_bundle
from steerjax.bundle.reader import open_reader
from steerjax.checksums import write_list
from steerjax.config import default_config, resolve
from steerjax.data.packing import pack
from steerjax.data.trees import grow
from steerjax.errors import ConfigError, ModelError
from steerjax.models.config import LoraConfig
from steerjax.models.llama import RewardModel, dropout
from steerjax.parallel.mesh import MeshConfig
from steerjax.report.records import read_metrics
from steerjax.training.train import train
from tests.helpers import (
    TINY,
    assert_trees_close,
    host_batch,
    init_params,
    loss_and_gradients,
    rated_examples,
    regression,
    slow_but,
)
from tests.hf_folders import TINY as FOLDER
from tests.hf_folders import random_tensors, read_folder, write_folder
from tests.refusals import refused
from tests.reward_models import SENTENCE, write_rows

NAMES = ("helpfulness", "correctness", "coherence", "complexity", "verbosity")


def folded(layers: dict, scale: float) -> dict:
    """Kernels with their adapters added, by hand."""
    out = {}
    for name, part in layers.items():
        if not isinstance(part, dict) or "kernel" not in part:
            out[name] = folded(part, scale) if isinstance(part, dict) else part
            continue
        out[name] = {"kernel": part["kernel"]} | ({"bias": part["bias"]} if "bias" in part else {})
        if "lora_a" in part:
            L, R = len(part["kernel"]), part["lora_a"].shape[-1]
            low = part["lora_a"].reshape(L, -1, R) @ part["lora_b"].reshape(L, R, -1)
            out[name]["kernel"] += scale * low.reshape(part["kernel"].shape)
    return out


@pytest.mark.parametrize("targets", slow_but((("all-linear",),), [("all-linear",), ("q", "v"), ("o", "down")]))
def test_gradients_are_those_of_full_training_by_the_chain_rule(targets):
    """For W + s A B and G the gradient of W: s G B' for A, s A' G for B."""
    lora = LoraConfig(rank=3, alpha=6.0, targets=targets)
    objective = regression()
    trees = grow(rated_examples(objective, [2, 3]))
    batch = host_batch([objective], trees, pack(trees, 128), 128)
    module = RewardModel(dataclasses.replace(TINY, lora=lora), 3)
    params = init_params(module)
    random = np.random.default_rng(0)
    params = jax.tree_util.tree_map_with_path(
        lambda path, x: jnp.asarray(random.normal(size=x.shape), jnp.float32) * 0.1 if "lora_b" in str(path) else x,
        params,
    )
    plain = params | {"llama": params["llama"] | {"layers": folded(params["llama"]["layers"], lora.alpha / lora.rank)}}
    (ours, _), gradients = loss_and_gradients(module, [objective], batch, params)
    (theirs, _), full = loss_and_gradients(RewardModel(TINY, 3), [objective], batch, plain)
    np.testing.assert_allclose(ours, theirs, rtol=1e-5)
    assert_trees_close(gradients["reward_head"], full["reward_head"], rtol=1e-5)
    adapted = 0
    for group, parts in params["llama"]["layers"].items():
        for name, part in parts.items():
            if isinstance(part, dict) and "lora_a" in part:
                L, R = len(part["kernel"]), lora.rank
                a, b = part["lora_a"].reshape(L, -1, R), part["lora_b"].reshape(L, R, -1)
                g = full["llama"]["layers"][group][name]["kernel"].reshape(L, a.shape[1], -1)
                found = gradients["llama"]["layers"][group][name]
                expected = {"lora_a": 2 * g @ b.swapaxes(1, 2), "lora_b": 2 * a.swapaxes(1, 2) @ g}
                for leaf, value in expected.items():
                    assert_trees_close(found[leaf].reshape(value.shape), value, rtol=1e-5)
                adapted += 1
    assert adapted == (7 if targets == ("all-linear",) else 2)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A causal model of random weights, and rated rows."""
    folder = tmp_path_factory.mktemp("lora")
    tensors = {k: v * (1 if "norm" in k else 0.2) for k, v in random_tensors(FOLDER).items()}
    write_folder(folder / "model", FOLDER, tensors)
    random = np.random.default_rng(0)
    words = SENTENCE.split()
    rows = [
        {"prompt": f"Question {i // 2}?", "response": " ".join(random.choice(words, random.integers(3, 30))),
         **dict(zip(NAMES, random.integers(0, 5, 5).tolist(), strict=True))} for i in range(80)
    ]  # fmt: skip
    write_rows(folder / "rows.jsonl", rows)
    return folder


def experiment(source, objectives=("regression",), **changes):
    config = default_config()
    config.objectives = objectives
    config.data.train = (str(source / "rows.jsonl"),)
    config.data.validation_fraction = 0.2
    config.model.source = str(source / "model")
    config.model.lora.rank = 4
    config.batch.update(rows=8, row_length=256)
    config.optimizer.update(warmup_steps=0, learning_rate=1e-2, epsilon=1e-6)
    config.train.update(steps=4, plots=False, checkpoint_every=2)
    for key, value in changes.items():
        group, *inner, name = key.split("__")
        target = config[group]
        for part in inner:
            target = target[part]
        setattr(target, name, value)
    return resolve(config.to_dict())


def losses(workdir):
    return [r["loss"] for r in read_metrics(workdir / "metrics.jsonl") if r["split"] == "train"]


def rewards(folder, mesh=None):
    bundle = open_bundle(folder, mesh or MeshConfig(), dtype="float32")
    inputs = np.arange(5, 325).reshape(8, 40) % 4096, np.arange(40)[None].repeat(8, 0), np.full((8, 40), 40)
    with jax.set_mesh(bundle.mesh):
        return np.asarray(jax.jit(bundle.module.apply)({"params": bundle.params}, *inputs))


@pytest.mark.slow
def test_only_adapters_and_the_head_are_trained_and_the_merged_export_is_the_same_model(source, tmp_path, capsys):
    train(experiment(source), tmp_path / "run")
    said = capsys.readouterr().out
    found = losses(tmp_path / "run")
    assert found[-1] < found[0]
    bundle = open_bundle(tmp_path / "run", dtype="float32")
    base = open_bundle(source / "model", template="extra_id", dtype="float32").params
    trained = bundle.params["llama"]["layers"]["mlp"]["up"]
    np.testing.assert_array_equal(trained["kernel"], base["llama"]["layers"]["mlp"]["up"]["kernel"])
    np.testing.assert_array_equal(bundle.params["llama"]["embedding"], base["llama"]["embedding"])
    assert np.abs(trained["lora_b"]).max() > 0
    sizes = {name: leaf.size for name, leaf in (("a", trained["lora_a"]), ("b", trained["lora_b"]))}
    assert sizes == {"a": 3 * 32 * 4, "b": 3 * 4 * 48}
    total = sum(x.size for x in jax.tree.leaves(bundle.params))
    adapters = sum(x.size for path, x in jax.tree_util.tree_leaves_with_path(bundle.params) if "lora_" in str(path))
    assert f"{total:,}, {total - adapters - 32 * 5:,} of them frozen" in said

    export.main(["--checkpoint", str(tmp_path / "run"), "--output", str(tmp_path / "out")])
    assert not any("lora" in name for name in read_folder(tmp_path / "out"))
    for mesh in (MeshConfig(), MeshConfig(data=1, fsdp=4, tensor=2)):
        np.testing.assert_allclose(rewards(tmp_path / "out"), rewards(tmp_path / "run", mesh), rtol=0, atol=1e-5)


@pytest.mark.slow
def test_resumed_equals_uninterrupted_on_another_mesh(source, tmp_path):
    """With dropout too, which follows from seed, step, row and place."""
    constant = {"optimizer__schedule": "constant", "model__lora__dropout": 0.2}
    train(experiment(source, **constant), tmp_path / "alone")
    train(experiment(source, **constant, train__steps=2), tmp_path / "parts")
    mesh = {"mesh__data": 1, "mesh__fsdp": 4, "mesh__tensor": 2}
    train(experiment(source, **constant, **mesh), tmp_path / "parts")
    np.testing.assert_allclose(losses(tmp_path / "parts"), losses(tmp_path / "alone"), rtol=1e-5)
    np.testing.assert_allclose(rewards(tmp_path / "parts"), rewards(tmp_path / "alone"), rtol=0, atol=1e-4)


@pytest.mark.slow
def test_dropout_is_of_the_training_step_alone_and_the_same_in_micro_batches(source, tmp_path):
    found = {}
    for name, changes in {
        "without": {}, "with": {"model__lora__dropout": 0.3}, "parts": {"batch__micro_batches": 4},
        "seed": {"train__seed": 1},
    }.items():  # fmt: skip
        more = {"model__lora__dropout": 0.3, "mesh__data": 2, "mesh__context": 4} if changes else {}
        train(experiment(source, **more | changes, train__steps=3), tmp_path / name)
        found[name] = losses(tmp_path / name)
    np.testing.assert_allclose(found["parts"], found["with"], rtol=1e-5)
    assert found["with"][0] == pytest.approx(found["without"][0], rel=1e-5)  # new adapters add nothing
    assert abs(found["with"][2] - found["without"][2]) > 1e-4
    # What is trained is the function without dropout: an evaluation has none.
    run = open_bundle(tmp_path / "with", dtype="float32").description
    assert run.model.lora.dropout == 0.3
    np.testing.assert_array_equal(rewards(tmp_path / "with"), rewards(tmp_path / "with"))


@pytest.mark.short
def test_dropout_keeps_the_mean_and_a_row_its_noise():
    x, keys = jnp.ones((4, 50, 64)), jax.random.split(jax.random.key(0), 4)
    dropped = dropout(x, keys, 0.25)
    assert set(np.unique(dropped)) == {0.0, np.float32(1 / 0.75)}
    assert abs(float(dropped.mean()) - 1) < 0.02
    np.testing.assert_array_equal(dropout(x[2:], keys[2:], 0.25), dropped[2:])


@pytest.mark.slow
def test_a_base_in_bfloat16_trains_alike_and_takes_half_the_bytes(source, tmp_path):
    """Exactly alike, where the source's numbers are bfloat16's already."""
    tensors = read_folder(source / "model")
    write_folder(tmp_path / "model", FOLDER, {k: v.astype(ml_dtypes.bfloat16) for k, v in tensors.items()})
    for dtype in ("float32", "bfloat16"):
        changes = {"model__source": str(tmp_path / "model"), "model__lora__base_dtype": dtype}
        for steps in (2, 4):  # resumed
            train(experiment(source, **changes, optimizer__schedule="constant", train__steps=steps), tmp_path / dtype)
        reader = open_reader(locate(tmp_path / dtype))
        kept = {reader.dtypes[path] for path in ("llama/embedding", "llama/layers/mlp/up/kernel")}
        assert kept == {dtype}
        assert {reader.dtypes[path] for path in reader.shapes if "lora" in path or "head" in path} == {"float32"}
    assert losses(tmp_path / "bfloat16") == losses(tmp_path / "float32")
    np.testing.assert_array_equal(rewards(tmp_path / "bfloat16"), rewards(tmp_path / "float32"))


@pytest.mark.slow
def test_an_adapter_is_a_model_and_a_source(source, tmp_path):
    """What `export --adapter` wrote, with its base: to score, to merge, and to train on."""
    train(experiment(source, model__lora__targets=("q", "down")), tmp_path / "run")
    adapter = tmp_path / "adapter"
    export.main(["--checkpoint", str(tmp_path / "run"), "--output", str(adapter), "--adapter"])
    for mesh in (MeshConfig(), MeshConfig(data=1, fsdp=4, tensor=2)):
        np.testing.assert_array_equal(rewards(adapter, mesh), rewards(tmp_path / "run", mesh))
    export.main(["--checkpoint", str(adapter), "--output", str(tmp_path / "merged")])
    np.testing.assert_allclose(rewards(tmp_path / "merged"), rewards(adapter), rtol=0, atol=1e-5)
    train(experiment(source, model__source=str(adapter), model__lora__rank=0, train__steps=1), tmp_path / "more")
    assert open_bundle(tmp_path / "more").description.model.lora.targets == ("down", "q")
    assert losses(tmp_path / "more")[0] < losses(tmp_path / "run")[0]

    config, weights = (adapter / name for name in ("adapter_config.json", "adapter_model.safetensors"))
    whole, tensors = json.loads(config.read_text()), load_file(weights)
    other = FOLDER | {"intermediate_size": 2 * FOLDER["intermediate_size"]}
    write_folder(tmp_path / "other", other, random_tensors(other))
    first = next(name for name in tensors if "q_proj.lora_A" in name)
    merge, base = "merge_and_unload", "base"
    for said, kept, fact, cure in (
        ({"use_dora": True}, tensors, "use_dora", merge),
        ({"rank_pattern": {"q_proj": 2}}, tensors, "rank_pattern", merge),
        ({"peft_type": "PREFIX_TUNING"}, tensors, "peft_type", "LORA"),
        ({"bias": "all"}, tensors, "bias", "none"),
        ({"base_model_name_or_path": str(tmp_path / "nowhere")}, tensors, "nowhere", base),
        ({"base_model_name_or_path": str(tmp_path / "other")}, tensors, "down_proj.lora_A", base),
        ({"task_type": "CAUSAL_LM"}, tensors, "CAUSAL_LM", base),
        ({}, {name: x for name, x in tensors.items() if name != first}, first, base),
        ({}, {name: x for name, x in tensors.items() if "score" not in name}, "0 outputs", "modules_to_save"),
        ({}, tensors | {"base_model.model.lm_head.lora_A.weight": tensors[first]}, "lm_head.lora_A", merge),
        ({}, {name: x for name, x in tensors.items() if "lora" not in name}, "0 projections", base),
    ):
        config.write_text(json.dumps(whole | said))
        save_file(kept, weights)
        write_list(adapter)
        with refused(ModelError, fact, cure=cure):
            open_bundle(adapter)
    weights.write_bytes(weights.read_bytes()[:-8])
    with refused(ModelError, "adapter_model.safetensors"):
        open_bundle(adapter)


@pytest.mark.parity
@pytest.mark.parametrize("rslora", [False, True])
def test_an_adapter_that_peft_wrote(source, tmp_path, rslora):
    import torch
    from peft import LoraConfig as Peft
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(source / "model", dtype=torch.float32)
    options = {"task_type": "CAUSAL_LM", "target_modules": ["v_proj", "up_proj"], "use_rslora": rslora}
    model = get_peft_model(base, Peft(r=4, lora_alpha=12, init_lora_weights=False, **options)).eval()
    model.save_pretrained(tmp_path / "adapter")
    bundle = open_bundle(tmp_path / "adapter", template="extra_id", dtype="float32")
    tokens = np.arange(5, 325).reshape(8, 40) % 4096
    inputs = tokens, np.arange(40)[None].repeat(8, 0), np.full((8, 40), 40)
    with jax.set_mesh(bundle.mesh), torch.no_grad():
        ours = np.asarray(jax.jit(bundle.module.apply)({"params": bundle.params}, *inputs))
        np.testing.assert_allclose(model(torch.tensor(tokens)).logits.numpy(), ours, rtol=0, atol=1e-4)


@pytest.mark.slow
def test_a_run_with_adapters_is_a_source(source, tmp_path):
    """Its adapters and its head go on."""
    train(experiment(source), tmp_path / "run")
    e = experiment(source, model__source=str(tmp_path / "run"), model__lora__rank=0, train__steps=1)
    train(e, tmp_path / "more")
    assert open_bundle(tmp_path / "more").description.model.lora.rank == 4
    assert losses(tmp_path / "more")[0] < losses(tmp_path / "run")[0]


@pytest.mark.slow
def test_runs_with_adapters_are_merged_as_the_models_they_are(source, tmp_path):
    """The mean of A B is not the product of means."""
    for seed in (0, 1):
        train(experiment(source, train__seed=seed), tmp_path / f"run{seed}")
        export.main(["--checkpoint", str(tmp_path / f"run{seed}"), "--output", str(tmp_path / f"out{seed}")])
    merge.main([str(tmp_path / "run0"), str(tmp_path / "run1"), "--output", str(tmp_path / "both")])
    first, second, both = (read_folder(tmp_path / name) for name in ("out0", "out1", "both"))
    assert both.keys() == first.keys()
    for name, value in both.items():
        np.testing.assert_allclose(value, (first[name] + second[name]) / 2, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_chat_models_too(source, tmp_path):
    train(experiment(source, ("sft",)), tmp_path / "run")
    export.main(["--checkpoint", str(tmp_path / "run"), "--output", str(tmp_path / "out")])
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    np.testing.assert_allclose(rewards(tmp_path / "out"), rewards(tmp_path / "run"), rtol=0, atol=2e-4)


def test_what_cannot_be_adapted(source, tmp_path):
    for key, value in (("model__lora__targets", ()), ("model__lora__targets", ("query",)), ("model__lora__rank", -1)):
        with refused(ConfigError, "config.model.lora"):
            experiment(source, **{key: value})
    with refused(ConfigError, "config.model.lora", cure="config.model.source"):
        train(experiment(source, model__source="random"), tmp_path)


@pytest.mark.slow
@pytest.mark.parity
def test_peft_scores_as_we_do(source, tmp_path):
    """The adapter with its head, on the base model, and what PEFT merges."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification

    train(experiment(source, model__lora__targets=("q", "v", "o", "down")), tmp_path / "run")
    export.main(["--checkpoint", str(tmp_path / "run"), "--output", str(tmp_path / "adapter"), "--adapter"])
    base = AutoModelForSequenceClassification.from_pretrained(source / "model", num_labels=5, dtype=torch.float32)
    base.config.pad_token_id = 0
    model = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    tokens = np.arange(5, 325).reshape(8, 40) % 4096
    ours = rewards(tmp_path / "run")[:, -1]
    for each in (model, model.merge_and_unload()):
        with torch.no_grad():
            np.testing.assert_allclose(each(torch.tensor(tokens)).logits.numpy(), ours, rtol=0, atol=1e-5)
