"""The attentions: which one runs where, and each of them on a mesh. All are one function, `attend` under `allowed`.

A back end makes a plan of a batch's rows, once for all layers, and attends with it. With a context axis a device has a
part of each row's queries; layer by layer it gathers the keys and values of whole rows over that axis, and no other
activation. (In a causal row the last part has the most to do.)
"""

from __future__ import annotations

from typing import NamedTuple

import jax
from jaxtyping import Array, Float

from steerjax.models.attention.blockwise import BlockPlan, block_plan, blockwise_attention
from steerjax.models.attention.cudnn import CudnnPlan, cudnn_attention, cudnn_plan
from steerjax.models.attention.mask import Layout, causal_attention
from steerjax.models.attention.splash import LANES, SplashPlan, splash_attention, splash_plan
from steerjax.parallel.rules import RULES, mesh_ways, partition_spec

Plan = BlockPlan | SplashPlan | CudnnPlan | None
SPLASH_LARGEST = 16384**2  # pairs of a row; at 2 bytes each, 512 MiB
(CONTEXT,) = RULES["length"]


class Choice(NamedTuple):
    """A back end (`blockwise`, `chunked`, `cudnn`, `splash`), and why it is that one."""

    name: str
    reason: str


def choose(platform: str, dtype: str, head_dim: int, length: int, chunk: int, context: int) -> Choice:
    """The back end for a machine.

    Args:
        platform: `cpu`, `tpu`; any other is a GPU.
        dtype: of the computation.
        length: of a row, in tokens.
        chunk: `Compute.chunk`.
        context: devices along the context axis; -1 where it is not known yet.
    """
    name, reason = {
        "cpu": ("blockwise", "computes no block that the mask forbids"),
        "tpu": ("splash", "computes no block that the mask forbids"),
    }.get(platform, ("cudnn", "the mask goes in as a bias; the future is skipped"))
    problem = unfit(name, platform, dtype, head_dim, length, chunk, context)
    return Choice("chunked", f"not {name}: {problem}") if problem else Choice(name, reason)


def unfit(name: str, platform: str, dtype: str, head_dim: int, length: int, chunk: int, context: int) -> str | None:
    """Why a back end cannot run this, or None; arguments of `choose`."""
    if name == "chunked":
        return None
    if context < 1 or length % context:
        return f"config.mesh.context {context} is no divisor of config.batch.row_length {length}"
    return {"blockwise": _unfit_blockwise, "splash": _unfit_splash, "cudnn": _unfit_cudnn}[name](
        platform, dtype, head_dim, length // context, length, chunk
    )


def _unfit_blockwise(platform, dtype, head_dim, part, length, chunk) -> str | None:
    problem = f"config.compute.attention_chunk {chunk} is no divisor of a device's {part} tokens of a row"
    return problem if part % chunk else None


def _unfit_splash(platform, dtype, head_dim, part, length, chunk) -> str | None:
    if platform != "tpu":
        return f"it runs on TPU, not on {platform}"
    if part % LANES:
        return f"a device's {part} tokens of a row are no multiple of {LANES}"
    return f"its mask of {part} x {length} tokens a row is too large" if part * length > SPLASH_LARGEST else None


def _unfit_cudnn(platform, dtype, head_dim, part, length, chunk) -> str | None:
    if platform in ("cpu", "tpu"):
        return f"it runs on GPU, not on {platform}"
    if jax.default_backend() == "gpu" and float(jax.local_devices()[0].compute_capability) < 8:
        return "it wants an Ampere GPU or a newer one"
    if dtype not in ("bfloat16", "float16"):
        return f"it computes in bfloat16, not in {dtype}"
    fits = head_dim % 8 == 0 and head_dim <= 128 and part % 2 == 0
    return None if fits else f"head size {head_dim}, {part} tokens: it wants multiples of 8 up to 128, and of 2"


def make_plan(name: str, layout: Layout, chunk: int, dtype) -> Plan:
    """The plan of a batch's rows. None is for `chunked`, and where rows do not fill the back end's blocks."""
    part = layout.segments.shape[1] // _context_size()
    if name == "chunked" or part % {"blockwise": chunk, "splash": LANES, "cudnn": 2}[name]:
        return None

    def local(layout: Layout) -> Plan:
        where = (_start(part), part)
        if name == "blockwise":
            return block_plan(layout, chunk, *where)
        return splash_plan(layout, *where) if name == "splash" else cudnn_plan(layout, *where, dtype)

    return _on_mesh(local, (_ROWS,), _plan_axes(name))(layout)


def self_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    layout: Layout,
    plan: Plan,
    chunk: int,
) -> Float[Array, "B T N H"]:
    """Attention over packed rows on the mesh that is set: each device for its own rows, heads and queries.

    Args:
        plan: of `make_plan` for this layout and chunk.
    """

    def local(q, k, v, layout, plan):
        if _context_size() > 1:
            k, v = (jax.lax.all_gather(x, CONTEXT, axis=1, tiled=True) for x in (k, v))
        match plan:
            case BlockPlan():
                return blockwise_attention(q, k, v, layout, plan, chunk)
            case SplashPlan():
                return splash_attention(q, k, v, plan)
            case CudnnPlan():
                return cudnn_attention(q, k, v, plan)
        return causal_attention(q, k, v, layout, chunk, _start(q.shape[1]))

    if plan is None and (_context_size() == 1 or not _divisible(q.shape, _HEADS)):
        return causal_attention(q, k, v, layout, chunk)  # XLA cuts rows and heads as well
    axes = _plan_axes("blockwise" if isinstance(plan, BlockPlan) else "splash")
    return _on_mesh(local, (_HEADS, _HEADS, _HEADS, _ROWS, axes), _HEADS)(q, k, v, layout, plan)


_ROWS, _HEADS = ("batch",), ("batch", "length", "activation_heads")


def _plan_axes(name: str) -> tuple[str | None, ...]:
    """Of all arrays of a plan; all have a dimension of queries or blocks of queries."""
    return ("batch", "length") if name == "blockwise" else ("batch", None, "length")


def _on_mesh(function, inputs: tuple[tuple, ...], output: tuple):
    """`function` on each device's part of its arguments, which have these logical axes; without a mesh, as it is."""
    if jax.sharding.get_abstract_mesh().empty:
        return function
    return jax.shard_map(
        function,
        in_specs=tuple(partition_spec(axes) for axes in inputs),
        out_specs=partition_spec(output),
        check_vma=False,  # loop carries start as constants, which the check takes for replicated
    )


def _context_size() -> int:
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else mesh.shape[CONTEXT]


def _start(part: int):
    """Where in the row a device's `part` queries start; a plain number where it has all."""
    return 0 if _context_size() == 1 else jax.lax.axis_index(CONTEXT) * part


def _divisible(shape: tuple[int, ...], axes: tuple[str, ...]) -> bool:
    mesh = jax.sharding.get_abstract_mesh()
    return all(
        size % mesh_ways(mesh, mesh_axes) == 0 for size, mesh_axes in zip(shape, partition_spec(axes), strict=False)
    )
