"""Llama in Linen. Modules hold parameters and names; the mathematics is in rope.py and attention.py.

Letters: B rows, T tokens, D model width, F feed-forward width, N query heads, K key-value heads, H head size,
L layers, V vocabulary, A attributes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int

from steerjax.models.attention.backends import Plan, make_plan, self_attention
from steerjax.models.attention.mask import Cache, Layout, cached_attention
from steerjax.models.config import LlamaConfig
from steerjax.models.embedding import look_up
from steerjax.models.rope import apply_rope, rope_tables
from steerjax.parallel.rules import constrain, logical

# What a layer keeps for its backward pass: name -> checkpoint policy (None: everything, no remat).
REMAT_POLICIES = {
    "none": None,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}


@dataclass(frozen=True)
class Compute:
    """How a model is run: changes speed and memory, not the function.

    Attributes:
        dtype: of the computation; parameters are float32.
        remat: a name of REMAT_POLICIES.
        unroll: layers a step of the scan. 1 compiles one layer; more costs compile time and saves time on a CPU.
        attention: a back end of backends.py: `chunked`, `blockwise`, `splash` or `cudnn`.
        chunk: queries a chunk (chunked) or block (blockwise) of the attention, in tokens.
    """

    dtype: jnp.dtype = jnp.float32
    remat: str = "none"
    unroll: int = 1
    attention: str = "chunked"
    chunk: int = 256


class Context(NamedTuple):
    """What all layers share.

    Attributes:
        rope: tables of `rope_tables`.
        layout, plan: of packed rows; the plan is the attention back end's.
        mask: with a cache: which tokens, cached and then new, each new one sees.
    """

    rope: tuple[Float[Array, "B T 1 H"], Float[Array, "B T 1 H"]]
    layout: Layout | None = None
    plan: Plan = None
    mask: Bool[Array, "B T S"] | None = None


def rms_norm(x: Float[Array, "... D"], scale: Float[Array, " D"], epsilon: float) -> Float[Array, "... D"]:
    """x over its root mean square, times scale; statistics in float32, returned in x's dtype."""
    wide = x.astype(jnp.float32)
    normed = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + epsilon)
    return scale.astype(x.dtype) * normed.astype(x.dtype)


class RMSNorm(nn.Module):
    epsilon: float

    @nn.compact
    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        scale = self.param("scale", logical(nn.initializers.ones, "norm"), (x.shape[-1],), jnp.float32)
        return rms_norm(x, scale, self.epsilon)


class Projection(nn.Module):
    """A linear map over named axes: contracts the last `len(inputs)` dimensions of x into `outputs`.

    Attributes:
        inputs, outputs: (logical axis, size) of each dimension of the kernel.
    """

    inputs: tuple[tuple[str, int], ...]
    outputs: tuple[tuple[str, int], ...]
    use_bias: bool
    stddev: float
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Array) -> Array:
        names, shape = zip(*self.inputs, *self.outputs, strict=True)
        kernel = self.param("kernel", logical(nn.initializers.normal(self.stddev), *names), shape, jnp.float32)
        y = jnp.tensordot(x, kernel.astype(self.dtype), axes=len(self.inputs))
        if self.use_bias:
            names, shape = zip(*self.outputs, strict=True)
            y += self.param("bias", logical(nn.initializers.zeros, *names), shape, jnp.float32).astype(self.dtype)
        return y


class Attention(nn.Module):
    config: LlamaConfig
    compute: Compute

    @nn.compact
    def __call__(
        self, x: Float[Array, "B T D"], context: Context, cache: Cache | None
    ) -> tuple[Float[Array, "B T D"], Cache | None]:
        c = self.config
        embed, head = ("embed", c.hidden_size), ("head", c.head_dim)
        heads, kv_heads = ("heads", c.num_heads), ("kv_heads", c.num_kv_heads)
        shared = {"use_bias": c.attention_bias, "stddev": c.initializer_range, "dtype": self.compute.dtype}
        q = Projection((embed,), (heads, head), **shared, name="q")(x)
        k = Projection((embed,), (kv_heads, head), **shared, name="k")(x)
        v = Projection((embed,), (kv_heads, head), **shared, name="v")(x)
        q, k = apply_rope(q, *context.rope), apply_rope(k, *context.rope)
        q = constrain(q, "batch", "length", "activation_heads", None)
        if cache is not None:
            y = cached_attention(q, k, v, cache, context.mask, self.compute.chunk)
        else:
            y = self_attention(q, k, v, context.layout, context.plan, self.compute.chunk)
        y = Projection((heads, head), (embed,), **shared, name="o")(y)
        return y, None if cache is None else Cache(k, v)


class MLP(nn.Module):
    config: LlamaConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        c = self.config
        embed, mlp = ("embed", c.hidden_size), ("mlp", c.intermediate_size)
        shared = {"use_bias": c.mlp_bias, "stddev": c.initializer_range, "dtype": self.dtype}
        gate = Projection((embed,), (mlp,), **shared, name="gate")(x)
        up = Projection((embed,), (mlp,), **shared, name="up")(x)
        y = constrain(jax.nn.silu(gate) * up, "batch", "length", "activation_mlp")
        return Projection((mlp,), (embed,), **shared, name="down")(y)


class Block(nn.Module):
    config: LlamaConfig
    compute: Compute

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"], context: Context, cache: Cache | None):
        c = self.config
        normed = RMSNorm(c.rms_norm_eps, name="attention_norm")(x)
        y, seen = Attention(c, self.compute, name="attention")(normed, context, cache)
        x = x + y
        normed = RMSNorm(c.rms_norm_eps, name="mlp_norm")(x)
        x = x + MLP(c, self.compute.dtype, name="mlp")(normed)
        return constrain(x, "batch", "length", "activation_embed"), seen


def _stack(config: LlamaConfig, compute: Compute, layers: int) -> nn.Module:
    """So many blocks in a scan, their parameters (and a cache) stacked on a leading dimension."""
    policy = REMAT_POLICIES[compute.remat]
    block = Block if policy is None else nn.remat(Block, policy=policy, prevent_cse=False)
    scanned = nn.scan(
        block,
        variable_axes={"params": 0},
        split_rngs={"params": True},
        in_axes=(nn.broadcast, 0),
        length=layers,
        unroll=min(compute.unroll, layers),
        metadata_params={nn.PARTITION_NAME: "layers"},
    )
    return scanned(config, compute)


class Llama(nn.Module):
    """The backbone: token ids -> hidden states after the final norm.

    Attributes:
        config: the architecture.
        compute: how it is run.
        frozen: so many of the first layers, with the embedding, get no gradient. Their parameters are a group of their
            own, `frozen_layers`.
        cached: where it is not 0, the embedding is a table of so many outputs of the frozen layers, tokens are places
            in it, and the frozen layers are left out (training/cache.py).
    """

    config: LlamaConfig
    compute: Compute = Compute()
    frozen: int = 0
    cached: int = 0

    def setup(self):
        c = self.config
        embedding = logical(nn.initializers.normal(c.initializer_range), "vocab", "embed")
        self.embedding = self.param("embedding", embedding, (self.cached or c.vocab_size, c.hidden_size), jnp.float32)
        if self.frozen and not self.cached:
            self.frozen_layers = _stack(c, self.compute, self.frozen)
        if self.frozen < c.num_layers:
            self.layers = _stack(c, self.compute, c.num_layers - self.frozen)
        self.final_norm = RMSNorm(c.rms_norm_eps)

    def __call__(
        self, tokens: Int[Array, "B T"], positions: Int[Array, "B T"], layout: Layout
    ) -> Float[Array, "B T D"]:
        x = self._embed(tokens)
        context = self._context(positions, layout)
        if self.frozen and not self.cached:
            x = jax.lax.stop_gradient(self.frozen_layers(x, context, None)[0])
        if self.frozen < self.config.num_layers:
            x, _ = self.layers(x, context, None)
        return self.final_norm(x)

    def extend(
        self,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"],
        cache: dict[str, Cache],
        mask: Bool[Array, "B T S+T"],
    ) -> tuple[Float[Array, "B T D"], dict[str, Cache]]:
        """States of new tokens that go on after cached ones.

        Args:
            cache: keys and values [L, B, S, K, H] for each group of layers (`layers`, `frozen_layers`); S may be 0.
            mask: which tokens each new one sees: the cached ones, then the new ones, none after itself.

        Returns:
            The states, and keys and values of the new tokens in the form of `cache`. Where they go is the caller's
            affair (decoding/engine.py).
        """
        x = self._embed(tokens)
        context = Context(self._rope(positions), mask=mask)
        new = {}
        if self.frozen:
            x, new["frozen_layers"] = self.frozen_layers(x, context, cache["frozen_layers"])
        if self.frozen < self.config.num_layers:
            x, new["layers"] = self.layers(x, context, cache["layers"])
        return self.final_norm(x), new

    def frozen_states(
        self, tokens: Int[Array, "B T"], positions: Int[Array, "B T"], layout: Layout
    ) -> Float[Array, "B T D"]:
        """What the frozen layers give: the input of the first layer that is trained."""
        return self.frozen_layers(self._embed(tokens), self._context(positions, layout), None)[0]

    def _embed(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        return look_up(self.embedding.astype(self.compute.dtype), tokens)

    def _context(self, positions: Int[Array, "B T"], layout: Layout) -> Context:
        plan = make_plan(self.compute.attention, layout, self.compute.chunk, self.compute.dtype)
        return Context(self._rope(positions), layout, plan)

    def _rope(self, positions: Int[Array, "B T"]) -> tuple[Array, Array]:
        c = self.config
        return rope_tables(positions, c.head_dim, c.rope_theta, c.rope_scaling)


class CausalLM(nn.Module):
    """Llama with a language-model head: float32 logits."""

    config: LlamaConfig
    compute: Compute = Compute()
    frozen: int = 0

    def setup(self):
        c = self.config
        self.llama = Llama(c, self.compute, self.frozen)
        if not c.tie_word_embeddings:
            init = logical(nn.initializers.normal(c.initializer_range), "embed", "vocab")
            self.lm_head = self.param("lm_head", init, (c.hidden_size, c.vocab_size), jnp.float32)

    def states(self, tokens: Int[Array, "B T"], positions: Int[Array, "B T"], layout: Layout) -> Float[Array, "B T D"]:
        """Hidden states that the head reads."""
        return self.llama(tokens, positions, layout)

    def extend(
        self, tokens: Int[Array, "B T"], positions: Int[Array, "B T"], cache: dict[str, Cache], mask: Array
    ) -> tuple[Float[Array, "B T D"], dict[str, Cache]]:
        """See `Llama.extend`."""
        return self.llama.extend(tokens, positions, cache, mask)

    def head(self, states: Float[Array, "... D"]) -> Float[Array, "... V"]:
        """float32 logits."""
        kernel = self.llama.embedding.T if self.config.tie_word_embeddings else self.lm_head
        return jnp.matmul(states, kernel.astype(self.compute.dtype), preferred_element_type=jnp.float32)

    def __call__(
        self, tokens: Int[Array, "B T"], positions: Int[Array, "B T"], layout: Layout
    ) -> Float[Array, "B T V"]:
        return self.head(self.states(tokens, positions, layout))
