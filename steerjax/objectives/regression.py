"""Masked mean squared error over several attributes.

Source: HelpSteer, arXiv 2311.09528, section 4; NeMo-Aligner averages over micro-batches first, we do not.
"""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


def masked_squared_error(
    predictions: Float[Array, "*E A"],
    ratings: Float[Array, "*E A"],
    mask: Bool[Array, "*E A"],
    weights: Float[Array, " A"],
    average: str = "ratings",
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Sum and count in float32; sum over count is the loss, after micro-batches and devices are added up.

    Args:
        mask: where a rating is present.
        weights: of the attributes; a rating counts with its attribute's weight.
        average: "ratings", every rating counts alike; "examples", every example counts alike with the mean over its
            own ratings, which is what the reference computes with micro-batch 1.
    """
    weights = mask * weights.astype(jnp.float32)
    errors = weights * jnp.square(jnp.where(mask, predictions.astype(jnp.float32) - ratings, 0.0))
    if average == "examples":
        total = weights.sum(-1)
        errors = errors.sum(-1) / jnp.where(total > 0, total, 1.0)
        return errors.sum(), (total > 0).sum().astype(jnp.float32)
    return errors.sum(), weights.sum()


def attribute_squared_errors(
    predictions: Float[Array, "*E A"], ratings: Float[Array, "*E A"], mask: Bool[Array, "*E A"]
) -> tuple[Float[Array, " A"], Float[Array, " A"]]:
    """Sum of squared errors and count of ratings for each attribute, in rating units squared."""
    errors = jnp.square(jnp.where(mask, predictions.astype(jnp.float32) - ratings, 0.0))
    examples = tuple(range(mask.ndim - 1))
    return errors.sum(examples), mask.sum(examples).astype(jnp.float32)
