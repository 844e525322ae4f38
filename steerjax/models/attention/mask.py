"""Attention with one meaning of the mask: causal, within a segment, and across branches only through their prompt."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


class Layout(NamedTuple):
    """Where each token of a packed row belongs.

    Attributes:
        segments: which prompt group, from 1; 0 is padding.
        branches: 0 in the prompt, from 1 in the responses that share it.
    """

    segments: Int[Array, "B T"]
    branches: Int[Array, "B T"]

    def part(self, start: int | Int[Array, ""], length: int) -> Layout:
        """Of so many tokens from `start` on."""
        return Layout(*(jax.lax.dynamic_slice_in_dim(x, start, length, axis=1) for x in self))


def allowed(queries: Layout, keys: Layout, offset: int | Int[Array, ""] = 0) -> Bool[Array, "B T S"]:
    """True where a query may look at a key: not later in the row, same segment, and prompt or the same branch.

    `offset` is the place in the row of the first query, relative to the first key. Padding sees only padding (never
    nothing, so that no softmax is empty).
    """
    T, S = queries.segments.shape[1], keys.segments.shape[1]
    causal = jnp.arange(T)[:, None] + offset >= jnp.arange(S)
    same_segment = queries.segments[:, :, None] == keys.segments[:, None, :]
    key_branch = keys.branches[:, None, :]
    return causal & same_segment & ((key_branch == 0) | (key_branch == queries.branches[:, :, None]))


def attend(
    q: Float[Array, "B T N H"], k: Float[Array, "B S K H"], v: Float[Array, "B S K H"], mask: Bool[Array, "B T S"]
) -> Float[Array, "B T N H"]:
    """Softmax attention over the keys that `mask` allows, N/K query heads to a key-value head; softmax in float32."""
    return attend_parts(q, ((k, v),), mask)


def attend_parts(
    q: Float[Array, "B T N H"], parts: Sequence[tuple[Array, Array]], mask: Bool[Array, "B T S"]
) -> Float[Array, "B T N H"]:
    """`attend` over keys and values in several arrays, so that a cache is never copied to put new keys after it.

    Args:
        parts: (keys, values) [B, S_i, K, H] each.
        mask: over all keys in the order of the parts; S is the sum of the S_i.
    """
    B, T, N, H = q.shape
    K = parts[0][0].shape[2]
    grouped = q.reshape(B, T, K, N // K, H)
    scores = [jnp.einsum("BTKGH,BSKH->BKGTS", grouped, k, preferred_element_type=jnp.float32) for k, _ in parts]
    scores = scores[0] if len(parts) == 1 else jnp.concatenate(scores, axis=-1)
    scores = jnp.where(mask[:, None, None], scores * H**-0.5, jnp.finfo(jnp.float32).min)
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
        parts = ((k[:, :end], v[:, :end]),) if S == 0 else (cache, (k[:, :end], v[:, :end]))
        outputs.append(attend_parts(q[:, start:end], parts, mask[:, start:end, : S + end]))
    return outputs[0] if len(outputs) == 1 else jnp.concatenate(outputs, axis=1)


def causal_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    layout: Layout,
    chunk: int = 256,
    start: int | Int[Array, ""] = 0,
) -> Float[Array, "B T N H"]:
    """Self-attention over packed rows, the queries in chunks that are given only the keys before them.

    Half of the score matrix is never computed, and none of it is kept for the backward pass.

    Args:
        k, v, layout: of the whole rows [B, S, ...].
        chunk: queries a chunk, in tokens.
        start: where in the row the queries start. Where it is not a plain number, the future is masked, not skipped.
    """
    T, S = q.shape[1], k.shape[1]
    outputs = []
    for begin in range(0, T, chunk):
        end = min(begin + chunk, T)
        seen = start + end if isinstance(start, int) else S
        before = Layout(*(x[:, :seen] for x in layout))
        outputs.append(_attend_chunk(q[:, begin:end], k[:, :seen], v[:, :seen], before, start + begin))
    return outputs[0] if len(outputs) == 1 else jnp.concatenate(outputs, axis=1)


@jax.checkpoint
def _attend_chunk(q, k, v, layout, start):
    return attend(q, k, v, allowed(layout.part(start, q.shape[1]), layout, offset=start))
