"""Attention on NVIDIA GPUs by cuDNN's flash attention, which knows no trees.

The mask is handed over as a bias. That costs 4 bytes a (query, key) pair of a row: the bias, once for all layers, and
its gradient, which cuDNN always writes. The future is skipped; other forbidden pairs are computed and masked.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from steerjax.models.attention.mask import allowed

FORBIDDEN = -(2.0**41)  # what jax.nn writes for a mask: cuDNN mishandles the least numbers of bfloat16


def cudnn_bias(
    until: Int[Array, "B S"], start: int | Int[Array, ""] = 0, length: int | None = None, dtype=jnp.bfloat16
) -> Float[Array, "B 1 T S"]:
    """0 where a pair is allowed; arguments of `mask.allowed`, and the dtype of the queries."""
    return jnp.where(allowed(until, start, length)[:, None], 0.0, FORBIDDEN).astype(dtype)


def cudnn_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    bias: Float[Array, "B 1 T S"],
    implementation: str = "cudnn",
) -> Float[Array, "B T N H"]:
    """Self-attention over packed rows under the mask of `mask.allowed`; bfloat16 or float16 only.

    Args:
        bias: of `cudnn_bias`.
        implementation: of jax.nn.dot_product_attention; `xla` is the same function on any machine.
    """
    whole = q.shape[1] == k.shape[1]  # else the queries start somewhere in the row, which only the bias knows
    return jax.nn.dot_product_attention(q, k, v, bias=bias, is_causal=whole, implementation=implementation)
