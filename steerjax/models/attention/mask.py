"""The one mask, and dense attention under it.

A packed row is trees laid out depth first, so that the tokens that see token j are those from j to the end of its
subtree: one integer a token, `until[j]`, is the whole mask. Padding sees itself, so that no softmax is empty.
(FlashMask's column form for causal masks, arXiv 2410.01359; tree training, arXiv 2511.00413.)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
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
    weights = jnp.split(weights, np.cumsum([k.shape[1] for k, _ in parts])[:-1], axis=-1)
    out = sum(jnp.einsum("BKGTS,BSKH->BTKGH", w, v) for w, (_, v) in zip(weights, parts, strict=True))
    return out.reshape(B, T, N, -1)


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

    `mask` is over cached, then new tokens; a token sees no new one after it.
    """
    outputs, S = [], cache.keys.shape[1]
    for start in range(0, q.shape[1], chunk):
        end = start + chunk  # slices stop where the arrays do
        outputs.append(attend(q[:, start:end], (cache, (k[:, :end], v[:, :end])), mask[:, start:end, : S + end]))
    return jnp.concatenate(outputs, axis=1)


def causal_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    until: Int[Array, "B S"],
    chunk: int = 256,
    start: int | Int[Array, ""] = 0,
) -> Float[Array, "B T N H"]:
    """Attention over packed rows, `chunk` queries at a time, which are given only the keys before them.

    Half of the score matrix is never computed, and none of it is kept for the backward pass. k, v and until are of
    whole rows, in which the queries start at `start`; where that is no plain number, the future is masked, not skipped.
    """

    @jax.checkpoint
    def attend_chunk(q, k, v, until, start):
        return attend(q, ((k, v),), allowed(until, start, q.shape[1]))

    outputs = []
    for begin in range(0, q.shape[1], chunk):
        seen = start + begin + chunk if isinstance(start, int) else None
        outputs.append(
            attend_chunk(q[:, begin : begin + chunk], k[:, :seen], v[:, :seen], until[:, :seen], start + begin)
        )
    return jnp.concatenate(outputs, axis=1)


def seen_mean(hidden: Float[Array, "B T D"], until: Int[Array, "B T"], chunk: int = 256) -> Float[Array, "B T D"]:
    """For every place the mean of the states of the places it sees, in float32: attention whose scores are all 0."""
    zeros, values = jnp.zeros((*until.shape, 1, 1)), hidden[:, :, None].astype(jnp.float32)
    with jax.default_matmul_precision("highest"):
        return causal_attention(zeros, zeros, values, until, chunk)[:, :, 0]
