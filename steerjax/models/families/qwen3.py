"""Qwen 3, dense: queries and keys are normed a head at a time; nothing has a bias."""

from typing import Literal

import pydantic.dataclasses

from steerjax.models.families.family import Family, Keys
from steerjax.models.families.qwen2 import NO_WINDOW, WINDOW_KEYS
from steerjax.typed import STRICT, Number, Positive, Size


@pydantic.dataclasses.dataclass(frozen=True, config=STRICT)
class Qwen3Keys(Keys):
    num_key_value_heads: Number | None = 32
    head_dim: Size | None = 128
    max_position_embeddings: Positive = 32768
    mlp_bias: Literal[False] = False


QWEN3 = Family("qwen3", "Qwen3", Qwen3Keys, qk_norm=True, required=NO_WINDOW, harmless=WINDOW_KEYS)
