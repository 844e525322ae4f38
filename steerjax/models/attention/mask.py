"""The one mask, and dense attention under it.

A packed row is trees laid out depth first, so that the tokens that see token j are those from j to the end of its
subtree: one integer a token, `until[j]`, is the whole mask. Padding sees itself, so that no softmax is empty.
(FlashMask's column form for causal masks, arXiv 2410.01359; tree training, arXiv 2511.00413.)
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def allowed(
    until: Int[Array, "B S"], start: int | Int[Array, ""] = 0, length: int | None = None
) -> Bool[Array, "B T S"]:
    """True where a query sees a key: `j <= i < until[j]`.

    Args:
        until: the first place in the row where each token is no longer seen.
        start, length: of the queries in their rows; all by default.
    """
    S = until.shape[1]
    queries = start + jnp.arange(S if length is None else length)[:, None]
    return (jnp.arange(S) <= queries) & (queries < until[:, None, :])


def attend(
    q: Float[Array, "B T N H"], parts: Sequence[tuple[Array, Array]], mask: Bool[Array, "B T S"]
) -> Float[Array, "B T N H"]:
    """Softmax attention over the keys that `mask` allows, N/K query heads to a key-value head; softmax in float32.

    Args:
        parts: (keys, values) [B, S_i, K, H]; several, so that a cache is not copied to put new keys after it.
        mask: over all keys in the order of the parts; S is the sum of the S_i.
    """
    B, T, N, H = q.shape
    K = parts[0][0].shape[2]
    grouped = q.reshape(B, T, K, N // K, H)
    scores = [jnp.einsum("BTKGH,BSKH->BKGTS", grouped, k, preferred_element_type=jnp.float32) for k, _ in parts]
    scores = jnp.concatenate(scores, axis=-1) * H**-0.5
    scores = jnp.where(mask[:, None, None], scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(q.dtype)
    ends = itertools.accumulate(k.shape[1] for k, _ in parts)
    out = [
        jnp.einsum("BKGTS,BSKH->BTKGH", weights[..., end - v.shape[1] : end], v)
        for end, (_, v) in zip(ends, parts, strict=True)
    ]
    return functools.reduce(jnp.add, out).reshape(B, T, N, H)


class Cache(NamedTuple):
    """Keys (turned by RoPE) and values of tokens that were seen before; of a stack of layers with a leading L."""

    keys: Float[Array, "*L B S K H"]
    values: Float[Array, "*L B S K H"]


def cached_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    cache: Cache,
    mask: Bool[Array, "B T S+T"],
    chunk: int = 256,
) -> Float[Array, "B T N H"]:
    """Attention of new tokens over cached ones and over themselves, `chunk` queries at a time.

    Args:
        mask: over cached, then new tokens; a token sees no new one after it.
    """
    T, S = q.shape[1], cache.keys.shape[1]
    outputs = []
    for start in range(0, T, chunk):
        end = min(start + chunk, T)
        new = (k[:, :end], v[:, :end])
        outputs.append(attend(q[:, start:end], (cache, new) if S else (new,), mask[:, start:end, : S + end]))
    return jnp.concatenate(outputs, axis=1)


def causal_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    until: Int[Array, "B S"],
    chunk: int = 256,
    start: int | Int[Array, ""] = 0,
) -> Float[Array, "B T N H"]:
    """Attention over packed rows, the queries in chunks that are given only the keys before them.

    Half of the score matrix is never computed, and none of it is kept for the backward pass.

    Args:
        k, v, until: of the whole rows.
        chunk: queries a chunk, in tokens.
        start: where in the row the queries start. Where it is not a plain number, the future is masked, not skipped.
    """
    T, S = q.shape[1], k.shape[1]
    outputs = []
    for begin in range(0, T, chunk):
        end = min(begin + chunk, T)
        seen = start + end if isinstance(start, int) else S
        keys = (x[:, :seen] for x in (k, v, until))
        outputs.append(_attend_chunk(q[:, begin:end], *keys, start + begin))
    return jnp.concatenate(outputs, axis=1)


@jax.checkpoint
def _attend_chunk(q, k, v, until, start):
    return attend(q, ((k, v),), allowed(until, start, q.shape[1]))


def seen_mean(hidden: Float[Array, "B T D"], until: Int[Array, "B T"], chunk: int = 256) -> Float[Array, "B T D"]:
    """For every place the mean of the states of the places it sees, in float32.

    Args:
        chunk: places that are computed at a time.
    """
    B, T, D = hidden.shape
    chunk = min(chunk, T)
    hidden = hidden.astype(jnp.float32)

    @jax.checkpoint  # else the masks of all chunks are kept
    def means(start):
        mask = allowed(until, start, chunk)  # of the last chunk some places may lie past the row and see nothing
        weights = mask / jnp.maximum(mask.sum(-1, keepdims=True), 1)
        return jnp.einsum("BTS,BSD->BTD", weights, hidden, precision="highest")

    return jax.lax.map(means, jnp.arange(0, T, chunk)).swapaxes(0, 1).reshape(B, -1, D)[:, :T]
