"""Attention on NVIDIA GPUs by cuDNN's flash attention, which knows no trees.

The mask is handed over as a bias. That costs 4 bytes a (query, key) pair of a row: the bias, once for all layers, and
its gradient, which cuDNN always writes. The future is skipped; other forbidden pairs are computed and masked.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from steerjax.models.attention.mask import allowed

FORBIDDEN = -(2.0**41)  # what jax.nn writes for a mask: cuDNN mishandles the least numbers of bfloat16


class CudnnPlan(NamedTuple):
    """The mask of rows as a bias, the same for all layers of a model: 0 where a pair is allowed."""

    bias: Float[Array, "B 1 T S"]


def cudnn_plan(
    until: Int[Array, "B S"], start: int | Int[Array, ""] = 0, length: int | None = None, dtype=jnp.bfloat16
) -> CudnnPlan:
    """See `mask.allowed`. `dtype` is that of the queries."""
    mask = allowed(until, start, length)[:, None]
    return CudnnPlan(jnp.where(mask, 0.0, FORBIDDEN).astype(dtype))


def cudnn_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    plan: CudnnPlan,
    implementation: str = "cudnn",
) -> Float[Array, "B T N H"]:
    """Self-attention over packed rows under the mask of `mask.allowed`; bfloat16 or float16 only.

    Args:
        plan: of `cudnn_plan`.
        implementation: of jax.nn.dot_product_attention; `xla` is the same function on any machine.
    """
    whole = q.shape[1] == k.shape[1]  # else the queries start somewhere in the row, which only the bias knows
    return jax.nn.dot_product_attention(q, k, v, bias=plan.bias, is_causal=whole, implementation=implementation)
