"""The kernels for GPUs that take `until`: interpreted here, and lowered as for a GPU."""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from steerjax.models.attention import Window
from steerjax.models.attention.triton import Tile, Tiles, choose_tiles, triton_attention, triton_plan
from tests.models.attention.forests import (
    arrays,
    assert_equal,
    block_kinds,
    by_definition,
    random_rows,
    values_and_gradients,
)

SQUARE = Tiles(*(Tile(64, 64),) * 3)
MIXED = Tiles(Tile(128, 32), Tile(32, 64), Tile(64, 128))  # blocks that are longer, or shorter, than what they visit


def attend(q, k, v, mask, tiles=None, start=0, interpret=True):
    until, window = mask
    tiles = tiles or choose_tiles(q.dtype)
    plan = triton_plan(until, tiles, start, q.shape[1], window)
    return triton_attention(q, k, v, until, window, plan, tiles, interpret)


@pytest.mark.parametrize(
    ("N", "K", "H", "tiles", "start", "length", "reach"),
    [(3, 1, 64, None, 0, 384, None), (4, 2, 80, SQUARE, 0, 384, 30), (2, 2, 16, MIXED, 128, 128, None)],
)
def test_outputs_and_gradients_equal_the_definition(N, K, H, tiles, start, length, reach):
    """Of grouped heads, a head size that is no power of two, a window, and queries that start somewhere in the row."""
    until, mask, _ = random_rows(2, 384, longest=90, padding=50)
    q, k, v, weights = arrays(2, 384, N, K, H)
    window, positions = None, mask.sum(-1) - 1
    if reach:
        window = Window(positions, positions + reach)
        mask = mask & (positions[:, :, None] - positions[:, None] < reach)
    here = slice(start, start + length)
    q, weights = q[:, here] * 5, weights[:, here]  # with scores far apart
    ours = values_and_gradients(
        functools.partial(attend, tiles=tiles, start=start), q, k, v, weights, (jnp.asarray(until), window)
    )
    assert_equal(ours, values_and_gradients(by_definition, q, k, v, weights, mask[:, here]))


def test_bfloat16_is_near_the_definition():
    until, mask, _ = random_rows(2, 256, longest=60, padding=40)
    q, k, v, weights = arrays(2, 256, N=4, K=2, H=64, dtype=jnp.bfloat16)
    ours = values_and_gradients(attend, q, k, v, weights, (jnp.asarray(until), None))
    expected = values_and_gradients(by_definition, *(x.astype(jnp.float32) for x in (q, k, v, weights)), mask)
    for a, b in zip(ours, expected, strict=True):
        np.testing.assert_allclose(np.asarray(a, np.float32), b, atol=0.01 * float(jnp.abs(b).max()))


@pytest.mark.parametrize(("start", "length"), [(0, 512), (128, 256)])
def test_exactly_the_blocks_with_an_allowed_pair_are_visited_and_full_ones_not_masked(start, length):
    until, mask, _ = random_rows(2, 512, longest=200, padding=70)
    plan = triton_plan(jnp.asarray(until), MIXED, start, length)
    for row in range(2):
        own = mask[row, start : start + length]
        for name, turned in (("forward", False), ("queries", False), ("keys", True)):
            tile = getattr(MIXED, name)
            blocks = (tile.visited, tile.own) if turned else (tile.own, tile.visited)
            kinds = block_kinds(own, blocks)
            visits = getattr(plan, name)[row]
            visits, kinds = (visits[:, 0], kinds.T) if turned else (visits[0], kinds)
            assert visits[:, 0].tolist() == [start + (0 if turned else i * tile.own) for i in range(len(kinds))]
            assert visits[:, 1].tolist() == (kinds == 2).sum(1).tolist()
            assert visits[:, 2].tolist() == (kinds > 0).sum(1).tolist()
            for found, kind in zip(visits[:, 3:], kinds, strict=True):
                assert found.tolist() == [j for k in (2, 1, 0) for j in np.flatnonzero(kind == k)]


def lower(H: int, dtype, window: Window | None = None):
    """Gradients, lowered as for an H100."""

    def gradients(q, k, v, until):
        return jax.grad(lambda *qkv: attend(*qkv, (until, window), interpret=False).sum(), argnums=(0, 1, 2))(q, k, v)

    q, k, v, _ = (jax.ShapeDtypeStruct(x.shape, x.dtype) for x in arrays(2, 384, 6, 2, H, dtype))
    with on_an_h100():
        traced = jax.jit(gradients).trace(q, k, v, jax.ShapeDtypeStruct((2, 384), jnp.int32))
        return traced.lower(lowering_platforms=("cuda",))


def on_an_h100():
    """What jax asks for, from 0.11.2 on, to lower for a GPU that is not there."""
    if not hasattr(jax.sharding, "AbstractDevice"):
        return contextlib.nullcontext()
    device = jax.sharding.AbstractDevice("NVIDIA H100 80GB HBM3", 132, "cuda")
    return jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((1,), ("one",), abstract_device=device))


@pytest.mark.parametrize(
    ("H", "dtype"), [(64, jnp.bfloat16), (80, jnp.float16), (96, jnp.float32), (128, jnp.bfloat16)]
)
def test_it_lowers_for_a_gpu(H, dtype):
    window = Window(*(jnp.zeros((2, 384), jnp.int32),) * 2) if H == 80 else None
    assert lower(H, dtype, window).as_text().count("gpu$xla.gpu.triton") == 3
