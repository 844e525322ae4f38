"""The one table of axes refuses what it cannot place."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec

from steerjax.errors import ConfigError
from steerjax.parallel import rules
from steerjax.parallel.mesh import MeshConfig, make_mesh, mesh_shape, parse_mesh
from tests.refusals import refused

pytestmark = pytest.mark.short


def test_specs_follow_the_table():
    assert rules.partition_spec(("batch", "length", None)) == PartitionSpec(("data", "fsdp"), "context", None)
    assert rules.partition_spec(("layers", "embed", "mlp")) == PartitionSpec(None, "fsdp", "tensor")


def test_collisions_and_unknown_names_are_errors():
    with refused(ConfigError, "heads", "mlp", "tensor", cure="RULES"):
        rules.partition_spec(("heads", "mlp"))
    with refused(ConfigError, "hidden", cure="RULES"):
        rules.partition_spec(("hidden",))


def test_mesh_shapes():
    assert mesh_shape(MeshConfig(data=-1, fsdp=2), 8) == (4, 2, 1, 1)
    assert mesh_shape(MeshConfig(data=1, tensor=-1), 8) == (1, 1, 8, 1)
    with refused(ConfigError, "data 2", "fsdp 2", "8 devices"):
        mesh_shape(MeshConfig(data=2, fsdp=2), 8)
    with refused(ConfigError, "data -1", "fsdp 3", "8 devices"):
        mesh_shape(MeshConfig(fsdp=3), 8)


def test_mesh_of_a_command_line():
    assert parse_mesh("fsdp=2,tensor=4") == MeshConfig(fsdp=2, tensor=4)
    assert parse_mesh("") == MeshConfig()
    for text, key in (
        ("fsdp", "--mesh.fsdp"),
        ("rows=2", "rows"),
        ("fsdp=0", "--mesh.fsdp"),
        ("fsdp=-1", "at most one"),
    ):
        with refused(ConfigError, key):
            parse_mesh(text)


def test_constrain_is_nothing_without_a_mesh_and_a_sharding_with_one():
    x = jnp.ones((8, 4))
    assert rules.constrain(x, "batch", None) is x
    with jax.set_mesh(make_mesh(MeshConfig(), jax.devices())):
        y = jax.jit(lambda x: rules.constrain(x, "batch", None))(x)
    assert y.sharding.shard_shape(y.shape) == (1, 4)
