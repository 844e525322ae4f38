"""Attention that computes only the blocks the mask allows, in plain JAX.

The bounds of `until` in a block tell whether it is empty, full or mixed; loops visit the full ones without a mask and
the mixed ones with it, forward with a running softmax and backward from the saved log-sum-exp (FlashAttention-2, arXiv
2307.08691, algorithms 1 and 2).
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from steerjax.models.attention.mask import ATTENTION, Heads, Keys, Window

NEGATIVE = -1e30  # finite: a block may hold no key for a query, and inf - inf is NaN
_einsum = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)


class BlockPlan(NamedTuple):
    """For each block of queries, the blocks of keys to visit. n is T / block, m is S / block."""

    queries: Int[Array, "B n"]  # number of the block in its row
    keys: Int[Array, "B n m"]  # numbers: allowed throughout, then in part, each ascending, then not at all
    full: Int[Array, "B n"]  # how many are allowed throughout
    visited: Int[Array, "B n"]  # how many are allowed at all


def block_plan(
    until: Int[Array, "B S"],
    block: int,
    start: int | Int[Array, ""] = 0,
    length: int | None = None,
    window: Window | None = None,
) -> BlockPlan:
    """The plan of rows; arguments of `mask.allowed`, multiples of `block`."""
    numbers, full, empty = block_kinds(until, (block, block), start, length, window)
    keys = visiting_order(full, empty)
    queries = jnp.broadcast_to(numbers, (len(until), len(numbers)))
    return BlockPlan(*(x.astype(jnp.int32) for x in (queries, keys, full.sum(-1), (~empty).sum(-1))))


def block_kinds(until, blocks: tuple[int, int], start=0, length=None, window: Window | None = None):
    """Numbers of the blocks of queries [n], and which blocks of pairs are allowed throughout, and not at all [B n m].

    `blocks` are tokens a block of queries and of keys; the other arguments are `block_plan`'s.
    """
    (B, S), (q, k) = until.shape, blocks
    numbers = start // q + jnp.arange((length or S) // q)
    first = numbers[:, None] * q  # queries first to end - 1, keys from k0 on
    end, k0 = first + q, jnp.arange(0, S, k)
    bounds = until.reshape(B, 1, S // k, k)
    full = (k0 + k - 1 <= first) & (bounds.min(-1) >= end)
    empty = (k0 >= end) | (bounds.max(-1) <= first)
    if window is not None:
        positions, reach = (x.reshape(B, S // size, size) for x, size in zip(window, blocks, strict=True))
        positions, reach = positions[:, numbers, None], reach[:, None]
        full &= positions.max(-1) < reach.min(-1)
        empty |= positions.min(-1) >= reach.max(-1)
    return numbers, full, empty


def visiting_order(full: Bool[Array, "... m"], empty: Bool[Array, "... m"]) -> Int[Array, "... m"]:
    """Numbers of blocks: those allowed throughout, then in part, each ascending, then not at all."""
    return jnp.argsort(jnp.where(full, 0, jnp.where(empty, 2, 1)), axis=-1, stable=True)


def visiting(full, visited, step, carry):
    """`step(place, masked, carry)` for each place in `visiting_order`: the `full` first ones, then up to `visited`."""
    for begin, end, masked in ((0, full, False), (full, visited, True)):
        body = lambda place, carry, masked=masked: step(place, masked, carry)  # noqa: E731
        carry = jax.lax.fori_loop(begin, end, body, carry)
    return carry


class _Row(NamedTuple):
    """One row in blocks of b tokens, query heads grouped by their key-value head."""

    q: Float[Array, "n K Gb H"]  # G query heads times b tokens, over the root of H
    k: Float[Array, "m K b H"]
    v: Float[Array, "m K b H"]
    until: Int[Array, "m b"]
    window: Window | None  # in blocks, too


def _scores(row: _Row, plan: BlockPlan, i, j, masked: bool) -> Float[Array, "K Gb b"]:
    scores = _einsum("KQH,KSH->KQS", row.q[i], row.k[j])
    if not masked:
        return scores
    place = jnp.arange(b := row.until.shape[1])
    queries = (plan.queries[i] * b + place)[:, None]
    mask = (j * b + place <= queries) & (queries < row.until[j])
    if row.window is not None:
        mask &= row.window.positions[plan.queries[i]][:, None] < row.window.reach[j]
    return jnp.where(jnp.tile(mask, (scores.shape[1] // b, 1)), scores, NEGATIVE)


def _over_keys(plan: BlockPlan, i: Int[Array, ""], visit, carry):
    """`visit(j, masked, carry)` for each block j of keys that queries of block i see."""
    step = lambda place, masked, carry: visit(plan.keys[i, place], masked, carry)  # noqa: E731
    return visiting(plan.full[i], plan.visited[i], step, carry)


def _forward_row(row: _Row, plan: BlockPlan):
    """Output [n, K, Gb, H] and log-sum-exp [n, K, Gb] of one row."""
    n, K, Gb, H = row.q.shape

    def queries(i):
        def visit(j, masked, carry):
            peak, total, out = carry
            scores = _scores(row, plan, i, j, masked)
            new_peak = jnp.maximum(peak, scores.max(-1))
            weights = jnp.exp(scores - new_peak[..., None])
            shrink = jnp.exp(peak - new_peak)
            values = _einsum("KQS,KSH->KQH", weights.astype(row.v.dtype), row.v[j])
            return new_peak, total * shrink + weights.sum(-1), out * shrink[..., None] + values

        start = (jnp.full((K, Gb), NEGATIVE), jnp.zeros((K, Gb)), jnp.zeros((K, Gb, H)))
        peak, total, out = _over_keys(plan, i, visit, start)
        return (out / total[..., None]).astype(row.q.dtype), peak + jnp.log(total)

    return jax.lax.map(queries, jnp.arange(n))


def _backward_row(row: _Row, plan: BlockPlan, out, logsumexp, gradient):
    """Gradients of q, k, v of one row, in blocks."""
    n, K, Gb, H = row.q.shape
    overlap = _einsum("nKQH,nKQH->nKQ", out, gradient)

    def queries(carry, i):
        # Turned once here: XLA's CPU sums over the first dimension of two matrices at half the speed.
        q, dout = (x[i].swapaxes(-1, -2) for x in (row.q, gradient))

        def visit(j, masked, carry):
            dq, dk, dv = carry
            weights = jnp.exp(_scores(row, plan, i, j, masked) - logsumexp[i][..., None])
            dweights = _einsum("KQH,KSH->KQS", gradient[i], row.v[j])
            dscores = (weights * (dweights - overlap[i][..., None])).astype(row.q.dtype)
            weights = weights.astype(row.q.dtype)
            dq = dq + _einsum("KQS,KSH->KQH", dscores, row.k[j])
            dk = dk.at[j].add(_einsum("KHQ,KQS->KHS", q, dscores))
            dv = dv.at[j].add(_einsum("KHQ,KQS->KHS", dout, weights))
            return dq, dk, dv

        dq, dk, dv = _over_keys(plan, i, visit, (jnp.zeros((K, Gb, H)), *carry))
        return (dk, dv), dq

    turned = jnp.zeros(row.k.swapaxes(-1, -2).shape)
    (dk, dv), dq = jax.lax.scan(queries, (turned, turned), jnp.arange(n))
    return dq * H**-0.5, dk.swapaxes(-1, -2), dv.swapaxes(-1, -2)


def _to_blocks(x: Heads, K: int, block: int) -> Float[Array, "B n K Gb H"]:
    B, T, N, H = x.shape
    x = x.reshape(B, T // block, block, K, N // K, H).transpose(0, 1, 3, 4, 2, 5)
    return x.reshape(B, T // block, K, N // K * block, H)


def _from_blocks(x: Float[Array, "B n K Gb H"], block: int) -> Heads:
    B, n, K, Gb, H = x.shape
    x = x.reshape(B, n, K, Gb // block, block, H).transpose(0, 1, 4, 2, 3, 5)
    return x.reshape(B, n * block, K * (Gb // block), H)


def _rows(q, k, v, until, window, block: int) -> _Row:
    q = (q * q.shape[-1] ** -0.5).astype(q.dtype)
    heads = (_to_blocks(x, k.shape[2], block) for x in (q, k, v))
    return _Row(*heads, *jax.tree.map(lambda x: x.reshape(len(x), -1, block), (until, window)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(6,))
def blockwise_attention(
    q: Heads, k: Keys, v: Keys, until: Int[Array, "B S"], window: Window | None, plan: BlockPlan, block: int
) -> Heads:
    """Self-attention under the mask of `mask.allowed`, softmax in float32; k, v, until and window are of whole rows.

    `plan` is the `block_plan` of these until, window, queries and block.
    """
    return _forward(q, k, v, until, window, plan, block)[0]


def _forward(q, k, v, until, window, plan, block):
    found = jax.lax.map(lambda x: _forward_row(*x), (_rows(q, k, v, until, window, block), plan))
    out, logsumexp = (checkpoint_name(x, ATTENTION) for x in found)
    return _from_blocks(out, block), (q, k, v, until, window, plan, out, logsumexp)


def _backward(block, saved, gradient):
    q, k, v, until, window, plan, out, logsumexp = saved
    rows, gradient = _rows(q, k, v, until, window, block), _to_blocks(gradient, k.shape[2], block)
    gradients = jax.lax.map(lambda x: _backward_row(*x), (rows, plan, out, logsumexp, gradient))
    return *(_from_blocks(g, block).astype(q.dtype) for g in gradients), None, None, None


blockwise_attention.defvjp(_forward, _backward)
