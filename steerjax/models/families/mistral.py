"""Mistral 7B: Llama with a sliding window (v0.1) or without (v0.2 and later)."""

from typing import Literal

import pydantic.dataclasses

from steerjax.models.families.family import Family, Keys
from steerjax.typed import STRICT, Number, Positive


@pydantic.dataclasses.dataclass(frozen=True, config=STRICT)
class MistralKeys(Keys):
    num_key_value_heads: Number | None = 8
    max_position_embeddings: Positive = 131072
    attention_bias: Literal[False] = False
    mlp_bias: Literal[False] = False
    sliding_window: Positive | None = 4096


MISTRAL = Family("mistral", "Mistral", MistralKeys)
