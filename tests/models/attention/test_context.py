"""Attention on a mesh is attention; of a context axis only keys and values are gathered."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from steerjax.models.attention import make_plan
from steerjax.parallel.mesh import MeshConfig, make_mesh
from steerjax.parallel.rules import partition_spec
from steerjax.planning.hlo import work
from tests.models.attention.forests import (
    NAMES,
    arrays,
    assert_equal,
    attention,
    by_definition,
    kernels_anywhere,
    random_rows,
    values_and_gradients,
)

B, T, N, K, H = 2, 512, 4, 2, 16
CHUNK = 32


@pytest.fixture(autouse=True)
def _kernels(monkeypatch):
    kernels_anywhere(monkeypatch)


@functools.cache
def rows():
    """Trees longer than a device's part of a row, and padding."""
    until, mask, _ = random_rows(B, T, longest=70, padding=90)
    return (*arrays(B, T, N, K, H), until), mask


@functools.cache
def expected():
    (*arguments, _), mask = rows()
    return values_and_gradients(by_definition, *arguments, mask)


def compiled(name: str, sizes: tuple[int, ...]):
    """The compiled step, and its arguments in their shards."""
    mesh = make_mesh(MeshConfig(*sizes), jax.devices()[: int(np.prod(sizes))])
    heads, cut = (partition_spec(axes) for axes in (("batch", "length", "activation_heads"), ("batch", "length")))
    specs = (heads, heads, heads, heads, cut)
    arguments = [jax.device_put(x, NamedSharding(mesh, spec)) for x, spec in zip(rows()[0], specs, strict=True)]
    with jax.set_mesh(mesh):
        step = values_and_gradients.lower(functools.partial(attention, name, CHUNK), *arguments).compile()
    return step, arguments


@pytest.mark.parametrize("mesh", [(1, 1, 1, 1), (1, 1, 1, 2), (1, 1, 1, 4), (2, 1, 2, 2), (1, 2, 2, 1)], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_on_a_mesh_as_by_definition(name, mesh):
    step, arguments = compiled(name, mesh)
    assert_equal(step(*arguments), expected())


@pytest.mark.parametrize("name", NAMES)
def test_only_keys_and_values_are_gathered(name):
    """And their gradients scattered back; else nothing but `until`."""
    found = work(compiled(name, (1, 1, 1, 4))[0].as_text(), 4).collectives
    gathered = [c.shape for c in found if c.kind == "all-gather"]
    assert sorted(set(gathered)) == [(B, T), (B, T, K, H)]
    assert gathered.count((B, T, K, H)) == 2
    assert [c.shape for c in found if c.kind == "reduce-scatter"] == [(B, T // 4, K, H)] * 2
    assert {c.kind for c in found} == {"all-gather", "reduce-scatter"}


@pytest.mark.parametrize("shape", [(1, 1), (3, 64), (2, 90)], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_rows_that_the_mesh_does_not_cut(name, shape):
    """A model is initialised with one token, and rows to rate are of any number and length."""
    until, mask, _ = random_rows(*shape, longest=20)
    q, k, v, weights = arrays(*shape, N, K, H)
    with jax.set_mesh(make_mesh(MeshConfig(2, 1, 1, 4), jax.devices())):
        assert make_plan(name, jnp.asarray(until), CHUNK, q.dtype).name == "chunked"
        ours = values_and_gradients(functools.partial(attention, name, CHUNK), q, k, v, weights, until)
    assert_equal(ours, values_and_gradients(by_definition, q, k, v, weights, mask))
