"""Qwen 2 and 2.5: queries, keys and values have a bias."""

from typing import Literal

import pydantic.dataclasses

from steerjax.models.families.family import Family, Keys
from steerjax.typed import STRICT, Number, Positive

# Of a model whose layers all see everything, as those up to Qwen3-32B do.
NO_WINDOW = {"use_sliding_window": (False,)}
WINDOW_KEYS = ("sliding_window", "max_window_layers", "layer_types")  # say nothing then


@pydantic.dataclasses.dataclass(frozen=True, config=STRICT)
class Qwen2Keys(Keys):
    num_key_value_heads: Number | None = 32
    max_position_embeddings: Positive = 32768
    attention_bias: Literal[False] = False
    mlp_bias: Literal[False] = False


QWEN2 = Family("qwen2", "Qwen2", Qwen2Keys, biased=("q", "k", "v"), required=NO_WINDOW, harmless=WINDOW_KEYS)
