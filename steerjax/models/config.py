"""What a model is and how it is run, as frozen data, without jax: commands read it before they pay for the import."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Literal

import pydantic.dataclasses
from pydantic import BeforeValidator, Field

from steerjax.errors import ConfigError
from steerjax.models.families import FAMILIES
from steerjax.typed import STRICT, Count, Name, Number, Positive, PositiveFloat, Size, SizeOrNone, separated

REMAT = ("none", "dots", "full")  # the less is kept, the later
Target = Literal["all-linear", "q", "k", "v", "o", "gate", "up", "down"]
Targets = Annotated[tuple[Target, ...], BeforeValidator(separated), Field(strict=False)]


@pydantic.dataclasses.dataclass(frozen=True, config=STRICT)
class RopeScaling:
    """Llama 3.1's `rope_type: llama3`."""

    factor: PositiveFloat = 1.0  # 1 is plain RoPE; 8 is Llama 3.1, 32 is Llama 3.2 1B and 3B
    low_freq_factor: PositiveFloat = 1.0  # wave lengths above original / this are stretched by `factor`
    high_freq_factor: PositiveFloat = 4.0  # those below original / this are left as they are
    original_max_position_embeddings: Positive = 8192  # positions before the stretch


@pydantic.dataclasses.dataclass(frozen=True, config=STRICT)
class LoraConfig:
    """Low-rank adapters (arXiv 2106.09685): a projection W is W + alpha / rank * A B, and only A and B are trained.

    `rank` 0 has none. A reward head is trained too.

    Attributes:
        targets: the projections that have adapters; `all-linear` is every one.
        dropout: share of what goes into the adapters that is dropped in training.
        base_dtype: of the weights that are not trained, in memory and in checkpoints. Models that were published in
            bfloat16 lose nothing by it.
    """

    rank: SizeOrNone = 0  # 0 trains the model itself, without adapters
    alpha: PositiveFloat = 16.0  # what the adapters add is multiplied by alpha / rank
    targets: Targets = ("all-linear",)
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    base_dtype: Literal["float32", "bfloat16"] = "float32"

    def __post_init__(self):
        if self.rank and not self.targets:
            raise ValueError("no targets; cure: all-linear, or names of projections")

    def adapts(self, projection: str) -> bool:
        """Whether this projection has an adapter."""
        return self.rank > 0 and bool({"all-linear", projection} & set(self.targets))


@pydantic.dataclasses.dataclass(frozen=True, config=STRICT)
class LlamaConfig:
    """A Llama, or a model of a family that differs from it in what `families/` says.

    A token sees those at less than `window` positions before it, 0 for all.
    `head_dim` 0 is `hidden_size // num_heads`, `num_kv_heads` 0 `num_heads`, `vocab_size` 0 the tokenizer's (filled in
    when a run begins).
    """

    vocab_size: SizeOrNone = 0  # rows of the embedding; 0 takes the tokenizer's
    hidden_size: Size = 256  # D, width of a hidden state
    intermediate_size: Size = 768  # F, width of the feed-forward layer
    num_layers: Number = 4  # L, layers
    num_heads: Number = 4  # N, query heads
    num_kv_heads: Annotated[int, Field(ge=0, le=10_000)] = 2  # K, key-value heads; 0 is as many as query heads
    head_dim: SizeOrNone = 0  # H, width of a head; 0 is hidden_size / num_heads
    max_position_embeddings: Positive = 4096  # longest text, in tokens
    rope_theta: PositiveFloat = 10_000.0  # base of RoPE's wave lengths
    rope_scaling: RopeScaling = RopeScaling()
    rms_norm_eps: PositiveFloat = 1e-5  # added to the mean square in RMSNorm
    tie_word_embeddings: bool = True  # the language-model head is the embedding
    attention_bias: bool = False  # biases of q, k, v and o
    mlp_bias: bool = False  # biases of gate, up and down
    initializer_range: PositiveFloat = 0.02  # standard deviation of random weights
    family: Literal[*FAMILIES] = "llama"  # the architecture
    window: Count = 0  # Mistral only: a token sees those less than this before it; 0 is all
    lora: LoraConfig = LoraConfig()

    def __post_init__(self):
        object.__setattr__(self, "num_kv_heads", self.num_kv_heads or self.num_heads)
        object.__setattr__(self, "head_dim", self.head_dim or self.hidden_size // self.num_heads)
        if self.num_heads % self.num_kv_heads:
            both = f"model.num_heads {self.num_heads} is no multiple of model.num_kv_heads {self.num_kv_heads}"
            raise ConfigError(f"{both}; cure: a multiple, or a divisor")
        if self.window and self.family != "mistral":
            raise ConfigError(
                f"model.window is {self.window}, and a {self.family} has none; cure: 0, or family mistral"
            )
        if self.head_dim % 2 or not self.head_dim:
            sizes = f"of model.hidden_size {self.hidden_size} and model.num_heads {self.num_heads}"
            raise ConfigError(f"model.head_dim is {self.head_dim}, {sizes}; cure: an even number, RoPE turns pairs")

    def architecture(self) -> LlamaConfig:
        """These fields alone, without those of a subclass."""
        return LlamaConfig(**{f.name: getattr(self, f.name) for f in dataclasses.fields(LlamaConfig)})

    @property
    def biased(self) -> tuple[str, ...]:
        """The projections that have a bias, here and in Hugging Face's files."""
        chosen = ("q", "k", "v", "o") * self.attention_bias + ("gate", "up", "down") * self.mlp_bias
        return FAMILIES[self.family].biased + chosen

    @property
    def qk_norm(self) -> bool:
        """Queries and keys of each head go through an RMSNorm before RoPE."""
        return FAMILIES[self.family].qk_norm

    @property
    def block_parameters(self) -> int:
        """Parameters in the matrices of one layer, which a token is multiplied with."""
        return sum(into * out for into, out in self._projections.values())

    @property
    def adapter_parameters(self) -> int:
        """Parameters in the adapters of one layer."""
        adapted = [size for name, size in self._projections.items() if self.lora.adapts(name)]
        return self.lora.rank * sum(into + out for into, out in adapted)

    @property
    def _projections(self) -> dict[str, tuple[int, int]]:
        """Width in, width out."""
        D, F = self.hidden_size, self.intermediate_size
        q, kv = (heads * self.head_dim for heads in (self.num_heads, self.num_kv_heads))
        return {"q": (D, q), "k": (D, kv), "v": (D, kv), "o": (q, D), "gate": (D, F), "up": (D, F), "down": (F, D)}


@pydantic.dataclasses.dataclass(frozen=True, config=STRICT)
class ModelConfig(LlamaConfig):
    """The Llama that is trained.

    Attributes:
        source: `random`, or where parameters and architecture come from: a Hugging Face folder, a hub id, or a run of
            ours. All other keys of this group then stay at their defaults.
        keep_layers: the first layers of the source that are kept, 0 for all. The middle of a small model can predict
            ratings better than its last layers, which are about the next token.
    """

    source: Name = "random"
    keep_layers: Count = 0


@pydantic.dataclasses.dataclass(frozen=True, config=STRICT)
class HeadConfig:
    """The reward head."""

    # a response's last token, or the mean of all (NeMo-Aligner's `use_avg_pool`)
    readout: Literal["last", "mean"] = "last"
    use_bias: bool = False  # a bias of the head; no stock server loads one


@pydantic.dataclasses.dataclass(frozen=True, config=STRICT)
class ComputeConfig:
    """How the model is run; changes speed and memory, not the model.

    Attributes:
        dtype: of the computation; parameters and optimizer state are float32. `auto`: float32 on CPU, else bfloat16.
        remat: what a layer keeps for its backward pass: all (`none`), matrix products and attention (`dots`, the
            fastest on a CPU: what is computed again costs less than what is written), nothing (`full`).
        unroll: layers a step of the scan over layers.
        attention: `chunked` (dense, skips the future), `blockwise` (skips all that the mask forbids), or a kernel,
            `splash` (TPU), `triton` or `cudnn` (GPU); all are one function. `auto` takes blockwise on CPU, splash on
            TPU, triton on GPU, and cudnn where that does not fit, else chunked; a run's summary says why.
        attention_chunk: queries a chunk (chunked) or block (blockwise), in tokens.
        loss_chunk: tokens of a row whose logits are held at a time (chat models).
        cache_frozen: run the frozen layers once over all data and keep their outputs in the host's memory.
    """

    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    remat: Literal[*REMAT] = "dots"
    unroll: Number = 1
    attention: Literal["auto", "chunked", "blockwise", "splash", "cudnn", "triton"] = "auto"
    attention_chunk: Size = 256
    loss_chunk: Size = 256
    cache_frozen: bool = False
