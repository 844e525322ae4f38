"""config.json: real ones are read and written, what we do not compute is refused by name."""

import dataclasses
import json

import pytest

from steerjax.errors import ConfigError, ModelError
from steerjax.hf.config_json import parse_config, read_config, write_config
from steerjax.models.config import LlamaConfig, RopeScaling
from steerjax.models.families import FAMILIES
from tests.hf_folders import CLASSIFIER, LABELS, TINY
from tests.refusals import refused

LLAMA3_ROPE = {
    "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}  # fmt: skip
COMMON = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "initializer_range": 0.02,
    "use_cache": True, "rms_norm_eps": 1e-05, "bos_token_id": 1, "eos_token_id": 2, "torch_dtype": "bfloat16",
    "tie_word_embeddings": False,
}  # fmt: skip
# As on the hub, and what they mean.
REAL = {
    "Llama-2-7b-chat": (
        COMMON | {
            "_name_or_path": "meta-llama/Llama-2-7b-chat-hf", "hidden_size": 4096, "intermediate_size": 11008,
            "max_position_embeddings": 4096, "num_attention_heads": 32, "num_hidden_layers": 32,
            "num_key_value_heads": 32, "pretraining_tp": 1, "rope_scaling": None, "torch_dtype": "float16",
            "transformers_version": "4.32.0.dev0", "vocab_size": 32000,
        },
        {"num_kv_heads": 32, "head_dim": 128, "rope_theta": 10000.0, "rope_scaling": RopeScaling()},
    ),
    "Llama-1-7b": (
        COMMON | {
            "hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32, "num_hidden_layers": 32,
            "rms_norm_eps": 1e-06, "max_sequence_length": 2048, "pad_token_id": 0, "vocab_size": 32000,
            "torch_dtype": "float16", "transformers_version": "4.28.0.dev0",
        },
        {"num_kv_heads": 32, "max_position_embeddings": 2048, "rms_norm_eps": 1e-6},
    ),
    "Meta-Llama-3-8B": (
        COMMON | {
            "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 128000, "eos_token_id": 128001,
            "hidden_size": 4096, "intermediate_size": 14336, "max_position_embeddings": 8192,
            "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8, "pretraining_tp": 1,
            "rope_scaling": None, "rope_theta": 500000.0, "transformers_version": "4.40.0.dev0", "vocab_size": 128256,
        },
        {"num_kv_heads": 8, "rope_theta": 5e5, "rope_scaling": RopeScaling()},
    ),
    "Llama-3.1-8B-Instruct": (
        COMMON | {
            "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 128000,
            "eos_token_id": [128001, 128008, 128009], "hidden_size": 4096, "intermediate_size": 14336,
            "max_position_embeddings": 131072, "mlp_bias": False, "num_attention_heads": 32, "num_hidden_layers": 32,
            "num_key_value_heads": 8, "pretraining_tp": 1, "rope_scaling": LLAMA3_ROPE, "rope_theta": 500000.0,
            "transformers_version": "4.42.3", "vocab_size": 128256,
        },
        {"rope_scaling": RopeScaling(8.0, 1.0, 4.0, 8192), "rope_theta": 5e5, "tie_word_embeddings": False},
    ),
    "Llama-3.2-1B": (
        COMMON | {
            "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 128000, "eos_token_id": 128001,
            "head_dim": 64, "hidden_size": 2048, "intermediate_size": 8192, "max_position_embeddings": 131072,
            "mlp_bias": False, "num_attention_heads": 32, "num_hidden_layers": 16, "num_key_value_heads": 8,
            "pretraining_tp": 1, "rope_scaling": LLAMA3_ROPE | {"factor": 32.0}, "rope_theta": 500000.0,
            "tie_word_embeddings": True, "transformers_version": "4.45.0.dev0", "vocab_size": 128256,
        },
        {"head_dim": 64, "rope_scaling": RopeScaling(32.0), "tie_word_embeddings": True},
    ),
    "Llama-3.2-1B, saved by transformers 5": (
        {key: value for key, value in COMMON.items() if key != "torch_dtype"} | {
            "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 128000, "dtype": "bfloat16",
            "eos_token_id": 128001, "head_dim": 64, "hidden_size": 2048, "intermediate_size": 8192,
            "max_position_embeddings": 131072, "mlp_bias": False, "num_attention_heads": 32, "num_hidden_layers": 16,
            "num_key_value_heads": 8, "pad_token_id": None, "pretraining_tp": 1,
            "rope_parameters": LLAMA3_ROPE | {"factor": 32.0, "rope_theta": 500000.0}, "tie_word_embeddings": True,
            "transformers_version": "5.24.0", "vocab_size": 128256,
        },
        {"head_dim": 64, "rope_scaling": RopeScaling(32.0), "rope_theta": 5e5},
    ),
    "TinyLlama-1.1B-Chat-v1.0": (
        COMMON | {
            "attention_bias": False, "hidden_size": 2048, "intermediate_size": 5632, "max_position_embeddings": 2048,
            "num_attention_heads": 32, "num_hidden_layers": 22, "num_key_value_heads": 4, "pretraining_tp": 1,
            "rope_scaling": None, "rope_theta": 10000.0, "transformers_version": "4.35.0", "vocab_size": 32000,
        },
        {"num_kv_heads": 4, "head_dim": 64},
    ),
    "SmolLM2-135M-Instruct": (
        COMMON | {
            "attention_bias": False, "attention_dropout": 0.0, "hidden_size": 576,
            "initializer_range": 0.041666666666666664, "intermediate_size": 1536, "is_llama_config": True,
            "max_position_embeddings": 8192, "mlp_bias": False, "num_attention_heads": 9, "num_hidden_layers": 30,
            "num_key_value_heads": 3, "pad_token_id": 2, "pretraining_tp": 1, "rope_interleaved": False,
            "rope_scaling": None, "rope_theta": 100000, "tie_word_embeddings": True,
            "transformers_version": "4.42.3", "vocab_size": 49152,
            "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16", "fp16": "float16"}},
        },
        {"head_dim": 64, "rope_theta": 1e5, "tie_word_embeddings": True, "initializer_range": 0.041666666666666664},
    ),
    "Mistral-7B-v0.2": (
        COMMON | {
            "architectures": ["MistralForCausalLM"], "attention_dropout": 0.0, "hidden_size": 4096,
            "intermediate_size": 14336, "max_position_embeddings": 32768, "model_type": "mistral",
            "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8, "rope_theta": 1000000.0,
            "sliding_window": None, "transformers_version": "4.36.0", "vocab_size": 32000,
        },
        {"num_kv_heads": 8, "rope_theta": 1e6, "max_position_embeddings": 32768},
    ),
    "Mistral-7B-v0.3": (
        COMMON | {
            "architectures": ["MistralForCausalLM"], "attention_dropout": 0.0, "hidden_size": 4096, "head_dim": 128,
            "intermediate_size": 14336, "max_position_embeddings": 32768, "model_type": "mistral",
            "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8, "rope_theta": 1000000.0,
            "sliding_window": None, "transformers_version": "4.42.0.dev0", "vocab_size": 32768,
        },
        {"vocab_size": 32768, "head_dim": 128, "window": 0},
    ),
    "Mistral-7B-v0.1": (
        COMMON | {
            "architectures": ["MistralForCausalLM"], "hidden_size": 4096, "intermediate_size": 14336,
            "max_position_embeddings": 32768, "model_type": "mistral", "num_attention_heads": 32,
            "num_hidden_layers": 32, "num_key_value_heads": 8, "rope_theta": 10000.0, "sliding_window": 4096,
            "transformers_version": "4.34.0.dev0", "vocab_size": 32000,
        },
        {"window": 4096, "family": "mistral"},
    ),
    "Qwen2.5-0.5B-Instruct": (
        COMMON | {
            "architectures": ["Qwen2ForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 151643,
            "eos_token_id": 151645, "hidden_size": 896, "intermediate_size": 4864, "max_position_embeddings": 32768,
            "max_window_layers": 21, "model_type": "qwen2", "num_attention_heads": 14, "num_hidden_layers": 24,
            "num_key_value_heads": 2, "rms_norm_eps": 1e-06, "rope_theta": 1000000.0, "sliding_window": 32768,
            "tie_word_embeddings": True, "torch_dtype": "bfloat16", "transformers_version": "4.43.1",
            "use_sliding_window": False, "vocab_size": 151936,
        },
        {"biased": ("q", "k", "v"), "window": 0, "head_dim": 64, "tie_word_embeddings": True},
    ),
    "Qwen3-0.6B": (
        COMMON | {
            "architectures": ["Qwen3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
            "bos_token_id": 151643, "eos_token_id": 151645, "head_dim": 128, "hidden_size": 1024,
            "intermediate_size": 3072, "max_position_embeddings": 40960, "max_window_layers": 28,
            "model_type": "qwen3", "num_attention_heads": 16, "num_hidden_layers": 28, "num_key_value_heads": 8,
            "rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 1000000, "sliding_window": None,
            "tie_word_embeddings": True, "torch_dtype": "bfloat16", "transformers_version": "4.51.0",
            "use_sliding_window": False, "vocab_size": 151936,
        },
        {"qk_norm": True, "biased": (), "head_dim": 128},
    ),
}  # fmt: skip


@pytest.mark.short
@pytest.mark.parametrize("name", REAL)
def test_real_configs(name):
    """Read as they are meant, and written so that they are read as the same model."""
    raw, meant = REAL[name]
    config = parse_config(raw)
    assert config.architecture == "LlamaForCausalLM"
    assert config.dtype == raw.get("torch_dtype", "bfloat16")
    assert {key: getattr(config.model, key) for key in meant} == meant
    written = json.loads(json.dumps(write_config(config)))
    again = parse_config(written)
    assert again == dataclasses.replace(config, raw=written)
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        assert written.get(key) == raw.get(key)


@pytest.mark.parity
@pytest.mark.parametrize("name", REAL)
def test_transformers_reads_what_we_write(name):
    """Source and export are the same to transformers, field by field."""
    import transformers

    raw = REAL[name][0]
    theirs = getattr(transformers, FAMILIES[raw["model_type"]].prefix + "Config")
    source, export = theirs.from_dict(dict(raw)), theirs.from_dict(write_config(parse_config(raw)))
    assert export.architectures == source.architectures
    fields = (
        "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
        "num_key_value_heads", "hidden_act", "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings",
        "rope_parameters", "bos_token_id", "eos_token_id", "dtype",
    )  # fmt: skip
    assert {f: getattr(export, f) for f in fields} == {f: getattr(source, f) for f in fields}
    head_dim = getattr(source, "head_dim", None) or source.hidden_size // source.num_attention_heads
    assert export.head_dim == head_dim
    # Our own defaults for absent keys are theirs.
    ours = parse_config(raw).model
    assert ours.num_kv_heads == source.num_key_value_heads
    assert ours.rope_theta == source.rope_parameters["rope_theta"]


@pytest.mark.parity
def test_absent_keys_mean_what_they_mean_to_transformers():
    import transformers

    least = {key: TINY[key] for key in ("vocab_size", "hidden_size", "intermediate_size")}
    least |= {"num_hidden_layers": 2, "num_attention_heads": 32, "hidden_size": 128}  # Qwen's default has 32 kv heads
    for kind, family in FAMILIES.items():
        theirs = getattr(transformers, family.prefix + "Config")(**least)
        ours = parse_config(least | {"model_type": kind}).model
        assert ours.window == (getattr(theirs, "sliding_window", None) or 0)
        for name, their_name in (
            ("num_kv_heads", "num_key_value_heads"), ("max_position_embeddings", None), ("rms_norm_eps", None),
            ("tie_word_embeddings", None), ("initializer_range", None),
        ):  # fmt: skip
            assert getattr(ours, name) == getattr(theirs, their_name or name), (kind, name)


def test_a_classifier():
    config = parse_config(TINY | CLASSIFIER)
    assert config.labels == LABELS
    written = write_config(config)
    assert written["num_labels"] == 5
    assert written["problem_type"] == "regression"
    assert written["pad_token_id"] == 0
    assert written["label2id"]["verbosity"] == 4
    assert parse_config(TINY | {"architectures": ["LlamaForSequenceClassification"]}).labels == ("LABEL_0", "LABEL_1")


# What changes in a good file, and the key and value that the error names.
REFUSED = [
    ({"model_type": "gemma2"}, "model_type 'gemma2'"),
    ({"model_type": ["llama"]}, "model_type ['llama']"),
    ({"architectures": ["LlamaForQuestionAnswering"]}, "architectures ['LlamaForQuestionAnswering']"),
    ({"architectures": "LlamaForCausalLM"}, "architectures 'LlamaForCausalLM'"),
    ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
    ({"pretraining_tp": 2}, "pretraining_tp 2"),
    ({"quantization_config": {"bits": 4}}, "quantization_config {'bits': 4}"),
    ({"rope_interleaved": True}, "rope_interleaved True"),
    ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_type 'linear'"),
    ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "rope_type 'dynamic'"),
    ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "rope_theta": 1e4}}, "rope_type 'yarn'"),
    ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "rope_type 'llama3' high_freq_factor"),
    ({"rope_scaling": LLAMA3_ROPE | {"mscale": 1.0}}, "rope_type 'llama3' mscale"),
    ({"rope_scaling": LLAMA3_ROPE | {"factor": "8"}}, "rope_scaling.factor '8'"),
    ({"rope_scaling": LLAMA3_ROPE | {"factor": 0}}, "rope_scaling.factor 0"),
    ({"rope_scaling": {"factor": 8.0}}, "rope_type 'default' factor"),
    ({"rope_scaling": [8.0]}, "rope_scaling [8.0]"),
    ({"rope_theta": "1e4"}, "rope_theta '1e4'"),
    ({"rope_theta": 1e4, "rope_parameters": {"rope_theta": 5e5}}, "rope_theta 500000.0 10000.0"),
    ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor 0.5"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
    ({"logit_scale": 0.5}, "'logit_scale' 0.5"),
    ({"auto_map": {"AutoModel": "x.Y"}}, "'auto_map'"),
    ({"torch_dtype": "float64"}, "dtype 'float64'"),
    ({"hidden_size": None}, "hidden_size None"),
    ({"hidden_size": 0}, "hidden_size 0"),
    ({"num_hidden_layers": "3"}, "num_hidden_layers '3'"),
    ({"num_hidden_layers": 3.0}, "num_hidden_layers 3.0"),
    ({"num_hidden_layers": 10**30}, f"num_hidden_layers {10**30}"),
    ({"vocab_size": True}, "vocab_size True"),
    ({"rms_norm_eps": -1.0}, "rms_norm_eps -1.0"),
    ({"rms_norm_eps": float("inf")}, "rms_norm_eps inf"),
    ({"tie_word_embeddings": "yes"}, "tie_word_embeddings 'yes'"),
    ({"num_key_value_heads": 3}, "num_kv_heads 3"),
    (CLASSIFIER | {"id2label": {"0": "a", "2": "b"}}, "id2label ['0', '2']"),
    (CLASSIFIER | {"id2label": {}}, "id2label []"),
    (CLASSIFIER | {"id2label": ["a"]}, "id2label ['a']"),
    (CLASSIFIER | {"id2label": {"0": 1}}, "id2label.0 1"),
    (CLASSIFIER | {"id2label": None, "num_labels": 10**30}, f"num_labels {10**30}"),
    (CLASSIFIER | {"num_labels": 0}, "num_labels 0"),
]


@pytest.mark.parametrize(("change", "said"), REFUSED, ids=lambda value: None)
def test_refused(change, said, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(TINY | change))
    with refused(ModelError, str(tmp_path / "config.json"), *said.split()):
        read_config(tmp_path)


@pytest.mark.parametrize("key", ["vocab_size", "hidden_size", "num_attention_heads"])
def test_a_key_without_a_default(key):
    with refused(ModelError, f"config.json.{key}"):
        parse_config({name: value for name, value in TINY.items() if name != key})


@pytest.mark.parametrize("names", [("LABEL_0", "LABEL_1"), ("score",), ("Schreibstil, 1-5", "", "%")])
def test_labels_may_be_called_anything(names):
    labels = {"id2label": {str(i): name for i, name in enumerate(names)}, "num_labels": len(names)}
    config = parse_config(TINY | CLASSIFIER | labels)
    assert config.labels == names
    assert parse_config(write_config(config)).labels == names


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("Mistral-7B-v0.2", {"attention_bias": True}),
        ("Mistral-7B-v0.2", {"mlp_bias": True}),
        ("Qwen2.5-0.5B-Instruct", {"use_sliding_window": True}),
        ("Qwen2.5-0.5B-Instruct", {"attention_bias": True}),
        ("Qwen3-0.6B", {"use_sliding_window": True}),
        ("Qwen3-0.6B", {"architectures": ["Qwen2ForCausalLM"]}),
    ],
)
def test_what_a_family_has_not(name, change):
    ((key, value),) = change.items()
    with refused(ModelError, "config.json", key, str(value)):
        parse_config(REAL[name][0] | change)


def test_a_window_that_no_config_would_say():
    with refused(ConfigError, "model.window is 8"):
        LlamaConfig(window=8)


def test_config_files_that_cannot_be_read(tmp_path):
    file = tmp_path / "config.json"
    for text in (None, "{", "[]", "[" * 100_000, b"\xff"):
        if text is not None:
            file.write_bytes(text if isinstance(text, bytes) else text.encode())
        with refused(ModelError, str(file)):
            read_config(tmp_path)


def test_our_default_model_can_be_written():
    """A model that was trained from nothing."""
    model = LlamaConfig(vocab_size=4096, rope_scaling=RopeScaling(2.0, 1.0, 4.0, 256))
    config = dataclasses.replace(parse_config(TINY), model=model)
    assert parse_config(write_config(config)).model == model
