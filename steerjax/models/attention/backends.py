"""The attentions: which one runs where, and each of them on a mesh. All are one function: dense, under `mask.allowed`.

With a context axis a device has a part of each row's queries, and gathers only the keys and values of whole rows, layer
by layer.
"""

from importlib.util import find_spec
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Int

from steerjax.errors import ConfigError
from steerjax.models.attention.blockwise import block_plan, blockwise_attention
from steerjax.models.attention.kernels import LANES, cudnn_attention, cudnn_bias, splash_attention, splash_plan
from steerjax.models.attention.mask import Heads, Keys, Window, allowed, causal_attention
from steerjax.parallel.rules import RULES, mesh_ways, partition_spec

TRITON = "jax.experimental.pallas.triton"  # deprecated since jax 0.11.2
SPLASH_LARGEST = 16384**2  # pairs of a row; at 8 bytes each, 2 GiB
(CONTEXT,) = RULES["length"]
_ROWS, _HEADS, _PAIRS = ("batch", "length"), ("batch", "length", "activation_heads"), ("batch", None, "length")
_MASK = {"chunked": (), "blockwise": _ROWS, "splash": _PAIRS, "cudnn": _PAIRS, "triton": _PAIRS}


@struct.dataclass
class Plan:
    """What `self_attention` needs of a batch, made once for all layers."""

    until: Int[Array, "B T"]
    window: Window | None
    mask: Any  # in the form of the back end; `chunked` needs none
    name: str = struct.field(pytree_node=False)
    chunk: int = struct.field(pytree_node=False)


def make_plan(name: str, until: Int[Array, "B T"], chunk: int, dtype, window: Window | None = None) -> Plan:
    """The plan of a batch, on the mesh that is set, for queries of this dtype.

    Rows that cannot be cut as the back end and the mesh need (those to rate have any length) are `chunked`.
    """
    part = until.shape[1] // _context_size()
    multiple = {"splash": LANES, "cudnn": 2, "triton": LANES}.get(name, chunk)
    if name == "chunked" or part % multiple or not _divides(until.shape, _ROWS):
        return Plan(until, window, None, "chunked", chunk)

    def local(until, window):
        if name == "blockwise":
            return block_plan(until, chunk, _start(part), part, window)
        if name == "triton":
            from steerjax.models.attention.triton import choose_tiles, triton_plan

            return triton_plan(until, choose_tiles(dtype), _start(part), part, window)
        mask = allowed(until, _start(part), part, window)
        return splash_plan(mask) if name == "splash" else cudnn_bias(mask, dtype)

    return Plan(until, window, _on_mesh(local, (("batch",),) * 2, _MASK[name])(until, window), name, chunk)


def self_attention(q: Heads, k: Keys, v: Keys, plan: Plan) -> Heads:
    """Attention over packed rows on the mesh that is set: each device for its own rows, heads and queries."""

    def local(q, k, v, until, window, mask):
        if _context_size() > 1:
            k, v = (jax.lax.all_gather(x, CONTEXT, axis=1, tiled=True) for x in (k, v))
        match plan.name:
            case "chunked":
                return causal_attention(q, k, v, until, plan.chunk, _start(q.shape[1]), window)
            case "blockwise":
                return blockwise_attention(q, k, v, until, window, mask, plan.chunk)
            case "splash":
                return splash_attention(q, k, v, mask)
            case "cudnn":
                return cudnn_attention(q, k, v, mask)
            case "triton":
                from steerjax.models.attention.triton import choose_tiles, triton_attention

                return triton_attention(q, k, v, until, window, mask, choose_tiles(q.dtype))

    if plan.name == "chunked" and (_context_size() == 1 or not _divides(q.shape, _HEADS)):
        return causal_attention(q, k, v, plan.until, plan.chunk, window=plan.window)  # XLA cuts rows and heads as well
    inputs = (_HEADS, _HEADS, _HEADS, ("batch",), ("batch",), _MASK[plan.name])
    return _on_mesh(local, inputs, _HEADS)(q, k, v, plan.until, plan.window, plan.mask)


def _on_mesh(function, inputs: tuple[tuple, ...], output: tuple):
    """`function` on each device's part of its arguments, which have these logical axes; without a mesh, as it is."""
    if jax.sharding.get_abstract_mesh().empty:
        return function
    specs = {"in_specs": tuple(map(partition_spec, inputs)), "out_specs": partition_spec(output)}
    return jax.shard_map(function, **specs, check_vma=False)  # a loop's constant carry would pass for replicated


def _context_size() -> int:
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else mesh.shape[CONTEXT]


def _start(part: int) -> int | Int[Array, ""]:
    """Where in the row a device's `part` queries start; a plain number where it has all."""
    return 0 if _context_size() == 1 else jax.lax.axis_index(CONTEXT) * part


def _divides(shape: tuple[int, ...], axes: tuple[str, ...]) -> bool:
    """Whether the mesh cuts an array's first dimensions, of these logical axes, into equal parts."""
    mesh = jax.sharding.get_abstract_mesh()
    return mesh.empty or not any(n % mesh_ways(mesh, cut) for n, cut in zip(shape, partition_spec(axes), strict=False))


class Choice(NamedTuple):
    """A back end, and why it is that one."""

    name: str
    reason: str


def choose_backend(name: str, platform: str, dtype, head_dim: int, length: int, chunk: int, context: int) -> Choice:
    """The back end that runs: the named one, or for `auto` the machine's own where it fits, else `chunked`.

    A platform that is neither `cpu` nor `tpu` is a GPU. `length` of a row and `chunk` are tokens, `context` the devices
    along that axis.

    Raises ConfigError: the named one cannot run this.
    """
    own = {"cpu": ("blockwise",), "tpu": ("splash",)}.get(platform, ("triton", "cudnn"))
    names = own if name == "auto" else (name,)
    fits = (platform, jnp.dtype(dtype).name, head_dim, length, chunk, context)
    problems = {name: _unfit(name, *fits) for name in names}
    if name == "auto":
        said = "; ".join(f"not {name}: {problem}" for name, problem in problems.items() if problem)
        first = next((name for name, problem in problems.items() if not problem), "chunked")
        return Choice(first, said or f"made for {platform}")
    problem = problems[name]
    if problem:
        raise ConfigError(f"config.compute.attention is '{name}': {problem}; cure: change that, or 'auto'")
    return Choice(name, "named in the config")


def _unfit(name: str, platform: str, dtype: str, head_dim: int, length: int, chunk: int, context: int) -> str | None:
    """Why a back end cannot run this, or None."""
    if name == "chunked":
        return None
    if length % context:
        return f"config.mesh.context {context} is no divisor of config.batch.row_length {length}"
    part = length // context
    tokens, elsewhere = f"a device's {part} tokens of a row", f"it does not run on {platform}"
    old = jax.default_backend() == "gpu" and float(jax.local_devices()[0].compute_capability) < 8
    problems = (
        ("blockwise", part % chunk, f"config.compute.attention_chunk {chunk} is no divisor of {tokens}"),
        ("splash", platform != "tpu", elsewhere),
        ("splash", part % LANES, f"{tokens} are no multiple of {LANES}"),
        ("splash", part * length > SPLASH_LARGEST, f"its mask of {part} x {length} tokens a row is too large"),
        ("cudnn triton", platform in ("cpu", "tpu"), elsewhere),
        ("cudnn triton", old, "it wants an Ampere GPU or a newer one"),
        ("cudnn", dtype not in ("bfloat16", "float16"), f"it computes in bfloat16, not in {dtype}"),
        ("cudnn", head_dim % 8 or head_dim > 128, f"head size {head_dim} is no multiple of 8 up to 128"),
        ("cudnn", part % 2, f"{tokens} are no even number"),
        ("triton", find_spec(TRITON) is None, f"this version of jax has no {TRITON}"),
        ("triton", not 16 <= head_dim <= 128, f"head size {head_dim} is not from 16 to 128"),
        ("triton", part % LANES, f"{tokens} are no multiple of {LANES}"),
    )
    return next((said for who, wrong, said in problems if name in who.split() and wrong), None)
