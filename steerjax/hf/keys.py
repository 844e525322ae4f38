"""The one map between Hugging Face's tensors and our parameters, for import and for export.

A weight is [out, in] there and [in..., out...] here, so it is transposed and reshaped; a query weight [N*H, D] is
[D, N, H]. RoPE is half-split on both sides, so no row is ever moved. Layers are stacked here.
"""

import collections
import math
from typing import NamedTuple

import numpy as np

from steerjax.models.config import LlamaConfig

Index = tuple[slice, ...]  # without steps

# Llama's names; another family's have its prefix.
CAUSAL_LM = "LlamaForCausalLM"
CLASSIFIER = "LlamaForSequenceClassification"
BARE = "LlamaModel"
HEAD = "reward_head"
A, B = "lora_a", "lora_b"
# What a layer has, theirs and ours: its norms, and its projections with their inputs and outputs.
_NORMS = {"input_layernorm": "attention_norm", "post_attention_layernorm": "mlp_norm"}
_PROJECTIONS = {
    "self_attn.q_proj": ("attention/q", "D", "NH"),
    "self_attn.k_proj": ("attention/k", "D", "KH"),
    "self_attn.v_proj": ("attention/v", "D", "KH"),
    "self_attn.o_proj": ("attention/o", "NH", "D"),
    "mlp.gate_proj": ("mlp/gate", "D", "F"),
    "mlp.up_proj": ("mlp/up", "D", "F"),
    "mlp.down_proj": ("mlp/down", "F", "D"),
}


class Tensor(NamedTuple):
    """One tensor of a Hugging Face folder and where it lies in our parameters."""

    name: str  # Hugging Face's
    path: str  # ours, e.g. "llama/layers/attention/q/kernel"
    layer: int | None  # place in our stack; None where our array is not stacked
    ours: tuple[int, ...]  # our shape, of one layer
    split: int = 1  # our first `split` dimensions are flattened into their one, the rest into another
    turned: bool = False  # the others come first there

    def _there(self, parts: tuple, flat) -> tuple:
        """`flat` of each group of dimensions, in their order there."""
        found = [flat(group) for group in (parts[: self.split], parts[self.split :]) if group]
        return tuple(found[::-1] if self.turned else found)

    @property
    def shape(self) -> tuple[int, ...]:
        """Hugging Face's."""
        return self._there(self.ours, math.prod)

    @property
    def whole(self) -> Index:
        """Where it lies in our array."""
        layer = () if self.layer is None else (slice(self.layer, self.layer + 1),)
        return layer + tuple(slice(0, size) for size in self.ours)

    def hf_index(self, index: Index) -> Index:
        """What to read there for our `index`. Inner dimensions (the H of [N, H]) come whole; `to_ours` cuts them."""

        def flat(group):
            (start, stop, _), inner = group[0][0].indices(group[0][1]), math.prod(size for _, size in group[1:])
            return slice(start * inner, stop * inner)

        return self._there(tuple(zip(index, self.ours, strict=True)), flat)

    def to_ours(self, block: np.ndarray, index: Index) -> np.ndarray:
        """Our array at `index`, from the block that was read at `hf_index(index)`."""
        sizes, inner = list(self.ours), list(index)
        for first in {0, self.split} - {len(sizes)}:
            sizes[first], inner[first] = len(range(*index[first].indices(sizes[first]))), slice(None)
        return (_transposed(block) if self.turned else block).reshape(sizes)[tuple(inner)]

    def to_hf(self, array: np.ndarray) -> np.ndarray:
        """Hugging Face's tensor, contiguous, from our array at `whole`."""
        if self.turned:
            return _transposed(array.reshape(self.shape[::-1]))
        return np.ascontiguousarray(array.reshape(self.shape))


def _transposed(array: np.ndarray, tile: int = 128) -> np.ndarray:
    """The transpose of a matrix, contiguous. Tiles stay in a processor's cache; numpy's own copy of the whole misses it
    at every number."""
    rows, columns = array.shape
    out = np.empty((columns, rows), array.dtype)
    for i in range(0, rows, tile):
        for j in range(0, columns, tile):
            out[j : j + tile, i : i + tile] = np.ascontiguousarray(array[i : i + tile, j : j + tile]).T
    return out


def tensors(config: LlamaConfig, architecture: str, labels: int = 0, *, prefix: str = "model.") -> list[Tensor]:
    """Every tensor of a folder, in the order of the computation.

    `labels` are a classifier's outputs, `prefix` stands before the backbone's names ("" in a bare model's own files).
    """
    D, V = config.hidden_size, config.vocab_size
    sizes = {
        "D": D,
        "F": config.intermediate_size,
        "H": config.head_dim,
        "N": config.num_heads,
        "K": config.num_kv_heads,
    }
    found = [Tensor(f"{prefix}embed_tokens.weight", "llama/embedding", None, (V, D))]
    for layer in range(config.num_layers):
        theirs, ours = f"{prefix}layers.{layer}.", "llama/layers/"
        found += [Tensor(f"{theirs}{n}.weight", f"{ours}{path}/scale", layer, (D,)) for n, path in _NORMS.items()]
        for name, (path, *letters) in _PROJECTIONS.items():
            into, out = (tuple(sizes[letter] for letter in group) for group in letters)
            kernel = f"{ours}{path}/kernel"
            found.append(Tensor(f"{theirs}{name}.weight", kernel, layer, into + out, len(into), turned=True))
            if path.split("/")[1] in config.biased:
                found.append(Tensor(f"{theirs}{name}.bias", f"{ours}{path}/bias", layer, out, len(out)))
        for letter in ("q", "k") if config.qk_norm else ():
            norm = f"{theirs}self_attn.{letter}_norm.weight"
            found.append(Tensor(norm, f"{ours}attention/{letter}_norm/scale", layer, (config.head_dim,)))
    found.append(Tensor(f"{prefix}norm.weight", "llama/final_norm/scale", None, (D,)))
    if architecture == CAUSAL_LM and not config.tie_word_embeddings:
        found.append(Tensor("lm_head.weight", "lm_head", None, (D, V), turned=True))
    if architecture == CLASSIFIER:
        found.append(Tensor("score.weight", HEAD, None, (D, labels), turned=True))
    return found


def adapter_tensors(config: LlamaConfig, architecture: str, labels: int = 0) -> list[Tensor]:
    """Every tensor of PEFT's file of adapters on such a folder; a classifier's head is among them."""
    found, rank = [], (config.lora.rank,)
    for tensor in tensors(config, architecture, labels):
        name, (place, _, leaf) = f"base_model.model.{tensor.name}", tensor.path.rpartition("/")
        if tensor.path == HEAD:
            found.append(tensor._replace(name=name))
        elif leaf == "kernel" and config.lora.adapts(place.rpartition("/")[2]):
            into, out = tensor.ours[: tensor.split], tensor.ours[tensor.split :]
            for letter, path, ours, split in (("A", A, into + rank, len(into)), ("B", B, rank + out, 1)):
                there = f"{name.removesuffix('.weight')}.lora_{letter}.weight"
                found.append(Tensor(there, f"{place}/{path}", tensor.layer, ours, split, turned=True))
    return found


def stacked_shapes(known: list[Tensor]) -> dict[str, tuple[int, ...]]:
    """Our path -> shape, with the layers."""
    layers = collections.Counter(t.path for t in known)
    return {t.path: t.ours if t.layer is None else (layers[t.path], *t.ours) for t in known}
