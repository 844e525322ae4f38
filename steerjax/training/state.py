"""The train state, made straight into its shards."""

from __future__ import annotations

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from steerjax.parallel.rules import replicated, shardings_of
from steerjax.training.config import OptimizerConfig
from steerjax.training.optimizer import join, partition


class TrainState(flax.struct.PyTreeNode):
    """Everything that training changes, and the parameters that it does not.

    Attributes:
        step: steps done, also those whose update was left out.
        params, frozen: the two parts of `optimizer.partition`, float32.
        optimizer: optax state of `params`.
        bad_steps: steps whose gradients were not finite, in the whole run.
        bad_in_row: such steps since the last good one.
    """

    step: jax.Array
    params: dict
    frozen: dict
    optimizer: optax.OptState
    bad_steps: jax.Array
    bad_in_row: jax.Array

    def whole(self) -> dict:
        """The parameters as checkpoints hold them: the state's own arrays, but the stacks that `frozen_layers` cuts."""
        return join(self.params, self.frozen)

    def rest(self) -> dict:
        """All but the parameters, as checkpoints hold it."""
        return {name: getattr(self, name) for name in ("step", "optimizer", "bad_steps", "bad_in_row")}


def abstract_state(whole: dict, optimizer: optax.GradientTransformation, config: OptimizerConfig, mesh: Mesh):
    """Shapes, dtypes and shardings of the state of abstract parameters. Optimizer moments lie as their parameters."""

    def sharded(part, sharding):
        return None if part is None else jax.ShapeDtypeStruct(part.shape, part.dtype, sharding=sharding)

    parts = jax.eval_shape(lambda p: partition(p, config), whole)  # leaves are cut into layers, never across devices
    params, frozen = (
        jax.tree.map(lambda part, leaf: sharded(part, leaf.sharding), tree, whole, is_leaf=lambda x: x is None)
        for tree in parts
    )
    moments = optax.tree.map_params(
        optimizer,
        lambda m, p: sharded(m, p.sharding),
        jax.eval_shape(optimizer.init, params),
        params,
        transform_non_params=lambda m: sharded(m, replicated(mesh)),
    )
    counter = jax.ShapeDtypeStruct((), jnp.int32, sharding=replicated(mesh))
    return TrainState(counter, params, frozen, moments, counter, counter)


def make_state(
    whole: dict,
    abstract: TrainState,
    optimizer: optax.GradientTransformation,
    config: OptimizerConfig,
    rest: dict | None = None,
) -> TrainState:
    """The state before the first step, or with `rest` the one that a checkpoint holds. `whole` is given away."""
    if config.frozen_layers:
        cut = jax.jit(lambda p: partition(p, config), out_shardings=shardings_of((abstract.params, abstract.frozen)))
        params, frozen = cut(whole)
        jax.tree.map(lambda leaf: leaf.delete(), whole)  # else it is held beside its parts
    else:
        params, frozen = partition(whole, config)
    if rest is None:
        counters = [jax.device_put(np.zeros((), np.int32), abstract.step.sharding) for _ in range(3)]
        moments = jax.jit(optimizer.init, out_shardings=shardings_of(abstract.optimizer))(params)
        rest = dict(zip(("step", "bad_steps", "bad_in_row"), counters, strict=True)) | {"optimizer": moments}
    return TrainState(params=params, frozen=frozen, **rest)
