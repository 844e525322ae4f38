"""One table from logical to mesh axes. Model code names logical axes only; this page decides where they lie."""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
from flax import linen as nn
from flax.core import meta
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from steerjax.errors import ConfigError

# logical axis -> mesh axes, () is replicated. What each letter is: design, docs/scaling.md.
RULES: dict[str | None, tuple[str, ...]] = {
    None: (),
    # activations
    "batch": ("data", "fsdp"),
    "length": ("context",),
    "activation_embed": (),
    "activation_heads": ("tensor",),
    "activation_mlp": ("tensor",),
    # parameters
    "layers": (),
    "embed": ("fsdp",),
    "vocab": ("tensor",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "head": (),
    "mlp": ("tensor",),
    "norm": (),
    "rank": (),
    "attributes": (),
}


def partition_spec(logical_axes: tuple[str | None, ...]) -> PartitionSpec:
    """The mesh axes of an array whose dimensions have these logical names.

    Raises:
        ConfigError: a name that the table lacks, or two dimensions that would lie on the same mesh axis.
    """
    if unknown := set(logical_axes) - RULES.keys():
        raise ConfigError(f"logical axes {sorted(unknown)} are not in parallel/rules.py; cure: add them to RULES")
    used = [axis for name in logical_axes for axis in RULES[name]]
    if clash := {axis for axis in used if used.count(axis) > 1}:
        raise ConfigError(f"{logical_axes}: two dimensions on mesh axis {sorted(clash)}; cure: change RULES")
    return PartitionSpec(*(RULES[name] or None for name in logical_axes))


def on_mesh(mesh: Mesh) -> Callable[[tuple[str | None, ...]], NamedSharding]:
    """Logical axes -> the sharding of an array that has them."""
    return lambda axes: NamedSharding(mesh, partition_spec(axes))


def replicated(mesh: Mesh) -> NamedSharding:
    """All of an array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def shardings_of(tree):
    """The shardings of a tree's leaves."""
    return jax.tree.map(lambda leaf: leaf.sharding, tree)


def constrain(x: jax.Array, *logical_axes: str | None) -> jax.Array:
    """Fixes the layout of an activation on the mesh that is set (`jax.set_mesh`); without a mesh, x as it is."""
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, partition_spec(logical_axes))


def parameter_shardings(boxed, mesh: Mesh):
    """Shardings for a tree of abstract parameters that carry their logical axes (Linen's metadata boxes).

    Raises:
        ConfigError: a dimension that its mesh axes do not divide; names the parameter.
    """

    def one(path, box: meta.AxisMetadata) -> NamedSharding:
        spec = partition_spec(box.names)
        for size, name, axes in zip(box.unbox().shape, box.names, spec, strict=True):
            if size % (ways := mesh_ways(mesh, axes)):
                key = jax.tree_util.keystr(path, simple=True, separator="/")
                raise ConfigError(
                    f"{key}: {name} {size} cannot be cut into {ways} ({axes}); cure: a mesh whose {axes} divides {size}"
                )
        return NamedSharding(mesh, spec)

    return jax.tree_util.tree_map_with_path(one, boxed, is_leaf=lambda x: isinstance(x, meta.AxisMetadata))


def mesh_ways(mesh: Mesh, axes: str | tuple[str, ...] | None) -> int:
    """Into how many parts these mesh axes cut a dimension."""
    return math.prod(mesh.shape[axis] for axis in ((axes,) if isinstance(axes, str) else axes or ()))


def logical(init, *axes: str | None):
    """A Linen initializer whose parameter carries its logical axes."""
    return nn.with_logical_partitioning(init, axes)
