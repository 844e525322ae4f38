"""The train state, made straight into its shards."""

from __future__ import annotations

from collections.abc import Sequence

import flax
import jax
import jax.numpy as jnp
import optax
from flax.core import meta
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from steerjax.checkpoints.store import CheckpointStore
from steerjax.data.batch import Batch
from steerjax.models.attention import Layout
from steerjax.models.reward_head import RewardInputs, RewardModel
from steerjax.parallel.rules import parameter_shardings
from steerjax.training.optimizer import partition


class TrainState(flax.struct.PyTreeNode):
    """Everything that training changes.

    Attributes:
        step: steps done, also those whose update was left out.
        params: plain nested dict, float32.
        optimizer: optax state.
        bad_steps: steps whose gradients were not finite, in the whole run.
        bad_in_row: such steps since the last good one.
    """

    step: jax.Array
    params: dict
    optimizer: optax.OptState
    bad_steps: jax.Array
    bad_in_row: jax.Array


def training_part(state: TrainState) -> dict:
    """All of a state but the parameters, as checkpoints hold it."""
    return {
        "step": state.step,
        "optimizer": state.optimizer,
        "bad_steps": state.bad_steps,
        "bad_in_row": state.bad_in_row,
    }


def restore_state(store: CheckpointStore, step: int, abstract: TrainState) -> TrainState:
    """The state at a step, in the shardings of `abstract`."""
    params, training = store.restore(step, abstract.params, training_part(abstract))
    return TrainState(params=params, **training)


def reward_inputs(batch: Batch) -> RewardInputs:
    """What the model sees of a batch (everything but the ratings)."""
    return RewardInputs(batch.tokens, batch.positions, Layout(batch.segments, batch.branches), batch.ends)


def _dummy_inputs() -> RewardInputs:
    one = jnp.zeros((1, 1), jnp.int32)
    return RewardInputs(one, one, Layout(one, one), one)


def abstract_state(
    model: RewardModel, optimizer: optax.GradientTransformation, mesh: Mesh, frozen_names: Sequence[str] = ()
) -> TrainState:
    """Shapes, dtypes and shardings of the state; nothing is allocated. Optimizer moments lie as their parameters."""
    boxed = jax.eval_shape(model.init, jax.random.key(0), _dummy_inputs())["params"]
    shardings = parameter_shardings(boxed, mesh)
    params = meta.unbox(boxed)
    replicated = NamedSharding(mesh, PartitionSpec())
    optimizer_state = jax.eval_shape(optimizer.init, partition(params, frozen_names)[0])
    optimizer_shardings = optax.tree.map_params(
        optimizer,
        lambda _, s: s,
        optimizer_state,
        partition(shardings, frozen_names)[0],
        transform_non_params=lambda _: replicated,
    )

    def sharded(array, sharding):
        return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding)

    counter = jax.ShapeDtypeStruct((), jnp.int32, sharding=replicated)
    return TrainState(
        step=counter,
        params=jax.tree.map(sharded, params, shardings),
        optimizer=jax.tree.map(sharded, optimizer_state, optimizer_shardings),
        bad_steps=counter,
        bad_in_row=counter,
    )


def shardings_of(abstract):
    """The shardings in a tree of ShapeDtypeStructs."""
    return jax.tree.map(lambda leaf: leaf.sharding, abstract)


def init_state(
    model: RewardModel,
    optimizer: optax.GradientTransformation,
    abstract: TrainState,
    seed: int,
    frozen_names: Sequence[str] = (),
) -> TrainState:
    """A fresh state, every leaf made in its own shards."""

    def init(key):
        params = meta.unbox(model.init(key, _dummy_inputs())["params"])
        zero = jnp.zeros((), jnp.int32)
        return TrainState(zero, params, optimizer.init(partition(params, frozen_names)[0]), zero, zero)

    return jax.jit(init, out_shardings=shardings_of(abstract))(jax.random.key(seed))
