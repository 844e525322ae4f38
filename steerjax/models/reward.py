"""The attribute prediction model: Llama and a linear head in float32 that reads ratings at the end of a response."""

from __future__ import annotations

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int

from steerjax.models.attention import seen_mean
from steerjax.models.config import LlamaConfig
from steerjax.models.llama import Compute, Headed, Llama
from steerjax.parallel.rules import logical


class RewardModel(Headed):
    """Predicted ratings of the text that ends at each token; where a response ends, they are its ratings.

    `num_attributes` is A; `readout` and `use_bias` as in `HeadConfig`.
    """

    config: LlamaConfig
    num_attributes: int
    readout: str = "last"
    use_bias: bool = False
    compute: Compute = Compute()

    def setup(self):
        self.llama = Llama(self.config, self.compute)
        shape = (self.config.hidden_size, self.num_attributes)
        kernel = logical(nn.initializers.normal(self.config.initializer_range), "embed", "attributes")
        self.reward_head = self.param("reward_head", kernel, shape, jnp.float32)
        if self.use_bias:
            self.reward_bias = self.param("reward_bias", logical(nn.initializers.zeros, "attributes"), shape[1:])

    def read(self, hidden: Float[Array, "B T D"], until: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        """The float32 states that the head reads."""
        return hidden.astype(jnp.float32) if self.readout == "last" else seen_mean(hidden, until)

    def head(self, states: Float[Array, "... D"]) -> Float[Array, "... A"]:
        """Ratings, float32."""
        ratings = jnp.einsum("...D,DA->...A", states, self.reward_head, precision="highest")
        return ratings + self.reward_bias if self.use_bias else ratings

    def __call__(self, tokens: Int[Array, "B T"], positions: Int[Array, "B T"], until: Int[Array, "B T"]):
        """Ratings [B T A]."""
        return self.head(self.read(self.hidden(tokens, positions, until), until))
