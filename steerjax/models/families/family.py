"""What a family of models says of itself: how its `config.json` reads, and where it differs from Llama. No jax."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pydantic.dataclasses

from steerjax.typed import STRICT, Number, Positive, Size


@pydantic.dataclasses.dataclass(frozen=True, config=STRICT)
class Keys:
    """What is read of a `config.json`, under transformers' names and with Llama's defaults there.

    null is what follows from the others. Each is a field of `LlamaConfig` (hf/config_json.py has the names).
    """

    vocab_size: Size
    hidden_size: Size
    intermediate_size: Size
    num_hidden_layers: Number
    num_attention_heads: Number
    num_key_value_heads: Number | None = None
    head_dim: Size | None = None
    max_position_embeddings: Positive = 2048
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    initializer_range: float = 0.02


@dataclass(frozen=True)
class Family:
    """A family with Llama's mathematics but for what stands here.

    Attributes:
        name: `model_type`. prefix: of its classes in transformers.
        keys: its `config.json`.
        biased: projections that always have a bias (those that a config turns on: `LlamaConfig.biased`).
        qk_norm: queries and keys of each head go through an RMSNorm before RoPE.
        required: more keys, with the values of them that we compute; harmless: more that change nothing.
    """

    name: str
    prefix: str
    keys: type[Keys] = Keys
    biased: tuple[str, ...] = ()
    qk_norm: bool = False
    required: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    harmless: tuple[str, ...] = ()
