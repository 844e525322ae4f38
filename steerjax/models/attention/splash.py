"""Attention on TPU by JAX's splash kernel, which is given the mask as data.

The kernel's segment ids cannot say "what is above me in my tree", and they skip no block. Its dynamic mask can say
anything: blocks without an allowed pair are skipped, blocks that are allowed throughout are not masked. It costs
2 bytes a (query, key) pair of a row, once for all layers: 32 MiB at 4096 tokens.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
from jaxtyping import Array, Bool, Float, Int

from steerjax.models.attention.mask import allowed

LANES = 128  # a row is a multiple of it


class MaskBlocks(NamedTuple):
    """The arrays of the kernel's MaskInfo for each row; n and m blocks of b queries and b keys.

    Attributes:
        next_data, next_mask: which block of keys (of queries, backward) and which mask the kernel loads.
        kinds: 0 nothing is allowed, 1 something, 2 all.
        masks: of each block; backward transposed.
    """

    next_data: Int[Array, "B 1 n m"]
    next_mask: Int[Array, "B 1 n m"]
    kinds: Int[Array, "B 1 n m"]
    masks: Bool[Array, "B 1 n m b b"]


class SplashPlan(NamedTuple):
    """The mask as the kernels for outputs and dq, and for dk and dv, want it."""

    forward: MaskBlocks
    backward: MaskBlocks


def splash_plan(until: Int[Array, "B S"], start: int | Int[Array, ""] = 0, length: int | None = None) -> SplashPlan:
    """Arguments of `mask.allowed`, all multiples of LANES."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask_info as mask_info

    mask = allowed(until, start, length)
    block = next(block for block in (512, 256, LANES) if mask.shape[1] % block == 0)

    def blocks(process, mask: Bool[Array, "T S"]) -> MaskBlocks:
        info, _ = process(mask[None], (block, block))
        return MaskBlocks(info.data_next, info.mask_next, info.block_mask, info.partial_mask_blocks)

    processes = (mask_info.process_dynamic_mask, mask_info.process_dynamic_mask_dkv)
    return SplashPlan(*(jax.vmap(functools.partial(blocks, process))(mask) for process in processes))


def splash_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    plan: SplashPlan,
    interpret: bool = False,
) -> Float[Array, "B T N H"]:
    """Self-attention over packed rows under the mask of `mask.allowed`; softmax in float32.

    Args:
        plan: of `splash_plan`.
        interpret: run the kernel in plain JAX, on any machine.
    """
    from jax.experimental.pallas.ops.tpu.splash_attention import BlockSizes
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
    from jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_mask_info import MaskInfo

    block = plan.forward.masks.shape[-1]

    def row(q, k, v, plan: SplashPlan):
        forward, backward = (
            MaskInfo(x.next_data, x.next_mask, x.kinds, x.masks, q_sequence=None, is_dynamic_mask=True) for x in plan
        )
        attend = kernels.SplashAttentionKernel(
            forward, forward, backward, block_sizes=BlockSizes(*(block,) * 8), is_mqa=False, save_residuals=False,
            mask_value=kernels.DEFAULT_MASK_VALUE, attn_logits_soft_cap=None, residual_checkpoint_name=None,
            mask_function=None, interpret=interpret,
        )  # fmt: skip
        q, k, v = (x.swapaxes(0, 1) for x in (q * q.shape[-1] ** -0.5, k, v))
        return attend(q, k, v).swapaxes(0, 1)

    return jax.vmap(row)(q, k, v, plan)
