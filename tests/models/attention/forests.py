"""Random forests in a row, and the mask by the definition of ancestors: what the back ends are held to."""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import strategies as st

from steerjax.models.attention import backends, make_plan, self_attention, triton
from steerjax.models.attention.kernels import cudnn_attention, splash_attention
from steerjax.models.attention.triton import triton_attention

NAMES = ("chunked", "blockwise", "splash", "cudnn", "triton")


class Node(NamedTuple):
    """So many tokens, then the branches that go on from them."""

    length: int
    children: tuple[Node, ...] = ()


def trees(depth: int, longest: int) -> st.SearchStrategy[Node]:
    """Trees of at most this depth, whose nodes have 1 to `longest` tokens."""
    children = st.lists(trees(depth - 1, longest), max_size=3).map(tuple) if depth > 1 else st.just(())
    return st.builds(Node, st.integers(1, longest), children)


def random_tree(random: np.random.Generator, depth: int, longest: int) -> Node:
    children = random.integers(0, 4) if depth > 1 else 0
    return Node(
        int(random.integers(1, longest)), tuple(random_tree(random, depth - 1, longest) for _ in range(children))
    )


def lay_out(forest, length: int) -> tuple[np.ndarray, np.ndarray]:
    """`until` [T] of a row, and which places are each token's ancestors or itself [T T]. Cut where the row is full."""
    until, mask = np.arange(1, length + 1), np.eye(length, dtype=bool)
    place = 0

    def write(node: Node, ancestors: list[int]):
        nonlocal place
        own = list(range(place, min(place + node.length, length)))
        place += len(own)
        for i, token in enumerate(own):
            mask[token, ancestors + own[:i]] = True
        for child in node.children:
            write(child, ancestors + own)
        until[own] = place

    for tree in forest:
        write(tree, [])
    return until.astype(np.int32), mask


def random_rows(rows: int, length: int, longest: int, padding: int = 0, seed: int = 0):
    """`until` [B T], mask [B T T] and which tokens are real [B T]: forests of depth 6, the last row ends in padding."""
    random = np.random.default_rng(seed)
    parts = []
    for row in range(rows):
        end = length - (padding if row == rows - 1 else 0)
        until, mask = lay_out([random_tree(random, 6, longest) for _ in range(length)], end)
        whole, square = np.arange(1, length + 1, dtype=np.int32), np.eye(length, dtype=bool)
        whole[:end], square[:end, :end] = until, mask
        parts.append((whole, square, np.arange(length) < end))
    return tuple(np.stack(x) for x in zip(*parts, strict=True))


def arrays(B: int, T: int, N: int, K: int, H: int, dtype=jnp.float32):
    """q, k, v, and weights of the outputs in a loss."""
    random = np.random.default_rng(0)
    return [jnp.asarray(random.normal(size=(B, T, heads, H)), dtype) for heads in (N, K, K, N)]


def by_definition(q, k, v, mask):
    """Softmax over the ancestors, with no code of the package."""
    k, v = (jnp.repeat(x, q.shape[2] // x.shape[2], axis=2) for x in (k, v))
    scores = jnp.einsum("BTNH,BSNH->BNTS", q, k) / np.sqrt(q.shape[-1])
    return jnp.einsum("BNTS,BSNH->BTNH", jax.nn.softmax(jnp.where(mask[:, None], scores, -jnp.inf)), v)


def attention(name: str, chunk: int, q, k, v, mask):
    """`mask` is `until`, or that and a window."""
    until, window = mask if isinstance(mask, tuple) else (mask, None)
    return self_attention(q, k, v, make_plan(name, until, chunk, q.dtype, window))


@functools.partial(jax.jit, static_argnums=0)
def values_and_gradients(attention, q, k, v, weights, mask):
    """The output, and the gradients of q, k and v. `mask` is what the attention takes as its last argument."""

    def loss(q, k, v):
        out = attention(q, k, v, mask)
        return (out * weights).sum(dtype=jnp.float32), out

    gradients, out = jax.grad(loss, argnums=(0, 1, 2), has_aux=True)(q, k, v)
    return out, *gradients


def assert_equal(ours, expected):
    """The design's tolerance of equality: max |a - b| <= 1e-5 max |b|, an array."""
    for a, b in zip(ours, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * float(jnp.abs(b).max()))


def kernels_anywhere(monkeypatch):
    """The kernels for TPU and GPU as plain JAX: ours and splash interpreted, cuDNN in its other implementation."""
    for module, kernel in ((backends, splash_attention), (triton, triton_attention)):
        monkeypatch.setattr(module, kernel.__name__, functools.partial(kernel, interpret=True))
    monkeypatch.setattr(backends, "cudnn_attention", functools.partial(cudnn_attention, implementation="xla"))


def block_kinds(mask: np.ndarray, block: int | tuple[int, int]) -> np.ndarray:
    """Of a row's mask [T S]: 0 where a block (of queries, of keys) holds no allowed pair, 2 where all are, else 1."""
    (T, S), (q, k) = mask.shape, np.broadcast_to(block, 2)
    blocks = mask.reshape(T // q, q, S // k, k)
    return blocks.any((1, 3)).astype(int) + blocks.all((1, 3))
