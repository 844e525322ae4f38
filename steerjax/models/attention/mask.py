"""The one mask, and dense attention under it.

A packed row is trees laid out depth first, so that the tokens that see token j are those from j to the end of its
subtree: one integer a token, `until[j]`, is the whole mask. Padding sees itself, so that no softmax is empty.
(FlashMask's column form for causal masks, arXiv 2410.01359; tree training, arXiv 2511.00413.)
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

Heads = Float[Array, "B T N H"]  # of queries and outputs
Keys = Float[Array, "B S K H"]  # and values; N / K query heads share one

ATTENTION = "attention"  # checkpoint name of what attention's backward pass needs of its forward pass


class Window(NamedTuple):
    """A sliding window (Mistral's): a token at position p is seen up to position p + window - 1 of its own text."""

    positions: Int[Array, "B S"]
    reach: Int[Array, "B S"]  # position + window


def allowed(
    until: Int[Array, "B S"],
    start: int | Int[Array, ""] = 0,
    length: int | None = None,
    window: Window | None = None,
) -> Bool[Array, "B T S"]:
    """True where a query sees a key: `j <= i < until[j]`, and `positions[i] < reach[j]` where there is a window.

    `start` and `length` are the queries', all by default.
    """
    S = until.shape[1]
    queries = start + jnp.arange(length or S)[:, None]
    mask = (jnp.arange(S) <= queries) & (queries < until[:, None, :])
    if window is None:
        return mask
    positions = jax.lax.dynamic_slice_in_dim(window.positions, start, length or S, axis=1)
    return mask & (positions[:, :, None] < window.reach[:, None, :])


def attend(q: Heads, parts: Sequence[tuple[Keys, Keys]], mask: Bool[Array, "B T S"]) -> Heads:
    """Softmax attention, in float32, over the keys that `mask` allows.

    Keys and values come in parts, one after the other, so that a cache is not copied to put new keys after it.
    """
    B, T, N, H = q.shape
    K = parts[0][0].shape[2]
    # Queries of a group are one dimension, Q, and stand first: otherwise XLA turns all of a cache around on a CPU.
    grouped = jnp.moveaxis(q.reshape(B, T, K, N // K, H), 1, 3).reshape(B, K, -1, H)
    scores = [jnp.einsum("BKQH,BSKH->BKQS", grouped, k, preferred_element_type=jnp.float32) for k, _ in parts]
    scores = jnp.concatenate(scores, axis=-1).reshape(B, K, N // K, T, -1) * H**-0.5
    scores = jnp.where(mask[:, None, None], scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(q.dtype).reshape(B, K, -1, mask.shape[-1])
    weights = jnp.split(weights, np.cumsum([k.shape[1] for k, _ in parts])[:-1], axis=-1)
    out = sum(jnp.einsum("BKQS,BSKH->BKQH", w, v) for w, (_, v) in zip(weights, parts, strict=True))
    return jnp.moveaxis(out.reshape(B, K, N // K, T, -1), 3, 1).reshape(B, T, N, -1)


class Cache(NamedTuple):
    """Keys (turned by RoPE) and values of tokens that were seen before; of a stack of layers with a leading L."""

    keys: Float[Array, "*L B S K H"]
    values: Float[Array, "*L B S K H"]


def cached_attention(q: Heads, k: Keys, v: Keys, cache: Cache, mask: Bool[Array, "B T S+T"], chunk: int = 256) -> Heads:
    """Attention of new tokens over cached ones and over themselves, `chunk` queries at a time.

    `mask` is over cached, then new tokens; a token sees no new one after it.
    """
    outputs, S = [], cache.keys.shape[1]
    for start in range(0, q.shape[1], chunk):
        end = start + chunk  # slices stop where the arrays do
        outputs.append(attend(q[:, start:end], (cache, (k[:, :end], v[:, :end])), mask[:, start:end, : S + end]))
    return jnp.concatenate(outputs, axis=1)


def causal_attention(
    q: Heads,
    k: Keys,
    v: Keys,
    until: Int[Array, "B S"],
    chunk: int = 256,
    start: int | Int[Array, ""] = 0,
    window: Window | None = None,
) -> Heads:
    """Attention over packed rows, `chunk` queries at a time, with only the keys before them, and no scores kept.

    k, v, until and window are of whole rows, in which the queries start at `start`; where that is no plain number, the
    future is masked, not skipped.
    """

    @jax.checkpoint
    def attend_chunk(q, k, v, until, start):
        near = window and Window(window.positions, window.reach[:, : until.shape[1]])
        return attend(q, ((k, v),), allowed(until, start, q.shape[1], near))

    outputs = []
    for begin in range(0, q.shape[1], chunk):
        seen = slice(start + begin + chunk if isinstance(start, int) else None)
        queries = q[:, begin : begin + chunk]
        outputs.append(attend_chunk(queries, k[:, seen], v[:, seen], until[:, seen], start + begin))
    return jnp.concatenate(outputs, axis=1)


def seen_mean(hidden: Float[Array, "B T D"], until: Int[Array, "B T"], chunk: int = 256) -> Float[Array, "B T D"]:
    """For every place the mean of the states of the places it sees, in float32: attention whose scores are all 0."""
    zeros, values = jnp.zeros((*until.shape, 1, 1)), hidden[:, :, None].astype(jnp.float32)
    with jax.default_matmul_precision("highest"):
        return causal_attention(zeros, zeros, values, until, chunk)[:, :, 0]
