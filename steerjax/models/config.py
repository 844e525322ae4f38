"""The architecture of a Llama as frozen data. No jax here: commands read it before they pay for the import."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

from steerjax.errors import ConfigError


@dataclass(frozen=True)
class RopeScaling:
    """Llama 3.1's `rope_type: llama3`. `factor` 1 is plain RoPE; 8 is Llama 3.1, 32 is Llama 3.2 1B and 3B."""

    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192


@dataclass(frozen=True)
class LlamaConfig:
    """Llama 1, 2, 3, 3.1, 3.2, TinyLlama, SmolLM2. Field names are Hugging Face's.

    `head_dim` 0 stands for `hidden_size // num_heads`, `num_kv_heads` 0 for `num_heads`, `vocab_size` 0 for the
    tokenizer's (filled in when the experiment is resolved).
    """

    vocab_size: int = 0
    hidden_size: int = 256
    intermediate_size: int = 768
    num_layers: int = 4
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 0
    max_position_embeddings: int = 4096
    rope_theta: float = 10_000.0
    rope_scaling: RopeScaling = RopeScaling()
    rms_norm_eps: float = 1e-5
    tie_word_embeddings: bool = True
    attention_bias: bool = False
    mlp_bias: bool = False
    initializer_range: float = 0.02

    def __post_init__(self):
        object.__setattr__(self, "num_kv_heads", self.num_kv_heads or self.num_heads)
        object.__setattr__(self, "head_dim", self.head_dim or self.hidden_size // self.num_heads)
        for name in ("hidden_size", "intermediate_size", "num_layers", "num_heads", "head_dim"):
            if getattr(self, name) < 1:
                raise ConfigError(f"model.{name} is {getattr(self, name)}; cure: a whole number of at least 1")
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(
                f"model.num_heads {self.num_heads} is not a multiple of model.num_kv_heads {self.num_kv_heads}; "
                "cure: every key-value head serves the same number of query heads"
            )
        if self.head_dim % 2:
            raise ConfigError(f"model.head_dim is {self.head_dim}; cure: an even number, RoPE turns pairs")

    @classmethod
    def from_json(cls, values: Mapping) -> LlamaConfig:
        """The inverse of `dataclasses.asdict`; other keys are ignored."""
        fields = {f.name: values[f.name] for f in dataclasses.fields(LlamaConfig)}
        return LlamaConfig(**fields | {"rope_scaling": RopeScaling(**values["rope_scaling"])})

    @property
    def block_parameters(self) -> int:
        """Parameters in the matrices of one layer (what a token is multiplied with, biases and norms left out)."""
        attention = 2 * self.hidden_size * self.head_dim * (self.num_heads + self.num_kv_heads)
        return attention + 3 * self.hidden_size * self.intermediate_size
