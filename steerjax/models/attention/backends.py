"""The attentions: which one runs where, and each of them on a mesh. All are one function: dense, under `mask.allowed`.

A plan is made of a batch's `until`, once for all layers. With a context axis a device has a part of each row's queries;
layer by layer it gathers the keys and values of whole rows over that axis, and no other activation. (In a causal row
the last part has the most to do.)
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int

from steerjax.errors import ConfigError
from steerjax.models.attention.blockwise import BlockPlan, block_plan, blockwise_attention
from steerjax.models.attention.cudnn import cudnn_attention, cudnn_bias
from steerjax.models.attention.mask import causal_attention
from steerjax.models.attention.splash import LANES, SplashPlan, splash_attention, splash_plan
from steerjax.parallel.rules import RULES, mesh_ways, partition_spec

SPLASH_LARGEST = 16384**2  # pairs of a row; at 2 bytes each, 512 MiB
(CONTEXT,) = RULES["length"]
_ROWS, _HEADS = ("batch", "length"), ("batch", "length", "activation_heads")
_MASK = {"chunked": (), "blockwise": _ROWS, "splash": ("batch", None, "length"), "cudnn": ("batch", None, "length")}


@struct.dataclass
class Plan:
    """What `self_attention` needs of a batch.

    Attributes:
        until: see `mask.allowed`.
        mask: in the form of the back end (cuDNN: a bias); `chunked` needs none.
        name: the back end.
        chunk: queries a chunk (chunked) or block (blockwise), in tokens.
    """

    until: Int[Array, "B T"]
    mask: BlockPlan | SplashPlan | Float[Array, "B 1 T S"] | None
    name: str = struct.field(pytree_node=False)
    chunk: int = struct.field(pytree_node=False)


def make_plan(name: str, until: Int[Array, "B T"], chunk: int, dtype) -> Plan:
    """The plan of a batch, on the mesh that is set.

    Args:
        name: of `choose_backend`; where the rows cannot be cut as it and the mesh need (a model is initialised with
            one token), it is `chunked` all the same.
        dtype: of the queries.
    """
    part = until.shape[1] // _context_size()
    block = {"chunked": 1, "blockwise": chunk, "splash": LANES, "cudnn": 2}[name]
    if name == "chunked" or part % block or not _divides(until.shape, _ROWS):
        return Plan(until, None, "chunked", chunk)

    def local(until):
        match name:
            case "blockwise":
                return block_plan(until, chunk, _start(part), part)
            case "splash":
                return splash_plan(until, _start(part), part)
            case "cudnn":
                return cudnn_bias(until, _start(part), part, dtype)

    return Plan(until, _on_mesh(local, (("batch",),), _MASK[name])(until), name, chunk)


def self_attention(
    q: Float[Array, "B T N H"], k: Float[Array, "B T K H"], v: Float[Array, "B T K H"], plan: Plan
) -> Float[Array, "B T N H"]:
    """Attention over packed rows on the mesh that is set: each device for its own rows, heads and queries.

    Token i sees token j exactly if `j <= i < until[j]`. Softmax in float32, N / K query heads to a key-value head.
    """

    def local(q, k, v, until, mask):
        if _context_size() > 1:
            k, v = (jax.lax.all_gather(x, CONTEXT, axis=1, tiled=True) for x in (k, v))
        match plan.name:
            case "chunked":
                return causal_attention(q, k, v, until, plan.chunk, _start(q.shape[1]))
            case "blockwise":
                return blockwise_attention(q, k, v, until, mask, plan.chunk)
            case "splash":
                return splash_attention(q, k, v, mask)
            case "cudnn":
                return cudnn_attention(q, k, v, mask)

    if plan.name == "chunked" and (_context_size() == 1 or not _divides(q.shape, _HEADS)):
        return causal_attention(q, k, v, plan.until, plan.chunk)  # XLA cuts rows and heads as well
    inputs = (_HEADS, _HEADS, _HEADS, ("batch",), _MASK[plan.name])
    return _on_mesh(local, inputs, _HEADS)(q, k, v, plan.until, plan.mask)


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


def _start(part: int) -> int | Int[Array, ""]:
    """Where in the row a device's `part` queries start; a plain number where it has all."""
    return 0 if _context_size() == 1 else jax.lax.axis_index(CONTEXT) * part


def _divides(shape: tuple[int, ...], axes: tuple[str, ...]) -> bool:
    """Whether the mesh cuts the first dimensions of an array, which have these logical axes, into equal parts."""
    mesh = jax.sharding.get_abstract_mesh()
    ways = () if mesh.empty else (mesh_ways(mesh, mesh_axes) for mesh_axes in partition_spec(axes))
    return all(size % parts == 0 for size, parts in zip(shape, ways, strict=False))


class Choice(NamedTuple):
    """A back end (`blockwise`, `chunked`, `cudnn`, `splash`), and why it is that one."""

    name: str
    reason: str


def choose_backend(name: str, platform: str, dtype, head_dim: int, length: int, chunk: int, context: int) -> Choice:
    """The back end that runs: the named one, or for `auto` the machine's own where it fits, else `chunked`.

    Args:
        name: `config.compute.attention`.
        platform: `cpu`, `tpu`; any other is a GPU.
        dtype: of the computation.
        length, chunk: of a row, and `config.compute.attention_chunk`, in tokens.
        context: devices along the context axis; -1 where it is not known yet.

    Raises:
        ConfigError: the named one cannot run this.
    """
    own, reason = {
        "cpu": ("blockwise", "computes no block that the mask forbids"),
        "tpu": ("splash", "computes no block that the mask forbids"),
    }.get(platform, ("cudnn", "the mask goes in as a bias; the future is skipped"))
    problem = _unfit(own if name == "auto" else name, platform, jnp.dtype(dtype).name, head_dim, length, chunk, context)
    if name == "auto":
        return Choice("chunked", f"not {own}: {problem}") if problem else Choice(own, reason)
    if problem:
        raise ConfigError(f"config.compute.attention is '{name}': {problem}; cure: change that, or 'auto'")
    return Choice(name, "named in the config")


def _unfit(name: str, platform: str, dtype: str, head_dim: int, length: int, chunk: int, context: int) -> str | None:
    """Why a back end cannot run this, or None."""
    if name == "chunked":
        return None
    if context < 1 or length % context:
        return f"config.mesh.context {context} is no divisor of config.batch.row_length {length}"
    part = length // context
    tokens = f"a device's {part} tokens of a row"
    if name == "blockwise":
        return f"config.compute.attention_chunk {chunk} is no divisor of {tokens}" if part % chunk else None
    if name == "splash":
        if platform != "tpu":
            return f"it runs on TPU, not on {platform}"
        if part % LANES:
            return f"{tokens} are no multiple of {LANES}"
        return f"its mask of {part} x {length} tokens a row is too large" if part * length > SPLASH_LARGEST else None
    if platform in ("cpu", "tpu"):
        return f"it runs on GPU, not on {platform}"
    if jax.default_backend() == "gpu" and float(jax.local_devices()[0].compute_capability) < 8:
        return "it wants an Ampere GPU or a newer one"
    if dtype not in ("bfloat16", "float16"):
        return f"it computes in bfloat16, not in {dtype}"
    fits = head_dim % 8 == 0 and head_dim <= 128 and part % 2 == 0
    return None if fits else f"head size {head_dim}, {part} tokens: it wants multiples of 8 up to 128, and of 2"
