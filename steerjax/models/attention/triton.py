"""Attention for GPUs that takes `until` itself: FlashAttention-2 (arXiv 2307.08691) over the blocks the mask allows.

A program of a kernel has one block of tokens, and visits blocks of the other side: those allowed throughout, without a
mask, then those allowed in part. The kernels are written in Pallas and compiled by Triton, whose arrays have sizes that
are powers of two: a head is read as the next one, with zeros. Scores are in powers of two as well.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as gpu
from jaxtyping import Array, Bool, Float, Int

from steerjax.models.attention.blockwise import NEGATIVE, block_kinds, visiting, visiting_order
from steerjax.models.attention.mask import ATTENTION, Heads, Keys, Window

START, FULL, VISITED, NUMBERS = range(4)  # what stands where in `Visits`
# The program's first query's place in its row, how many blocks are allowed throughout, how many at all, their numbers.
Visits = Int[Array, "B ... 3+m"]


class Tile(NamedTuple):
    """How a kernel cuts its work."""

    own: int  # tokens of a program's block
    visited: int  # tokens of the blocks it visits
    warps: int = 4
    stages: int = 2  # of a block's loading ahead


class Tiles(NamedTuple):
    """Of the kernels: outputs, gradient of queries, gradient of keys and values (whose own block is of keys)."""

    forward: Tile
    queries: Tile
    keys: Tile


class KernelPlan(NamedTuple):
    """The blocks that each kernel visits."""

    forward: Visits  # [B 1 T/own 3+S/visited]
    queries: Visits  # the same
    keys: Visits  # [B S/own 1 3+T/visited]


def choose_tiles(dtype) -> Tiles:
    """The fastest of those tried on an H100 with rows of trees (benchmarks/attention_gpu.py)."""
    if jnp.dtype(dtype).itemsize > 2:
        return Tiles(Tile(64, 32), Tile(64, 32), Tile(64, 32))
    return Tiles(Tile(64, 64, 4, 3), Tile(64, 64), Tile(64, 64))


def triton_plan(
    until: Int[Array, "B S"],
    tiles: Tiles,
    start: int | Int[Array, ""] = 0,
    length: int | None = None,
    window: Window | None = None,
) -> KernelPlan:
    """The plan of rows; arguments of `mask.allowed`, multiples of 128."""

    def visits(tile: Tile, turned: bool = False) -> Visits:
        blocks = (tile.visited, tile.own) if turned else (tile.own, tile.visited)
        numbers, full, empty = block_kinds(until, blocks, start, length, window)
        if turned:
            full, empty = full.swapaxes(1, 2), empty.swapaxes(1, 2)
        first = jnp.broadcast_to(start if turned else numbers * tile.own, full.shape[:2])
        counts = (x[..., None] for x in (first, full.sum(-1), (~empty).sum(-1)))
        table = jnp.concatenate([*counts, visiting_order(full, empty)], axis=-1).astype(jnp.int32)
        return jnp.expand_dims(table, 2 if turned else 1)

    return KernelPlan(visits(tiles.forward), visits(tiles.queries), visits(tiles.keys, turned=True))


def _load(ref, head_dim: int, *index) -> Array:
    """Rows of a head, with zeros after it."""
    ref = ref.at[*index, :] if index else ref
    if head_dim == ref.shape[-1]:
        return gpu.load(ref)
    return gpu.load(ref, mask=(jnp.arange(ref.shape[-1]) < head_dim)[None, :], other=0.0)


def _store(ref, x: Array, head_dim: int):
    mask = None if head_dim == ref.shape[-1] else (jnp.arange(ref.shape[-1]) < head_dim)[None, :]
    gpu.store(ref, x.astype(ref.dtype), mask=mask)


def _allowed(rows, first_query, queries: int, first_key, keys: int, turned: bool = False) -> Bool[Array, "Q K"]:
    """The mask of a block, [K Q] if `turned`; `rows` are references to until and window."""
    until, window = rows
    of_query, of_key = (
        (lambda x: x[None, :], lambda x: x[:, None]) if turned else (lambda x: x[:, None], lambda x: x[None, :])
    )
    i, j = of_query(first_query + jnp.arange(queries)), of_key(first_key + jnp.arange(keys))
    mask = (j <= i) & (i < of_key(until[pl.ds(first_key, keys)]))
    if window is not None:
        positions = of_query(window.positions[pl.ds(first_query, queries)])
        mask &= positions < of_key(window.reach[pl.ds(first_key, keys)])
    return mask


def _forward_kernel(q_ref, k_ref, v_ref, rows, visits, out_ref, lse_ref, *, head_dim: int, keys: int):
    queries, width = q_ref.shape
    first = visits[START]
    q = _load(q_ref, head_dim)

    def step(turn, masked, carry):
        peak, total, out = carry
        j = visits[NUMBERS + turn] * keys
        k, v = (_load(x, head_dim, pl.ds(j, keys)) for x in (k_ref, v_ref))
        scores = gpu.dot(q, k.T) * _scale(head_dim)
        if masked:
            scores = jnp.where(_allowed(rows, first, queries, j, keys), scores, NEGATIVE)
        new_peak = jnp.maximum(peak, scores.max(-1))
        weights = jnp.exp2(scores - new_peak[:, None])
        shrink = jnp.exp2(peak - new_peak)
        out = out * shrink[:, None] + gpu.dot(weights.astype(v.dtype), v)
        return new_peak, total * shrink + weights.sum(-1), out

    start = jnp.full(queries, NEGATIVE), jnp.zeros(queries), jnp.zeros((queries, width))
    peak, total, out = visiting(visits[FULL], visits[VISITED], step, start)
    _store(out_ref, out / total[:, None], head_dim)
    lse_ref[...] = peak + jnp.log(total) * math.log2(math.e)


def _queries_kernel(
    q_ref, k_ref, v_ref, rows, visits, gradient_ref, lse_ref, overlap_ref, dq_ref, *, head_dim: int, keys: int
):
    queries, width = q_ref.shape
    first = visits[START]
    q, gradient = (_load(x, head_dim) for x in (q_ref, gradient_ref))
    lse, overlap = (x[...][:, None] for x in (lse_ref, overlap_ref))

    def step(turn, masked, dq):
        j = visits[NUMBERS + turn] * keys
        k, v = (_load(x, head_dim, pl.ds(j, keys)) for x in (k_ref, v_ref))
        weights = jnp.exp2(gpu.dot(q, k.T) * _scale(head_dim) - lse)
        if masked:
            weights = jnp.where(_allowed(rows, first, queries, j, keys), weights, 0.0)
        dscores = weights * (gpu.dot(gradient, v.T) - overlap)
        return dq + gpu.dot(dscores.astype(k.dtype), k)

    dq = visiting(visits[FULL], visits[VISITED], step, jnp.zeros((queries, width)))
    _store(dq_ref, dq * head_dim**-0.5, head_dim)


def _keys_kernel(
    q_ref,
    k_ref,
    v_ref,
    rows,
    visits,
    gradient_ref,
    lse_ref,
    overlap_ref,
    dk_ref,
    dv_ref,
    *,
    head_dim: int,
    queries: int,
):
    """Scores stand turned here, [K Q], so that products take them from the registers where they are."""
    (keys, width), group = k_ref.shape, q_ref.shape[1]
    j = pl.program_id(1) * keys
    k, v = (_load(x, head_dim) for x in (k_ref, v_ref))

    def step(turn, masked, carry):
        dk, dv = carry
        head = jax.lax.rem(turn, group)
        i = visits[NUMBERS + jax.lax.div(turn, group)] * queries
        q, gradient = (_load(x, head_dim, pl.ds(i, queries), head) for x in (q_ref, gradient_ref))
        lse, overlap = (x[head, pl.ds(i, queries)][None, :] for x in (lse_ref, overlap_ref))
        weights = jnp.exp2(gpu.dot(k, q.T) * _scale(head_dim) - lse)
        if masked:
            mask = _allowed(rows, visits[START] + i, queries, j, keys, turned=True)
            weights = jnp.where(mask, weights, 0.0)
        dv = dv + gpu.dot(weights.astype(q.dtype), gradient)
        dscores = weights * (gpu.dot(v, gradient.T) - overlap)
        return dk + gpu.dot(dscores.astype(q.dtype), q), dv

    dk, dv = visiting(visits[FULL] * group, visits[VISITED] * group, step, (jnp.zeros((keys, width)),) * 2)
    _store(dk_ref, dk * head_dim**-0.5, head_dim)
    _store(dv_ref, dv, head_dim)


def _scale(head_dim: int) -> float:
    return head_dim**-0.5 * math.log2(math.e)


def _call(kernel, tile: Tile, grid: tuple[int, int, int], inputs, outputs, interpret: bool):
    """The kernel over its grid: heads, blocks, rows. Inputs and outputs are arrays or shapes, with their parts."""
    (arrays, in_specs), (shapes, out_specs) = (zip(*x, strict=True) for x in (inputs, outputs))
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in shapes]
    params = gpu.CompilerParams(num_warps=tile.warps, num_stages=tile.stages)
    call = pl.pallas_call(
        kernel, grid=grid, in_specs=in_specs, out_specs=out_specs, out_shape=shapes, compiler_params=params,
        interpret=interpret,
    )  # fmt: skip
    return call(*arrays)


def _by_queries(q: Heads, k: Keys, rows, visits: Visits, own: int):
    """Grid and parts of a program with a block of one head's queries; the last first, which has most to do."""
    (B, T, N, H), (_, S, K, _) = q.shape, k.shape
    width, last = pl.next_power_of_2(H), T // own - 1
    queries = pl.BlockSpec((None, own, None, width), lambda h, i, b: (b, last - i, h, 0))
    keys = pl.BlockSpec((None, S, None, width), lambda h, i, b: (b, 0, jax.lax.div(h, N // K), 0))
    numbers = pl.BlockSpec((None, None, own), lambda h, i, b: (b, h, last - i))
    visited = pl.BlockSpec((None, None, None, visits.shape[-1]), lambda h, i, b: (b, 0, last - i, 0))
    return (N, last + 1, B), queries, keys, numbers, _whole(rows), visited


def _whole(rows):
    return jax.tree.map(lambda x: pl.BlockSpec((None, x.shape[1]), lambda h, i, b: (b, 0)), rows)


def forward_pass(q, k, v, rows, visits, tile: Tile, interpret: bool) -> tuple[Heads, Float[Array, "B N T"]]:
    """Output, and the log-sum-exp of the scores, both in powers of two. `rows` are until and window."""
    B, T, N, H = q.shape
    grid, queries, keys, numbers, whole, visited = _by_queries(q, k, rows, visits, tile.own)
    inputs = (q, queries), (k, keys), (v, keys), (rows, whole), (visits, visited)
    outputs = (q, queries), (jax.ShapeDtypeStruct((B, N, T), jnp.float32), numbers)
    return _call(
        functools.partial(_forward_kernel, head_dim=H, keys=tile.visited), tile, grid, inputs, outputs, interpret
    )


def queries_pass(q, k, v, rows, visits, gradient, lse, overlap, tile: Tile, interpret: bool) -> Heads:
    """The gradient of q, from that of the output."""
    grid, queries, keys, numbers, whole, visited = _by_queries(q, k, rows, visits, tile.own)
    inputs = (q, queries), (k, keys), (v, keys), (rows, whole), (visits, visited)
    inputs += (gradient, queries), (lse, numbers), (overlap, numbers)
    return _call(
        functools.partial(_queries_kernel, head_dim=q.shape[-1], keys=tile.visited),
        tile,
        grid,
        inputs,
        ((q, queries),),
        interpret,
    )[0]


def keys_pass(q, k, v, rows, visits, gradient, lse, overlap, tile: Tile, interpret: bool) -> tuple[Keys, Keys]:
    """The gradients of k and v; a program has all query heads that share its keys."""
    (B, T, N, H), (_, S, K, _) = q.shape, k.shape
    width = pl.next_power_of_2(H)
    queries = pl.BlockSpec((None, T, N // K, width), lambda h, j, b: (b, 0, h, 0))
    keys = pl.BlockSpec((None, tile.own, None, width), lambda h, j, b: (b, j, h, 0))
    numbers = pl.BlockSpec((None, N // K, T), lambda h, j, b: (b, h, 0))
    visited = pl.BlockSpec((None, None, None, visits.shape[-1]), lambda h, j, b: (b, j, 0, 0))
    inputs = (q, queries), (k, keys), (v, keys), (rows, _whole(rows)), (visits, visited)
    inputs += (gradient, queries), (lse, numbers), (overlap, numbers)
    kernel = functools.partial(_keys_kernel, head_dim=H, queries=tile.visited)
    return _call(kernel, tile, (K, S // tile.own, B), inputs, ((k, keys), (v, keys)), interpret)


def triton_attention(
    q: Heads,
    k: Keys,
    v: Keys,
    until: Int[Array, "B S"],
    window: Window | None,
    plan: KernelPlan,
    tiles: Tiles,
    interpret: bool = False,
) -> Heads:
    """Self-attention under the mask of `mask.allowed`, softmax in float32; k, v, until and window are of whole rows.

    `plan` is the `triton_plan` of these until, window and tiles; `interpret` runs the kernels in plain JAX, anywhere.
    """
    return _attention(q, k, v, (until, window), plan, tiles, interpret)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _attention(q, k, v, rows, plan, tiles, interpret):
    return forward(q, k, v, rows, plan, tiles, interpret)[0]


def forward(q, k, v, rows, plan: KernelPlan, tiles: Tiles, interpret: bool):
    """Output, and what the backward pass needs."""
    found = forward_pass(q, k, v, rows, plan.forward, tiles.forward, interpret)
    out, lse = (checkpoint_name(x, ATTENTION) for x in found)
    return out, (q, k, v, rows, plan, out, lse)


def overlaps(out: Heads, gradient: Heads) -> Float[Array, "B N T"]:
    """Of outputs and their gradients, which is what the gradients of a query's weights have in common."""
    return (out.astype(jnp.float32) * gradient.astype(jnp.float32)).sum(-1).swapaxes(1, 2)


def _backward(tiles, interpret, saved, gradient):
    q, k, v, rows, plan, out, lse = saved
    rest = gradient, lse, overlaps(out, gradient)
    dq = queries_pass(q, k, v, rows, plan.queries, *rest, tiles.queries, interpret)
    return dq, *keys_pass(q, k, v, rows, plan.keys, *rest, tiles.keys, interpret), None, None


_attention.defvjp(forward, _backward)
