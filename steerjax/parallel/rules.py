"""One table from logical to mesh axes. Model code names logical axes only; this page decides where they lie."""

from __future__ import annotations

import jax
from flax import linen as nn
from flax.core import meta
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from steerjax.errors import ConfigError

# logical axis -> mesh axes, "None" is replicated. What each letter is: design, docs/scaling.md.
RULES: dict[str, tuple[str, ...] | None] = {
    # activations
    "batch": ("data", "fsdp"),
    "length": ("context",),
    "activation_embed": None,
    "activation_heads": ("tensor",),
    "activation_mlp": ("tensor",),
    # parameters
    "layers": None,
    "embed": ("fsdp",),
    "vocab": ("tensor",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "head": None,
    "mlp": ("tensor",),
    "norm": None,
    "attributes": None,
}


def partition_spec(logical_axes: tuple[str | None, ...]) -> PartitionSpec:
    """The mesh axes of an array whose dimensions have these logical names.

    Raises:
        ConfigError: a name that the table lacks, or two dimensions that would lie on the same mesh axis.
    """
    parts, used = [], set()
    for name in logical_axes:
        if name is not None and name not in RULES:
            raise ConfigError(f"logical axis '{name}' is not in parallel/rules.py; cure: add it to RULES")
        axes = RULES[name] if name is not None else None
        if clash := used & set(axes or ()):
            raise ConfigError(f"{logical_axes}: two dimensions on mesh axis {sorted(clash)}; cure: change RULES")
        used |= set(axes or ())
        parts.append(axes if axes is None or len(axes) > 1 else axes[0])
    return PartitionSpec(*parts)


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

    def one(path, box):
        spec = partition_spec(box.names)
        shape = box.unbox().shape
        for size, name, axes in zip(shape, box.names, spec, strict=True):
            ways = mesh_ways(mesh, axes)
            if size % ways:
                raise ConfigError(
                    f"{jax.tree_util.keystr(path, simple=True, separator='/')}: {name} {size} cannot be cut into "
                    f"{ways} (mesh axes {axes}); cure: a mesh whose {axes} divides {size}"
                )
        return NamedSharding(mesh, spec)

    return jax.tree_util.tree_map_with_path(one, boxed, is_leaf=lambda x: isinstance(x, meta.AxisMetadata))


def mesh_ways(mesh: Mesh, axes: str | tuple[str, ...] | None) -> int:
    """Into how many parts these mesh axes cut a dimension."""
    ways = 1
    for axis in (axes,) if isinstance(axes, str) else axes or ():
        ways *= mesh.shape[axis]
    return ways


def logical(init, *axes: str | None):
    """A Linen initializer whose parameter carries its logical axes."""
    return nn.with_logical_partitioning(init, axes)
