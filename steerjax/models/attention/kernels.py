"""Attention by kernels that know no trees, and are given the mask as data, once for all layers.

Splash (TPU): its segment ids skip no block. Its dynamic mask does, and masks no block that is allowed throughout. It
costs 2 bytes a (query, key) pair of a row, and up to 8 where the compiled kernel reads it: 65 MiB at 4096 tokens.

cuDNN (GPU, bfloat16 or float16): the mask is a bias, at 4 bytes a pair: the bias, and its gradient, which cuDNN always
writes. The future is skipped; other forbidden pairs are computed and masked.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from steerjax.models.attention.mask import ATTENTION, Heads, Keys

LANES = 128  # splash wants multiples of it
CUDNN_FORWARD = "dot_product_attention_fwd_wrapper"  # jax.nn's name of the primitive
FORBIDDEN = -(2.0**41)  # what jax.nn writes for a mask: cuDNN mishandles the least numbers of bfloat16


def splash_plan(mask: Bool[Array, "B T S"]) -> tuple:
    """Splash's MaskInfo of each row, for outputs and dq, and for dk and dv; T and S are multiples of LANES."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask_info as mask_info

    block = next(block for block in (512, 256, LANES) if mask.shape[1] % block == 0)

    def row(process, mask: Bool[Array, "T S"]):
        return process(mask[None], (block, block))[0]._replace(is_dynamic_mask=None)  # a flag, no array

    processes = mask_info.process_dynamic_mask, mask_info.process_dynamic_mask_dkv
    return tuple(jax.vmap(functools.partial(row, process))(mask) for process in processes)


def splash_attention(q: Heads, k: Keys, v: Keys, plan: tuple, interpret: bool = False) -> Heads:
    """Self-attention under the mask of a `splash_plan`; `interpret` runs the kernel in plain JAX, on any machine."""
    from jax.experimental.pallas.ops.tpu.splash_attention import BlockSizes
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels

    block = plan[0].partial_mask_blocks.shape[-1]

    def row(q, k, v, plan):
        forward, backward = (info._replace(is_dynamic_mask=True) for info in plan)
        attend = kernels.SplashAttentionKernel(
            forward, forward, backward, block_sizes=BlockSizes(*(block,) * 8), is_mqa=False, save_residuals=False,
            mask_value=kernels.DEFAULT_MASK_VALUE, attn_logits_soft_cap=None, residual_checkpoint_name=ATTENTION,
            mask_function=None, interpret=interpret,
        )  # fmt: skip
        q, k, v = (x.swapaxes(0, 1) for x in (q * q.shape[-1] ** -0.5, k, v))
        return attend(q, k, v).swapaxes(0, 1)

    return jax.vmap(row)(q, k, v, plan)


def cudnn_bias(mask: Bool[Array, "B T S"], dtype=jnp.bfloat16) -> Float[Array, "B 1 T S"]:
    """0 where a pair is allowed, in the dtype of the queries."""
    return jnp.where(mask[:, None], 0.0, FORBIDDEN).astype(dtype)


def cudnn_attention(q: Heads, k: Keys, v: Keys, bias: Float[Array, "B 1 T S"], implementation: str = "cudnn") -> Heads:
    """Self-attention under a `cudnn_bias`; the implementation `xla` is the same function on any machine."""
    whole = q.shape[1] == k.shape[1]  # else the queries start somewhere in the row, which only the bias knows
    return jax.nn.dot_product_attention(q, k, v, bias=bias, is_causal=whole, implementation=implementation)
