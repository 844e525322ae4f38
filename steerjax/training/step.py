"""The train step: a pure function of (state, batch)."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import optax

from steerjax.training.optimizer import combine, partition
from steerjax.training.schedules import Schedule
from steerjax.training.state import TrainState


def accumulate(loss, trained, frozen, batch):
    """Gradient of the loss sum and all sums, added up over the micro-batches (the batch's leading dimension).

    Args:
        loss: (params, batch) -> (sum, (count, {name: (sum, count)})), all float32.
        batch: NamedTuple of arrays [M, B/M, ...].
    """
    gradient = jax.value_and_grad(lambda trained, batch: loss(combine(trained, frozen), batch), has_aux=True)

    def one(batch):
        (total, sums), gradients = gradient(trained, batch)
        return gradients, total, sums

    first = jax.tree.map(lambda x: x[0], batch)
    if batch[0].shape[0] == 1:
        return one(first)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(one, first))
    sums, _ = jax.lax.scan(lambda carry, part: (jax.tree.map(jnp.add, carry, one(part)), None), zeros, batch)
    return sums


def make_train_step(
    loss, optimizer: optax.GradientTransformation, schedule: Schedule, frozen_names: Sequence[str] = ()
):
    """(state, batch [M, B/M, ...]) -> (state, metrics). `loss` is as in `accumulate`.

    Sums are divided once, after micro-batches and devices: the result does not depend on how the batch is cut. A step
    whose gradients are not finite changes only the counters.
    """

    def train_step(state: TrainState, batch):
        trained, frozen = partition(state.params, frozen_names)
        gradients, total, (count, sums) = accumulate(loss, trained, frozen, batch)
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
            "bad_steps": state.bad_steps,
            "bad_in_row": state.bad_in_row,
        }
        return state, metrics | {name: total / jnp.maximum(n, 1) for name, (total, n) in sums.items()}

    return train_step
