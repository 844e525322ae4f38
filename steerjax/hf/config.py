"""`config.json` of a Hugging Face folder, read strictly and written for transformers 4 and 5, vLLM and SGLang.

What it says is taken, required to have the one value that we compute, or known not to change the function. Any other
key is refused, as it may mean another model.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from steerjax.errors import ConfigError, ModelError
from steerjax.hf.keys import BARE, CAUSAL_LM, CLASSIFIER
from steerjax.models.config import LlamaConfig, RopeScaling

DTYPES = ("float32", "bfloat16", "float16")

# theirs -> ours, and the value where the key is absent (None: it must be there). Defaults of transformers' LlamaConfig.
_FIELDS: dict[str, tuple[str, Any]] = {
    "vocab_size": ("vocab_size", None),
    "hidden_size": ("hidden_size", None),
    "intermediate_size": ("intermediate_size", None),
    "num_hidden_layers": ("num_layers", None),
    "num_attention_heads": ("num_heads", None),
    "num_key_value_heads": ("num_kv_heads", 0),
    "head_dim": ("head_dim", 0),
    "max_position_embeddings": ("max_position_embeddings", 2048),
    "rms_norm_eps": ("rms_norm_eps", 1e-6),
    "tie_word_embeddings": ("tie_word_embeddings", False),
    "attention_bias": ("attention_bias", False),
    "mlp_bias": ("mlp_bias", False),
    "initializer_range": ("initializer_range", 0.02),
}
# Where MistralConfig's defaults are others.
_MISTRAL = {"num_key_value_heads": 8, "max_position_embeddings": 131072, "sliding_window": 4096}
_ARCHITECTURES = {
    CAUSAL_LM: CAUSAL_LM, CLASSIFIER: CLASSIFIER, BARE: BARE, "MistralForCausalLM": CAUSAL_LM,
    "MistralForSequenceClassification": CLASSIFIER, "MistralModel": BARE,
}  # fmt: skip
# Only these values are what we compute.
_REQUIRED: dict[str, tuple] = {
    "hidden_act": ("silu", "swish"),
    "pretraining_tp": (1,),
    "quantization_config": (None,),
    "rope_interleaved": (False,),
    "is_llama_config": (True,),
    "partial_rotary_factor": (1, None),
    "is_encoder_decoder": (False,),
    "add_cross_attention": (False,),
    "cross_attention_hidden_size": (None,),
    "tie_encoder_decoder": (False,),
    "pruned_heads": ({}, None),
    "use_bidirectional_attention": (False, None),
    "is_causal": (True,),
}
# Known not to change what the network computes.
_READ_ELSEWHERE = {
    "architectures", "model_type", "torch_dtype", "dtype", "rope_theta", "rope_scaling", "rope_parameters",
    "sliding_window", "id2label", "label2id", "num_labels", "problem_type",
    "bos_token_id", "eos_token_id", "pad_token_id",
}  # fmt: skip
_HARMLESS = {
    # who wrote the file, and how it is loaded or cached
    "_name_or_path", "_commit_hash", "name_or_path", "transformers_version", "use_cache", "cache_implementation",
    "tokenizer_class", "max_sequence_length", "transformers.js_config", "unsloth_fixed", "unsloth_version",
    "_attn_implementation", "_attn_implementation_autoset", "attn_implementation", "_flash_attn_2_enabled",
    "torchscript", "use_bfloat16", "use_flash_attn", "tf_legacy_loss", "chunk_size_feed_forward",
    # what a forward pass returns, and in what form
    "return_dict", "return_dict_in_generate", "output_attentions", "output_hidden_states", "output_scores",
    # training only; we train and run without dropout
    "attention_dropout", "hidden_dropout", "resid_pdrop", "classifier_dropout", "gradient_checkpointing",
    # generation and tasks, which older versions kept here
    "is_decoder", "decoder_start_token_id", "forced_bos_token_id", "forced_eos_token_id", "sep_token_id",
    "unk_token_id", "prefix", "suppress_tokens", "begin_suppress_tokens", "bad_words_ids", "do_sample",
    "early_stopping", "num_beams", "num_beam_groups", "diversity_penalty", "temperature", "top_k", "top_p", "typical_p",
    "repetition_penalty", "length_penalty", "no_repeat_ngram_size", "encoder_no_repeat_ngram_size",
    "exponential_decay_length_penalty", "remove_invalid_values", "max_length", "min_length", "num_return_sequences",
    "finetuning_task", "task_specific_params",
}  # fmt: skip


@dataclass(frozen=True)
class HuggingFaceConfig:
    """A `config.json`.

    Attributes:
        model: our architecture.
        architecture: LlamaForCausalLM, LlamaForSequenceClassification or LlamaModel; Mistral's are read as Llama's.
        labels: names of a classifier's outputs in order, else ().
        dtype: of the stored weights, as the file says: float32, bfloat16 or float16.
        raw: the file as it stands.
    """

    model: LlamaConfig
    architecture: str
    labels: tuple[str, ...]
    dtype: str
    raw: Mapping[str, Any]


def read_config(folder: Path) -> HuggingFaceConfig:
    """Reads `folder/config.json`.

    Raises:
        ModelError: no such file, or a key that we do not implement; names the key.
    """
    file = folder / "config.json"
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(f"'{folder}' has no config.json\n  cure: give a whole Hugging Face folder") from None
    except (OSError, ValueError) as error:
        raise ModelError(f"'{file}' cannot be read ({error})\n  cure: download it again") from None
    try:
        return parse_config(raw)
    except (ModelError, ConfigError) as error:
        raise ModelError(f"'{file}': {error}") from None


def parse_config(raw: Mapping[str, Any]) -> HuggingFaceConfig:
    """The config of a parsed `config.json`; see `read_config`."""
    if not isinstance(raw, Mapping):
        raise ModelError("is no JSON object; cure: download it again")
    kind = raw.get("model_type")
    if kind not in ("llama", "mistral"):
        raise ModelError(f"model_type {kind!r} is not implemented; cure: a Llama, or a Mistral that is one")
    defaults = _MISTRAL if kind == "mistral" else {}
    _check_keys(raw)
    if kind == "mistral":
        _check_mistral(raw, defaults)
    fields = {}
    for theirs, (ours, default) in _FIELDS.items():
        value = raw.get(theirs, defaults.get(theirs, default))
        fields[ours] = _typed(theirs, default if value is None else value, default)
    theta, scaling = _rope(raw)
    architecture = _architecture(raw)
    return HuggingFaceConfig(
        model=LlamaConfig(**fields, rope_theta=theta, rope_scaling=scaling),
        architecture=architecture,
        labels=_labels(raw) if architecture == CLASSIFIER else (),
        dtype=_dtype(raw),
        raw=raw,
    )


def write_config(config: HuggingFaceConfig) -> dict[str, Any]:
    """The `config.json` of an export; the inverse of `parse_config`.

    Keys are the older ones (`rope_theta`, `rope_scaling`, `torch_dtype`), which transformers 5 reads too. Token ids and
    `problem_type` are taken from `config.raw`.
    """
    model, scaling = config.model, config.model.rope_scaling
    written = {"architectures": [config.architecture], "model_type": "llama", "hidden_act": "silu"}
    written |= {theirs: getattr(model, ours) for theirs, (ours, _) in _FIELDS.items()}
    written["rope_theta"] = model.rope_theta
    written["rope_scaling"] = None
    if scaling.factor != 1:
        written["rope_scaling"] = {
            "rope_type": "llama3",
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_max_position_embeddings,
        }
    written |= {"torch_dtype": config.dtype, "use_cache": True}
    kept = ("bos_token_id", "eos_token_id", "pad_token_id", *(("problem_type",) if config.labels else ()))
    written |= {key: config.raw[key] for key in kept if config.raw.get(key) is not None}
    if config.labels:
        written["num_labels"] = len(config.labels)
        written["id2label"] = {str(i): label for i, label in enumerate(config.labels)}
        written["label2id"] = {label: i for i, label in enumerate(config.labels)}
    return written


def _check_keys(raw: Mapping) -> None:
    for key, value in raw.items():
        if key in _REQUIRED:
            if value not in _REQUIRED[key]:
                raise ModelError(f"{key} {value!r} is not implemented; cure: a model with {_REQUIRED[key][0]!r}")
        elif key not in _FIELDS and key not in _READ_ELSEWHERE and key not in _HARMLESS:
            raise ModelError(
                f"unknown key {key!r} ({value!r}), which may mean another computation; "
                "cure: remove it from the file if it does not change what the model computes"
            )


def _check_mistral(raw: Mapping, defaults: Mapping) -> None:
    window = raw.get("sliding_window", defaults["sliding_window"])  # transformers' value where the key is absent
    longest = raw.get("max_position_embeddings", defaults["max_position_embeddings"])
    if window is not None and window < longest:
        raise ModelError(
            f"sliding_window {window} is less than max_position_embeddings {longest} (absent, it is 4096); "
            "sliding window attention is not implemented; "
            "cure: a model without one (Mistral 7B v0.2 and later), or max_position_embeddings no longer than it"
        )
    for key in ("attention_bias", "mlp_bias"):
        if raw.get(key):
            raise ModelError(f"{key} in a Mistral is not implemented; cure: a model without biases")


def _typed(key: str, value: Any, default: Any) -> Any:
    """`value` as the type of the key's default, a whole number where there is none."""
    kind = int if default is None else type(default)
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind:
        said = "is missing" if value is None else f"is {value!r}"
        raise ModelError(f"{key} {said}; cure: a value of type {kind.__name__}")
    return value


def _rope(raw: Mapping) -> tuple[float, RopeScaling]:
    """Base and scaling, from the old keys (`rope_theta`, `rope_scaling`) and the new one (`rope_parameters`)."""
    settings: dict[str, Any] = {}
    sources = {
        "rope_theta": {"rope_theta": raw["rope_theta"]} if raw.get("rope_theta") is not None else {},
        "rope_scaling": raw.get("rope_scaling") or {},
        "rope_parameters": raw.get("rope_parameters") or {},
    }
    for source, values in sources.items():
        for key, value in values.items():
            key = "rope_type" if key == "type" else key
            if settings.setdefault(key, value) != value:
                raise ModelError(f"{source}: {key} is {value!r}, and {settings[key]!r} elsewhere; cure: one value")
    theta = _typed("rope_theta", settings.pop("rope_theta", 10_000.0), 0.0)
    kind = settings.pop("rope_type", "default")
    if kind not in ("default", "llama3"):
        raise ModelError(f"rope_type {kind!r} is not implemented; cure: a model with 'default' or 'llama3'")
    if settings.pop("partial_rotary_factor", 1) != 1:
        raise ModelError("partial_rotary_factor is not implemented; cure: a model that turns whole heads")
    if kind == "default":
        settings.pop("original_max_position_embeddings", None)  # without scaling it says nothing
    names = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    expected = names if kind == "llama3" else ()
    if wrong := settings.keys() ^ set(expected):
        key = min(wrong)
        raise ModelError(
            f"rope_type {kind!r} {'has no' if key in settings else 'needs'} {key}; cure: correct the RoPE settings"
        )
    if kind == "default":
        return theta, RopeScaling()
    *factors, original = (settings[name] for name in names)
    factors = [_typed(name, value, 0.0) for name, value in zip(names, factors, strict=False)]
    return theta, RopeScaling(*factors, _typed(names[-1], original, None))


def _architecture(raw: Mapping) -> str:
    names = raw.get("architectures") or [CAUSAL_LM]
    if len(names) != 1 or names[0] not in _ARCHITECTURES:
        raise ModelError(f"architectures {names} is not implemented; cure: one of {', '.join(_ARCHITECTURES)}")
    return _ARCHITECTURES[names[0]]


def _labels(raw: Mapping) -> tuple[str, ...]:
    names = raw.get("id2label")
    if names is None:
        return tuple(f"LABEL_{i}" for i in range(raw.get("num_labels", 2)))  # transformers' defaults
    if sorted(names) != sorted(map(str, range(len(names)))):
        raise ModelError(f"id2label has the keys {sorted(names)}; cure: number the labels from 0")
    return tuple(names[str(i)] for i in range(len(names)))


def _dtype(raw: Mapping) -> str:
    found = raw.get("dtype") or raw.get("torch_dtype") or "float32"
    name = str(found).removeprefix("torch.")
    if name not in DTYPES:
        raise ModelError(f"dtype {found!r} is not implemented; cure: weights in one of {', '.join(DTYPES)}")
    return name
