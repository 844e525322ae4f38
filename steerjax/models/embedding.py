"""Embedding look-up in a table that is cut over the mesh, without ever gathering the table."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from steerjax.parallel.rules import constrain, mesh_ways, partition_spec


def look_up(table: Float[Array, "V D"], tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
    """Rows of the table. On a mesh tokens and rows travel: XLA, left alone, gathers the table or its gradient.

    A device looks the tokens of its `fsdp` group up in its own piece of the table, zeros for those not in it; then the
    group swaps pieces of rows for rows, and `tensor` adds the zeros away. Shapes the mesh does not divide go to XLA.
    """

    def local(table, tokens):
        tokens = jax.lax.all_gather(tokens, "fsdp", axis=0, tiled=True)
        places = tokens - jax.lax.axis_index("tensor") * table.shape[0]
        here = (places >= 0) & (places < table.shape[0])
        rows = jnp.where(here[..., None], table[jnp.where(here, places, 0)], 0)
        rows = jax.lax.all_to_all(rows, "fsdp", split_axis=0, concat_axis=2, tiled=True)
        return jax.lax.psum(rows, "tensor")

    mesh, out = jax.sharding.get_abstract_mesh(), ("batch", "length", "activation_embed")
    cut = partition_spec(out[:2])
    if mesh.empty or mesh.size == 1 or any(n % mesh_ways(mesh, a) for n, a in zip(tokens.shape, cut, strict=True)):
        return constrain(table[tokens], *out)
    specs = partition_spec(("vocab", "embed")), cut
    return jax.shard_map(local, in_specs=specs, out_specs=partition_spec(out))(table, tokens)
