"""Every family from transformers' folder and back: sharded logits, greedy tokens, a trained step, the same bytes."""

import jax
import numpy as np
import pytest

from steerjax import export
from steerjax.bundle import open_bundle
from steerjax.chat.tokenizer import EMBEDDED
from steerjax.config import default_config, resolve
from steerjax.inference.engine import Engine, Request
from steerjax.inference.steering import Sampling
from steerjax.models.families import FAMILIES
from steerjax.parallel.mesh import MeshConfig
from steerjax.report.records import read_metrics
from steerjax.schema import HELPSTEER
from steerjax.training.train import train
from tests.hf_folders import assert_same_tensors, read_folder

pytestmark = pytest.mark.parity

SIZES = {
    "vocab_size": 4096, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "tie_word_embeddings": False, "bos_token_id": 2,
    "eos_token_id": 3, "pad_token_id": 0,
}  # fmt: skip
MORE = {"mistral": {"sliding_window": 7}, "qwen3": {"head_dim": 16}}


@pytest.fixture(scope="module", params=[name for name in FAMILIES if name != "llama"])
def folder(request, tmp_path_factory):
    """A random causal model as transformers saves it, with the embedded tokenizer."""
    import torch
    import transformers

    prefix = FAMILIES[request.param].prefix
    torch.manual_seed(0)
    config = getattr(transformers, prefix + "Config")(**SIZES, **MORE.get(request.param, {}))
    model = getattr(transformers, prefix + "ForCausalLM")(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(
                1 + 0.1 * torch.randn(parameter.shape) if "norm" in name else 0.3 * torch.randn(parameter.shape)
            )
    folder = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(folder)
    (folder / "tokenizer.model").write_bytes(EMBEDDED.read_bytes())
    return folder


def theirs(folder):
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


@pytest.mark.parametrize(
    "mesh", [MeshConfig(data=1, fsdp=4, tensor=2), MeshConfig(data=2, tensor=2, context=2)], ids=str
)
def test_sharded_logits_equal_transformers(folder, mesh):
    import torch

    bundle = open_bundle(folder, mesh, template="extra_id", dtype="float32")
    tokens = np.random.default_rng(0).integers(4, 4096, (8, 48))
    inputs = tokens, np.arange(48)[None].repeat(8, 0), np.full((8, 48), 48)
    with jax.set_mesh(bundle.mesh):
        logits = jax.jit(bundle.module.apply)({"params": bundle.params}, *inputs)
    with torch.no_grad():
        expected = theirs(folder)(torch.tensor(tokens)).logits.numpy()
    assert np.abs(expected).max() > 0.5
    np.testing.assert_allclose(logits, expected, atol=1e-4, rtol=0)


def test_greedy_tokens_equal_transformers(folder):
    """Longer than the window of the one that has it."""
    import torch

    engine = Engine(open_bundle(folder, template="extra_id", dtype="float32"), HELPSTEER, Sampling(max_new_tokens=24))
    random = np.random.default_rng(1)
    prompts = [random.integers(10, 4096, size).astype(np.int32) for size in (3, 17, 9, 30)]
    model = theirs(folder)
    for prompt, (answer,) in zip(prompts, engine.run([Request((prompt,)) for prompt in prompts]), strict=True):
        whole = torch.tensor(np.concatenate([prompt, answer.ids])[None].astype(np.int64))
        with torch.no_grad():
            best = model(whole).logits[0, len(prompt) - 1 : -1].argmax(-1)
        assert tuple(best.tolist()) == answer.ids
        assert len(answer.ids) > 7


def test_trained_and_exported_and_back(folder, tmp_path):
    """A reward model from it trains, and its export is of the family, for transformers and for us."""
    import torch
    from transformers import AutoModelForSequenceClassification

    config = default_config()
    config.model.source, config.chat.template = str(folder), "extra_id"
    config.data.validation_fraction = 0.9
    config.data.on_bad_row = "skip"
    config.batch.update(rows=8, row_length=256)
    config.optimizer.update(warmup_steps=0, learning_rate=1e-3)
    config.train.update(steps=3, plots=False)
    train(resolve(config.to_dict()), tmp_path / "run")
    losses = [r["loss"] for r in read_metrics(tmp_path / "run" / "metrics.jsonl") if r["split"] == "train"]
    assert np.isfinite(losses).all()
    export.main(["--checkpoint", str(tmp_path / "run"), "--output", str(tmp_path / "out")])
    export.main(["--checkpoint", str(tmp_path / "out"), "--output", str(tmp_path / "again")])
    assert_same_tensors(read_folder(tmp_path / "again"), read_folder(tmp_path / "out"))
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    bundle = open_bundle(tmp_path / "out", dtype="float32")
    assert type(model).__name__.startswith(FAMILIES[bundle.description.model.family].prefix)
    tokens = np.random.default_rng(2).integers(4, 4096, (1, 40))
    ours = bundle.module.apply(
        {"params": jax.device_get(bundle.params)}, tokens, np.arange(40)[None], np.full((1, 40), 40)
    )
    with torch.no_grad():
        expected = model(torch.tensor(tokens)).logits.numpy()
    np.testing.assert_allclose(np.asarray(ours)[:, -1], expected, atol=1e-4, rtol=0)


def test_the_folder_comes_back_bit_for_bit(folder, tmp_path):
    export.main(["--checkpoint", str(folder), "--template", "extra_id", "--output", str(tmp_path / "out")])
    assert_same_tensors(read_folder(tmp_path / "out"), read_folder(folder))
