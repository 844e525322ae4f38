"""The train step and the evaluation step: pure functions of (state, batch)."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from steerjax.data.batch import Batch
from steerjax.models.reward_head import RewardModel, initial_head
from steerjax.objectives.regression import attribute_squared_errors, masked_squared_error
from steerjax.training.optimizer import combine, partition
from steerjax.training.schedules import Schedule
from steerjax.training.state import TrainState, reward_inputs


def make_loss(model: RewardModel, weights: Float[Array, " A"], average: str):
    """(params, batch) -> (loss sum, (loss count, squared error [A], ratings [A])), all float32."""

    def loss(params, batch: Batch):
        predictions = model.apply({"params": params}, reward_inputs(batch))
        total, count = masked_squared_error(predictions, batch.ratings, batch.mask, weights, average)
        return total, (count, *attribute_squared_errors(predictions, batch.ratings, batch.mask))

    return loss


def accumulate(loss, trained, frozen, batch: Batch):
    """Gradient of the loss sum and all sums, added up over the micro-batches (the batch's leading dimension)."""
    gradient = jax.value_and_grad(lambda trained, batch: loss(combine(trained, frozen), batch), has_aux=True)

    def one(batch):
        (total, sums), gradients = gradient(trained, batch)
        return gradients, total, sums

    first = jax.tree.map(lambda x: x[0], batch)
    if batch.tokens.shape[0] == 1:
        return one(first)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(one, first))
    sums, _ = jax.lax.scan(lambda carry, part: (jax.tree.map(jnp.add, carry, one(part)), None), zeros, batch)
    return sums


def make_train_step(
    loss, optimizer: optax.GradientTransformation, schedule: Schedule, frozen_names: Sequence[str] = ()
):
    """(state, batch [M, B/M, ...]) -> (state, metrics).

    Sums are divided once, after micro-batches and devices: the result does not depend on how the batch is cut. A step
    whose gradients are not finite changes only the counters.
    """

    def train_step(state: TrainState, batch: Batch):
        trained, frozen = partition(state.params, frozen_names)
        gradients, total, (count, errors, ratings) = accumulate(loss, trained, frozen, batch)
        count = jnp.maximum(count, 1e-8)  # a batch without a single rating moves nothing
        gradients = jax.tree.map(lambda g: g / count, gradients)
        norm = optax.tree.norm(gradients)
        good = jnp.isfinite(norm)
        learning_rate = schedule(state.step)
        updates, moments = optimizer.update(gradients, state.optimizer, trained)
        params = combine(jax.tree.map(lambda p, u: p - learning_rate * u, trained, updates), frozen)

        def keep(new, old):
            return jax.tree.map(lambda n, o: jnp.where(good, n, o), new, old)

        state = TrainState(
            step=state.step + 1,
            params=keep(params, state.params),
            optimizer=keep(moments, state.optimizer),
            bad_steps=state.bad_steps + ~good,
            bad_in_row=jnp.where(good, 0, state.bad_in_row + 1),
        )
        metrics = {
            "loss": total / count,
            "learning_rate": learning_rate,
            "grad_norm": norm,
            "squared_error": errors / jnp.maximum(ratings, 1),
            "bad_steps": state.bad_steps,
            "bad_in_row": state.bad_in_row,
        }
        return state, metrics

    return train_step


def make_evaluation_step(model: RewardModel):
    """(params, batch [1, B, ...]) -> predictions [B, R, A]."""

    def evaluation_step(params, batch: Batch):
        return model.apply({"params": params}, reward_inputs(jax.tree.map(lambda x: x[0], batch)))

    return evaluation_step


def make_head_initializer(model: RewardModel):
    """(params, batch, mean ratings [A]) -> params whose first predictions lie near the mean ratings."""

    def initialize(params, batch: Batch, mean_ratings):
        first = jax.tree.map(lambda x: x[0], batch)
        if model.use_bias:
            head = params["reward_head"]
            return params | {"reward_head": jnp.zeros_like(head), "reward_bias": mean_ratings}
        states = model.apply({"params": params}, reward_inputs(first), method=RewardModel.states)
        return params | {"reward_head": initial_head(states, first.examples >= 0, mean_ratings)}

    return initialize
