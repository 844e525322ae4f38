"""`config.json` of a Hugging Face folder, read strictly and written for transformers 4 and 5, vLLM and SGLang.

A key is taken, required to have the one value that we compute, or known not to change the function. Any other is
refused, as it may mean another model. What a family has of its own is in models/families.
"""

import dataclasses
import fnmatch
import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import pydantic
from pydantic import Field

from steerjax.errors import ConfigError, ModelError
from steerjax.hf.keys import BARE, CAUSAL_LM, CLASSIFIER
from steerjax.models.config import LlamaConfig, RopeScaling
from steerjax.models.families import FAMILIES
from steerjax.typed import STRICT, Number, read_json, typed

DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}  # safetensors' names, and ours


# What is said of the folder rather than of the network.
@pydantic.dataclasses.dataclass(frozen=True, config=STRICT)
class _Folder:
    architectures: list[str] | None = None
    dtype: str | None = None
    torch_dtype: str | None = None
    num_labels: Number | None = None
    id2label: Annotated[dict[str, str], Field(max_length=10_000)] | None = None


_OUR_NAMES = {
    "num_hidden_layers": "num_layers", "num_attention_heads": "num_heads", "num_key_value_heads": "num_kv_heads",
    "sliding_window": "window",
}  # fmt: skip
_SCALING = {field.name for field in dataclasses.fields(RopeScaling)}  # what rope_type llama3 needs, under our names
# The values that are the only ones we compute.
_REQUIRED: dict[str, tuple] = {
    "hidden_act": ("silu", "swish"), "pretraining_tp": (1,), "quantization_config": (None,), "is_causal": (True,),
    "rope_interleaved": (False,), "is_llama_config": (True,), "partial_rotary_factor": (1, None),
    "use_bidirectional_attention": (False, None),
}  # fmt: skip
# Read elsewhere, or known not to change what a Llama computes.
_HARMLESS = (
    "model_type", "rope_theta", "rope_scaling", "rope_parameters", "sliding_window", "label2id", "problem_type",
    "*_token_id", "*name_or_path", "_commit_hash", "transformers*", "unsloth_*", "tokenizer_class",
    "max_sequence_length", "*attn_implementation*", "*flash_att*", "use_cache", "cache_implementation", "use_bfloat16",
    "torchscript", "tf_legacy_loss", "chunk_size_feed_forward", "gradient_checkpointing", "*dropout", "resid_pdrop",
    "return_dict*", "output_attentions", "output_hidden_states", "output_scores", "do_sample", "temperature", "top_?",
    "typical_p", "early_stopping", "num_beam*", "num_return_sequences", "m??_length", "*_penalty", "*ngram_size",
    "*suppress_tokens", "bad_words_ids", "remove_invalid_values", "finetuning_task", "task_specific_params", "prefix",
    "is_decoder", "*encoder_decoder", "*cross_attention*", "pruned_heads",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class HuggingFaceConfig:
    """A `config.json`."""

    model: LlamaConfig
    architecture: str  # CAUSAL_LM, CLASSIFIER or BARE, whatever the family
    labels: tuple[str, ...]  # what a classifier calls its outputs, in order (any names), else ()
    dtype: str  # of the stored weights, as the file says
    raw: Mapping[str, Any]  # the file as it stands


def read_config(folder: Path) -> HuggingFaceConfig:
    """`folder/config.json`. Raises ModelError: no such file, or a key that we do not implement; names the key."""
    file = folder / "config.json"
    raw = read_json(dict[str, Any], file, ModelError, "a whole Hugging Face folder; download it again")
    return parse_config(raw, str(file))


def parse_config(raw: Mapping[str, Any], where: str = "config.json") -> HuggingFaceConfig:
    """`read_config` of what the file holds; `where` stands before the key in messages."""
    kind = raw.get("model_type")
    if kind not in list(FAMILIES):
        raise _not_implemented(where, "model_type", kind, f"a model of {', '.join(FAMILIES)}")
    family = FAMILIES[kind]
    required = _REQUIRED | family.required
    known = (*_names(family.keys), *_names(_Folder), *required, *_HARMLESS, *family.harmless)
    for key, value in raw.items():
        if value not in required.get(key, (value,)):
            raise _not_implemented(where, key, value, f"a model with {required[key][0]!r}")
        if not any(fnmatch.fnmatchcase(key, pattern) for pattern in known):
            cure = "remove it from the file if it does not change what the model computes"
            raise ModelError(f"{where}: unknown key {key!r} ({reprlib.repr(value)}); cure: {cure}")
    values, said = dataclasses.asdict(_typed(family.keys, raw, where)), _typed(_Folder, raw, where)
    # Ours has 0 where theirs has null.
    fields = {_OUR_NAMES.get(key, key): 0 if value is None else value for key, value in values.items()}
    try:
        model = typed(LlamaConfig, fields | _rope(raw, where) | {"family": kind}, where, ModelError)
    except ConfigError as error:
        raise ModelError(f"{where}: {error}") from None
    names = {theirs_name(name, kind): name for name in (CAUSAL_LM, CLASSIFIER, BARE)}
    theirs = said.architectures or [theirs_name(CAUSAL_LM, kind)]
    if len(theirs) != 1 or theirs[0] not in names:
        raise _not_implemented(where, "architectures", said.architectures, f"one of {', '.join(names)}")
    dtype, dtypes = (said.dtype or said.torch_dtype or "float32").removeprefix("torch."), list(DTYPES.values())
    if dtype not in dtypes:
        raise _not_implemented(where, "dtype", dtype, f"weights in {' or '.join(dtypes)}")
    architecture = names[theirs[0]]
    labels = _labels(said, where) if architecture == CLASSIFIER else ()
    return HuggingFaceConfig(model, architecture, labels, dtype, raw)


def theirs_name(architecture: str, family: str) -> str:
    """What transformers calls a family's CAUSAL_LM, CLASSIFIER or BARE."""
    return architecture.replace("Llama", FAMILIES[family].prefix)


def write_config(config: HuggingFaceConfig) -> dict[str, Any]:
    """The inverse of `parse_config`, in the older keys, which transformers 5 reads too.

    Token ids and `problem_type` are those of `config.raw`.
    """
    model, scaling = config.model, config.model.rope_scaling
    names = [theirs_name(config.architecture, model.family)]
    written = {"architectures": names, "model_type": model.family, "hidden_act": "silu"}
    written |= {key: getattr(model, _OUR_NAMES.get(key, key)) for key in _names(FAMILIES[model.family].keys)}
    if "sliding_window" in written:
        written["sliding_window"] = written["sliding_window"] or None
    written |= {key: values[0] for key, values in FAMILIES[model.family].required.items()}
    scaled = {"rope_type": "llama3"} | dataclasses.asdict(scaling)
    written |= {"rope_theta": model.rope_theta, "rope_scaling": scaled if scaling.factor != 1 else None}
    written["torch_dtype"] = config.dtype
    kept = ("bos_token_id", "eos_token_id", "pad_token_id", *(("problem_type",) if config.labels else ()))
    written |= {key: config.raw[key] for key in kept if config.raw.get(key) is not None}
    if config.labels:
        ids = {label: i for i, label in enumerate(config.labels)}
        id2label = {str(i): label for i, label in enumerate(config.labels)}
        written |= {"num_labels": len(config.labels), "id2label": id2label, "label2id": ids}
    return written


def _names(kind: type) -> list[str]:
    return [field.name for field in dataclasses.fields(kind)]


def _typed(kind: type, raw: Mapping, where: str) -> Any:
    return typed(kind, {key: raw[key] for key in _names(kind) if key in raw}, where, ModelError)


def _not_implemented(where: str, key: str, value: Any, cure: str) -> ModelError:
    return ModelError(f"{where}: {key} {reprlib.repr(value)} is not implemented; cure: {cure}")


def _rope(raw: Mapping, where: str) -> dict[str, Any]:
    """Our `rope_theta` and `rope_scaling`, from the old keys of these names and the new one, `rope_parameters`."""
    settings = {} if raw.get("rope_theta") is None else {"rope_theta": raw["rope_theta"]}
    for source in ("rope_scaling", "rope_parameters"):
        for key, value in typed(dict[str, Any], raw.get(source) or {}, f"{where}.{source}", ModelError).items():
            key = "rope_type" if key == "type" else key
            if value is not None and settings.setdefault(key, value) != value:
                raise ModelError(f"{where}: {key} is {value!r}, and {settings[key]!r} elsewhere; cure: one value")
    kind, theta = settings.pop("rope_type", "default"), settings.pop("rope_theta", 10_000.0)
    if kind not in ("default", "llama3"):
        raise _not_implemented(where, "rope_type", kind, "a model with default or llama3")
    if (part := settings.pop("partial_rotary_factor", 1)) != 1:
        raise _not_implemented(where, "partial_rotary_factor", part, "a model that applies RoPE to whole heads")
    if kind == "default":
        settings.pop("original_max_position_embeddings", None)  # without scaling it says nothing
    if wrong := settings.keys() ^ (_SCALING if kind == "llama3" else set()):
        said = "has no" if (key := min(wrong)) in settings else "needs"
        raise ModelError(f"{where}: rope_type {kind!r} {said} {key}; cure: correct the RoPE settings")
    return {"rope_theta": theta, "rope_scaling": settings}


def _labels(said: _Folder, where: str) -> tuple[str, ...]:
    labels = said.id2label
    if labels is None:
        return tuple(f"LABEL_{number}" for number in range(said.num_labels or 2))  # transformers' defaults
    if not labels or labels.keys() != {str(number) for number in range(len(labels))}:
        keys = reprlib.repr(list(labels))
        raise ModelError(f"{where}: id2label has the keys {keys}; cure: number the labels from 0")
    return tuple(labels[str(number)] for number in range(len(labels)))
