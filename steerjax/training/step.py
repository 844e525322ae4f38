"""The train step: a pure function of (state, batch)."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

from steerjax.data.batch import Batch
from steerjax.models.llama import in_dtype
from steerjax.objectives import Objective
from steerjax.training.optimizer import join
from steerjax.training.schedules import Schedule
from steerjax.training.state import TrainState

TINY = 1e-8  # a batch without a single target moves nothing


def forward(module: nn.Module, params: dict, batch: Batch, frozen_layers: int) -> tuple[nn.Module, jax.Array]:
    """The module bound to its parameters, and the hidden states [B T D] of a batch of rows [B, T]."""
    model = module.bind({"params": params})
    inputs = batch.tokens, batch.positions, batch.until
    return model, model.hidden(*inputs, frozen=frozen_layers, states=batch.states, noise=batch.noise)


def counts_of(objectives: Sequence[Objective], batch: Batch) -> dict[str, jax.Array]:
    """What each objective's sum is divided by, from the batch alone."""
    return {o.name: jnp.maximum(o.count(batch.targets[o.name]), TINY) for o in objectives}


def make_loss(module: nn.Module, objectives: Sequence[Objective], frozen_layers: int = 0):
    """(params, batch [B, T], counts) -> (loss, {metric: (sum, count)}), all float32.

    The loss is the sum over objectives of weight * sum / count. With the counts of a whole step, losses and gradients
    of its micro-batches add up to the step's: only one gradient is held, whatever the number of objectives.
    """

    def loss(params: dict, batch: Batch, counts):
        model, hidden = forward(module, params, batch, frozen_layers)
        total, sums = jnp.zeros(()), {}
        for o in objectives:
            value, metrics = o.loss(model, hidden, batch, batch.targets[o.name])
            total += o.config.weight * value / counts[o.name]
            sums[f"{o.name}/loss"] = value, o.count(batch.targets[o.name])
            sums |= metrics
        return total, sums

    return loss


def over_micro_batches(function, batch: Batch):
    """The sum of a function's results over the micro-batches, the batch's leading dimension; of several in float32."""
    first = jax.tree.map(lambda x: x[0], batch)
    if batch.tokens.shape[0] == 1:
        return function(first)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), jax.eval_shape(function, first))
    add = lambda carry, part: (jax.tree.map(jnp.add, carry, function(part)), None)  # noqa: E731
    return jax.lax.scan(add, zeros, batch)[0]


def make_train_step(
    module: nn.Module,
    objectives: Sequence[Objective],
    optimizer: optax.GradientTransformation,
    schedule: Schedule,
    frozen_layers: int = 0,
    seed: int = 0,
):
    """(state, batch [M, B/M, ...]) -> (state, metrics).

    A step whose loss or gradients are not finite changes only the counters. Dropout follows from seed, step, row and
    place.
    """
    loss = make_loss(module, objectives, frozen_layers)

    def train_step(state: TrainState, batch: Batch):
        counts = counts_of(objectives, batch)
        if module.config.lora.dropout:
            key = jax.random.fold_in(jax.random.key(seed), state.step)
            batch = batch._replace(noise=jax.random.split(key, batch.tokens.shape[:2]))

        trained, frozen = state.params, state.frozen
        if batch.tokens.shape[0] > 1:  # cast once, not in every micro-batch
            trained, frozen = (in_dtype(part, module.compute.dtype) for part in (trained, frozen))

        def of_trained(trained, part):
            return loss(join(trained, frozen), part, counts)

        gradient = jax.value_and_grad(of_trained, has_aux=True)
        (total, sums), gradients = over_micro_batches(lambda part: gradient(trained, part), batch)
        norm = optax.tree.norm(gradients)
        good = jnp.isfinite(norm) & jnp.isfinite(total)
        learning_rate = schedule(state.step)
        updates, moments = optimizer.update(gradients, state.optimizer, state.params)
        params = jax.tree.map(lambda p, u: p - learning_rate * u, state.params, updates)

        def keep(new, old):
            return jax.tree.map(lambda n, o: jnp.where(good, n, o), new, old)

        state = state.replace(
            step=state.step + 1,
            params=keep(params, state.params),
            optimizer=keep(moments, state.optimizer),
            bad_steps=state.bad_steps + ~good,
            bad_in_row=jnp.where(good, 0, state.bad_in_row + 1),
        )
        metrics = {
            "loss": total,
            "learning_rate": learning_rate,
            "grad_norm": norm,
            "bad_steps": state.bad_steps,
            "bad_in_row": state.bad_in_row,
        }
        return state, metrics | {name: value / jnp.maximum(n, TINY) for name, (value, n) in sums.items()}

    return train_step
