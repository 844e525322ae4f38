"""Hugging Face folders with random weights, made by hand: nothing here uses our key map."""

import dataclasses
import json
import shutil
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors.numpy import load_file, save_file

from steerjax.chat.tokenizer import EMBEDDED

NUMPY = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
TINY = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 4096,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
    "bos_token_id": 2,
    "eos_token_id": 3,
    "torch_dtype": "float32",
}
LABELS = ("helpfulness", "correctness", "coherence", "complexity", "verbosity")
CLASSIFIER = {
    "architectures": ["LlamaForSequenceClassification"],
    "id2label": {str(i): label for i, label in enumerate(LABELS)},
    "label2id": {label: i for i, label in enumerate(LABELS)},
    "pad_token_id": 0,
    "problem_type": "regression",
}


def random_tensors(config: dict, seed: int = 0) -> dict[str, np.ndarray]:
    """Every tensor that transformers would save for this config, in its dtype."""
    c, random = config, np.random.default_rng(seed)
    D, F, V = c["hidden_size"], c["intermediate_size"], c["vocab_size"]
    head = c.get("head_dim") or D // c["num_attention_heads"]
    q, kv = c["num_attention_heads"] * head, c["num_key_value_heads"] * head
    shapes = {"model.embed_tokens.weight": (V, D), "model.norm.weight": (D,)}
    for i in range(c["num_hidden_layers"]):
        layer = f"model.layers.{i}."
        shapes |= {layer + "input_layernorm.weight": (D,), layer + "post_attention_layernorm.weight": (D,)}
        for name, out, into in (("q", q, D), ("k", kv, D), ("v", kv, D), ("o", D, q)):
            shapes[f"{layer}self_attn.{name}_proj.weight"] = (out, into)
            if c.get("attention_bias"):
                shapes[f"{layer}self_attn.{name}_proj.bias"] = (out,)
        for name, out, into in (("gate", F, D), ("up", F, D), ("down", D, F)):
            shapes[f"{layer}mlp.{name}_proj.weight"] = (out, into)
            if c.get("mlp_bias"):
                shapes[f"{layer}mlp.{name}_proj.bias"] = (out,)
    architecture = c["architectures"][0]
    if architecture.endswith("ForCausalLM") and not c["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (V, D)
    if architecture == "LlamaForSequenceClassification":
        shapes["score.weight"] = (len(c["id2label"]), D)
    if architecture == "LlamaModel":
        shapes = {name.removeprefix("model."): shape for name, shape in shapes.items()}
    dtype = NUMPY[c["torch_dtype"]]
    return {name: random.standard_normal(shape).astype(dtype) for name, shape in shapes.items()}


def write_folder(folder: Path, config: dict, tensors: dict[str, np.ndarray], shards: int = 1) -> Path:
    """config.json, safetensors in so many files, and the embedded tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    shutil.copyfile(EMBEDDED, folder / "tokenizer.model")
    if shards == 1:
        save_file(tensors, folder / "model.safetensors")
        return folder
    names, weight_map = sorted(tensors), {}
    for shard in range(shards):
        file = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        part = {name: tensors[name] for name in names[shard::shards]}
        save_file(part, folder / file)
        weight_map |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def read_folder(folder: Path) -> dict[str, np.ndarray]:
    """All tensors of a folder."""
    found: dict[str, np.ndarray] = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= load_file(file)
    return found


def assert_same_tensors(actual: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    """Bit for bit."""
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert actual[name].dtype == value.dtype, name
        assert actual[name].shape == value.shape, name
        assert actual[name].tobytes() == value.tobytes(), name


def oracle(tensors: dict[str, np.ndarray], config: dict) -> dict[str, np.ndarray]:
    """Our parameters by path, float32, written out by hand."""
    c, prefix = config, "" if config["architectures"] == ["LlamaModel"] else "model."
    D, N, K = c["hidden_size"], c["num_attention_heads"], c["num_key_value_heads"]
    H, F = c.get("head_dim") or D // N, c["intermediate_size"]
    t = {name: value.astype(np.float32) for name, value in tensors.items()}
    projections = {
        "attention/q": ("self_attn.q_proj", (D, N, H), (N, H)),
        "attention/k": ("self_attn.k_proj", (D, K, H), (K, H)),
        "attention/v": ("self_attn.v_proj", (D, K, H), (K, H)),
        "attention/o": ("self_attn.o_proj", (N, H, D), (D,)),
        "mlp/gate": ("mlp.gate_proj", (D, F), (F,)),
        "mlp/up": ("mlp.up_proj", (D, F), (F,)),
        "mlp/down": ("mlp.down_proj", (F, D), (D,)),
    }
    found = {"llama/embedding": t[prefix + "embed_tokens.weight"], "llama/final_norm/scale": t[prefix + "norm.weight"]}

    def stack(name, reshape):
        return np.stack([reshape(t[f"{prefix}layers.{i}.{name}"]) for i in range(c["num_hidden_layers"])])

    for ours, theirs in (("attention_norm", "input_layernorm"), ("mlp_norm", "post_attention_layernorm")):
        found[f"llama/layers/{ours}/scale"] = stack(f"{theirs}.weight", lambda x: x)
    for ours, (theirs, shape, bias) in projections.items():
        found[f"llama/layers/{ours}/kernel"] = stack(f"{theirs}.weight", lambda x, s=shape: x.T.reshape(s))
        if f"{prefix}layers.0.{theirs}.bias" in t:
            found[f"llama/layers/{ours}/bias"] = stack(f"{theirs}.bias", lambda x, s=bias: x.reshape(s))
    if "lm_head.weight" in t:
        found["lm_head"] = t["lm_head.weight"].T
    if "score.weight" in t:
        found["reward_head"] = t["score.weight"].T
    return found


def save_checkpoint(workdir: Path, params: dict, provenance: dict, step: int = 7) -> Path:
    """A run's checkpoint, as training writes one."""
    from steerjax.bundle.store import CheckpointStore

    with CheckpointStore(workdir / "checkpoints", keep_last=2) as store:
        store.save(params, {"step": np.zeros((), np.int32)}, step, provenance, None)
    return workdir / "checkpoints" / str(step)


def provenance(model, kind: str = "chat", **changes) -> dict:
    """What a run with this architecture says about itself."""
    from steerjax.bundle.describe import Provenance, TokenizerSource
    from steerjax.chat.tokenizer import load_tokenizer
    from steerjax.schema import HELPSTEER

    made = Provenance(
        steerjax="0",
        kind=kind,
        objectives=("regression" if kind == "reward" else "sft",),
        attributes=HELPSTEER.attributes,
        model=model,
        template="extra_id",
        system_prompt=None,
        readout="last",
        tokenizer=TokenizerSource("embedded", load_tokenizer("embedded").hash),
        base_model="random",
        data={},
        config={},
    )
    return dataclasses.asdict(made) | changes
