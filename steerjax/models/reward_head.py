"""The attribute prediction model: Llama, a read-out at the end of each response, a linear head in float32."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int

from steerjax.models.attention.mask import Layout
from steerjax.models.config import LlamaConfig
from steerjax.models.llama import Compute, Llama
from steerjax.parallel.rules import constrain, logical


class RewardInputs(NamedTuple):
    """A packed batch as the model sees it. R is the greatest number of responses in a row.

    Attributes:
        tokens: token ids.
        positions: 0, 1, ... in a prompt; each of its responses goes on from where it leaves the prompt.
        layout: segments and branches.
        ends: place in the row of each response's last token (any place where `present` is false).
    """

    tokens: Int[Array, "B T"]
    positions: Int[Array, "B T"]
    layout: Layout
    ends: Int[Array, "B R"]


def pool(hidden: Float[Array, "B T D"], inputs: RewardInputs, readout: str) -> Float[Array, "B R D"]:
    """One float32 state a response.

    Args:
        readout: "last", the state at the response's last token, or "mean", over its prompt and response
            (NeMo-Aligner's `use_avg_pool`).
    """
    if readout == "last":
        return jnp.take_along_axis(hidden, inputs.ends[:, :, None], axis=1).astype(jnp.float32)
    segments, branches = inputs.layout
    segment = jnp.take_along_axis(segments, inputs.ends, axis=1)[:, :, None]
    branch = jnp.take_along_axis(branches, inputs.ends, axis=1)[:, :, None]
    own = (segments[:, None] == segment) & ((branches[:, None] == 0) | (branches[:, None] == branch))
    own &= jnp.arange(segments.shape[1]) <= inputs.ends[:, :, None]  # the prompt may go on after the branch
    weights = own / own.sum(-1, keepdims=True)
    return jnp.einsum("BRT,BTD->BRD", weights, hidden.astype(jnp.float32))


class RewardModel(nn.Module):
    """Predicted ratings [B, R, A], float32.

    Attributes:
        num_attributes: A.
        readout: see `pool`.
        use_bias: a bias in the head. Off by default: no stock server loads one.
        frozen, cached: see `Llama`.
    """

    config: LlamaConfig
    num_attributes: int
    readout: str = "last"
    use_bias: bool = False
    compute: Compute = Compute()
    frozen: int = 0
    cached: int = 0

    def setup(self):
        self.llama = Llama(self.config, self.compute, self.frozen, self.cached)
        shape = (self.config.hidden_size, self.num_attributes)
        kernel = logical(nn.initializers.normal(self.config.initializer_range), "embed", "attributes")
        self.reward_head = self.param("reward_head", kernel, shape, jnp.float32)
        if self.use_bias:
            bias = logical(nn.initializers.zeros, "attributes")
            self.reward_bias = self.param("reward_bias", bias, (self.num_attributes,), jnp.float32)

    def states(self, inputs: RewardInputs) -> Float[Array, "B R D"]:
        """The pooled states that the head reads."""
        hidden = self.llama(inputs.tokens, inputs.positions, inputs.layout)
        return constrain(pool(hidden, inputs, self.readout), "batch", None, None)

    def frozen_states(self, inputs: RewardInputs) -> Float[Array, "B T D"]:
        """What the frozen layers give."""
        return self.llama.frozen_states(inputs.tokens, inputs.positions, inputs.layout)

    def __call__(self, inputs: RewardInputs) -> Float[Array, "B R A"]:
        predictions = jnp.einsum("BRD,DA->BRA", self.states(inputs), self.reward_head, precision="highest")
        return predictions + self.reward_bias if self.use_bias else predictions


def initial_head(
    states: Float[Array, "B R D"], present: Float[Array, "B R"], mean_ratings: Float[Array, " A"]
) -> Float[Array, "D A"]:
    """A bias-free head whose first predictions lie near the mean ratings.

    The states of all responses share a large common part; the head is that mean state, scaled so that it maps itself
    to `mean_ratings`.

    Args:
        present: 1 where the place holds a response, else 0.
    """
    mean_state = jnp.einsum("BRD,BR->D", states, present) / jnp.maximum(present.sum(), 1)
    return jnp.outer(mean_state / jnp.sum(jnp.square(mean_state)), mean_ratings)
