"""The one map between Hugging Face's Llama tensors and our parameters, for import and for export.

A weight is [out, in] there and [in..., out...] here, so it is transposed and reshaped; a query weight [N*H, D] is
[D, N, H]. RoPE is half-split on both sides, so no row is ever moved. Layers are tensors of their own there and stacked
on axis 0 here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from steerjax.models.config import LlamaConfig

Index = tuple[slice, ...]  # without steps

CAUSAL_LM = "LlamaForCausalLM"
CLASSIFIER = "LlamaForSequenceClassification"
BARE = "LlamaModel"


@dataclass(frozen=True)
class Tensor:
    """One tensor of a Hugging Face folder and where it lies in our parameters.

    Attributes:
        name: Hugging Face's.
        path: ours, e.g. "llama/layers/attention/q/kernel".
        layer: place in our stack; None where our array is not stacked.
        rows, columns: sizes of our dimensions that make dimension 0 and 1 there; a vector has no columns.
        swapped: our array has the columns first.
    """

    name: str
    path: str
    layer: int | None
    rows: tuple[int, ...]
    columns: tuple[int, ...] = ()
    swapped: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """Hugging Face's shape."""
        return tuple(math.prod(group) for group in (self.rows, self.columns) if group)

    @property
    def our_shape(self) -> tuple[int, ...]:
        """Ours, of one layer."""
        return self.columns + self.rows if self.swapped else self.rows + self.columns

    def hf_index(self, index: Index) -> Index:
        """The part to read there for the part `index` of our array of one layer.

        Dimensions inside a group (the H of [N, H]) come whole; `to_ours` cuts them.
        """
        groups = zip((self.rows, self.columns), self._split(index), strict=True)
        return tuple(_flat(sizes, slices) for sizes, slices in groups if sizes)

    def to_ours(self, block: np.ndarray, index: Index) -> np.ndarray:
        """Our array at `index`, from the block that was read at `hf_index(index)`."""
        rows, columns = self._split(index)
        shapes = [_block_shape(*group) for group in ((self.rows, rows), (self.columns, columns))]
        block = block.T if self.swapped else block
        block = block.reshape(shapes[1] + shapes[0] if self.swapped else shapes[0] + shapes[1])
        inner = [(slice(None), *group[1:]) if group else () for group in (rows, columns)]
        return block[inner[1] + inner[0] if self.swapped else inner[0] + inner[1]]

    def to_hf(self, array: np.ndarray) -> np.ndarray:
        """Hugging Face's tensor, contiguous, from our whole array of one layer."""
        if self.swapped:
            array = array.reshape(self.shape[::-1]).T
        return np.ascontiguousarray(array.reshape(self.shape))

    def _split(self, index: Index) -> tuple[Index, Index]:
        """The index by rows and columns."""
        first = len(self.columns if self.swapped else self.rows)
        return (index[first:], index[:first]) if self.swapped else (index[:first], index[first:])


def _flat(sizes: tuple[int, ...], slices: Index) -> slice:
    """The range of a group, laid out flat, that its first dimension's slice covers."""
    start, stop, _ = slices[0].indices(sizes[0])
    inner = math.prod(sizes[1:])
    return slice(start * inner, stop * inner)


def _block_shape(sizes: tuple[int, ...], slices: Index) -> tuple[int, ...]:
    return (len(range(*slices[0].indices(sizes[0]))), *sizes[1:]) if sizes else ()


def whole(shape: Sequence[int]) -> Index:
    """The index of a whole array."""
    return tuple(slice(0, size) for size in shape)


def tensors(config: LlamaConfig, architecture: str, labels: int = 0, *, prefix: str = "model.") -> tuple[Tensor, ...]:
    """Every tensor of a folder, in the order of the computation.

    Args:
        architecture: CAUSAL_LM, CLASSIFIER or BARE.
        labels: outputs of a classifier.
        prefix: before the backbone's names; "" in a bare model's own files.
    """
    D, F, V = config.hidden_size, config.intermediate_size, config.vocab_size
    q, kv = (config.num_heads, config.head_dim), (config.num_kv_heads, config.head_dim)
    maps = (  # theirs, ours, outputs, inputs, bias
        ("self_attn.q_proj", "attention/q", q, (D,), config.attention_bias),
        ("self_attn.k_proj", "attention/k", kv, (D,), config.attention_bias),
        ("self_attn.v_proj", "attention/v", kv, (D,), config.attention_bias),
        ("self_attn.o_proj", "attention/o", (D,), q, config.attention_bias),
        ("mlp.gate_proj", "mlp/gate", (F,), (D,), config.mlp_bias),
        ("mlp.up_proj", "mlp/up", (F,), (D,), config.mlp_bias),
        ("mlp.down_proj", "mlp/down", (D,), (F,), config.mlp_bias),
    )
    found = [Tensor(f"{prefix}embed_tokens.weight", "llama/embedding", None, (V,), (D,))]
    for layer in range(config.num_layers):
        theirs, ours = f"{prefix}layers.{layer}.", "llama/layers/"
        found.append(Tensor(f"{theirs}input_layernorm.weight", f"{ours}attention_norm/scale", layer, (D,)))
        found.append(Tensor(f"{theirs}post_attention_layernorm.weight", f"{ours}mlp_norm/scale", layer, (D,)))
        for name, path, outputs, inputs, bias in maps:
            found.append(Tensor(f"{theirs}{name}.weight", f"{ours}{path}/kernel", layer, outputs, inputs, swapped=True))
            if bias:
                found.append(Tensor(f"{theirs}{name}.bias", f"{ours}{path}/bias", layer, outputs))
    found.append(Tensor(f"{prefix}norm.weight", "llama/final_norm/scale", None, (D,)))
    if architecture == CAUSAL_LM and not config.tie_word_embeddings:
        found.append(Tensor("lm_head.weight", "lm_head", None, (V,), (D,), swapped=True))
    if architecture == CLASSIFIER:
        found.append(Tensor("score.weight", "reward_head", None, (labels,), (D,), swapped=True))
    return tuple(found)
