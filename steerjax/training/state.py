"""The train state, made straight into its shards."""

from __future__ import annotations

from collections.abc import Sequence

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from flax.core import meta
from jax.sharding import Mesh, NamedSharding, PartitionSpec

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


def abstract_parameters(model: nn.Module, inputs: Sequence, mesh: Mesh) -> dict:
    """Shapes, dtypes and shardings of a model's parameters; nothing is allocated.

    Args:
        inputs: arguments of the model; their length does not matter.
    """
    boxed = jax.eval_shape(model.init, jax.random.key(0), *inputs)["params"]
    return jax.tree.map(_sharded, meta.unbox(boxed), parameter_shardings(boxed, mesh))


def _sharded(array, sharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding)


def abstract_state(
    model: nn.Module,
    inputs: Sequence,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    frozen_names: Sequence[str] = (),
) -> TrainState:
    """Shapes, dtypes and shardings of the state. Optimizer moments lie as their parameters."""
    params = abstract_parameters(model, inputs, mesh)
    replicated = NamedSharding(mesh, PartitionSpec())
    trained = partition(params, frozen_names)[0]
    optimizer_state = jax.eval_shape(optimizer.init, trained)
    optimizer_shardings = optax.tree.map_params(
        optimizer,
        lambda _, p: p.sharding,
        optimizer_state,
        trained,
        transform_non_params=lambda _: replicated,
    )
    counter = jax.ShapeDtypeStruct((), jnp.int32, sharding=replicated)
    return TrainState(
        step=counter,
        params=params,
        optimizer=jax.tree.map(_sharded, optimizer_state, optimizer_shardings),
        bad_steps=counter,
        bad_in_row=counter,
    )


def shardings_of(abstract):
    """The shardings in a tree of ShapeDtypeStructs."""
    return jax.tree.map(lambda leaf: leaf.sharding, abstract)


def init_parameters(model: nn.Module, inputs: Sequence, abstract: dict, seed: int) -> dict:
    """Random parameters, every leaf made in its own shards; `abstract` may be a part of the model's tree."""

    def init(key):
        params = meta.unbox(model.init(key, *inputs)["params"])
        return {name: params[name] for name in abstract}

    return jax.jit(init, out_shardings=shardings_of(abstract))(jax.random.key(seed))


def fresh_state(
    params: dict, optimizer: optax.GradientTransformation, abstract: TrainState, frozen_names: Sequence[str] = ()
) -> TrainState:
    """The state before the first step."""
    init = jax.jit(
        lambda params: optimizer.init(partition(params, frozen_names)[0]),
        out_shardings=shardings_of(abstract.optimizer),
    )
    counters = [jax.device_put(np.zeros((), np.int32), abstract.step.sharding) for _ in range(3)]
    return TrainState(counters[0], params, init(params), *counters[1:])
