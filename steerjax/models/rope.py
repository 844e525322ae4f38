"""Rotary position embedding, half-split as in Hugging Face's Llama, so that no weight is ever permuted."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from steerjax.models.config import RopeScaling


def inverse_frequencies(head_dim: int, theta: float, scaling: RopeScaling) -> Float[np.ndarray, " H/2"]:
    """Radians a position, one for each pair of the head, float32.

    Llama 3.1's scaling (`modeling_rope_utils` in transformers) slows long waves down by `factor`, leaves short ones
    alone, and blends those between.
    """
    frequencies = np.float32(1) / np.float32(theta) ** (np.arange(0, head_dim, 2, dtype=np.float32) / head_dim)
    if scaling.factor == 1.0:
        return frequencies
    turns = scaling.original_max_position_embeddings * frequencies / (2 * np.pi)  # within the original context
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    blend = np.clip((turns - low) / (high - low), 0, 1)
    return ((1 - blend) * frequencies / scaling.factor + blend * frequencies).astype(np.float32)


def rope_tables(
    positions: Int[Array, "B T"], head_dim: int, theta: float, scaling: RopeScaling
) -> tuple[Float[Array, "B T 1 H"], Float[Array, "B T 1 H"]]:
    """Cosine and sine for every position, float32 (bfloat16 rounds position 257 to 256)."""
    angles = positions[:, :, None, None].astype(jnp.float32) * inverse_frequencies(head_dim, theta, scaling)
    angles = jnp.concatenate([angles, angles], axis=-1)
    return jnp.cos(angles), jnp.sin(angles)


def apply_rope(
    x: Float[Array, "B T N H"], cos: Float[Array, "B T 1 H"], sin: Float[Array, "B T 1 H"]
) -> Float[Array, "B T N H"]:
    """Turns every pair (i, i + H/2) of each head by its angle; computed in float32, returned in x's dtype."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return (x * cos + jnp.concatenate([-second, first], axis=-1) * sin).astype(x.dtype)
