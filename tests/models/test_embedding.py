"""A look-up in a table that lies in pieces equals one in a whole table, forward and backward."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from steerjax.models.embedding import look_up
from steerjax.parallel.mesh import MeshConfig, make_mesh
from steerjax.parallel.rules import partition_spec

TABLE = np.arange(64 * 16, dtype=np.float32).reshape(64, 16)


def loss(table, tokens, weights):
    rows = look_up(table, tokens)
    return jnp.sum(rows * weights), rows


@pytest.mark.parametrize("mesh", [(8, 1, 1, 1), (1, 8, 1, 1), (2, 2, 2, 1), (1, 2, 2, 2), (1, 1, 8, 1)], ids=str)
@pytest.mark.parametrize("shape", [(8, 4), (3, 1)], ids=str)  # the mesh may not divide a batch that is decoded
def test_equals_a_whole_table(mesh, shape):
    random = np.random.default_rng(0)
    tokens = random.integers(0, 64, shape).astype(np.int32)
    weights = random.normal(size=(*shape, 16)).astype(np.float32)
    expected = np.zeros_like(TABLE)
    np.add.at(expected, tokens, weights)
    with jax.set_mesh(mesh := make_mesh(MeshConfig(*mesh), jax.devices())):
        table = jax.device_put(TABLE, NamedSharding(mesh, partition_spec(("vocab", "embed"))))
        gradient, rows = jax.jit(jax.grad(loss, has_aux=True))(table, tokens, weights)
    np.testing.assert_array_equal(rows, TABLE[tokens])
    np.testing.assert_allclose(gradient, expected, rtol=1e-6)
