"""Llama in Linen, with either head. Modules hold parameters and names; the mathematics is in rope.py and attention/.

Letters: B rows, T tokens, D model width, F feed-forward width, N query heads, K key-value heads, H head size,
L layers, V vocabulary, A attributes, R rank of adapters.
"""

import functools
import math
import operator
import zlib
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.core import meta
from jaxtyping import Array, Bool, Float, Int

from steerjax.models.attention import (
    ATTENTION,
    CUDNN_FORWARD,
    Cache,
    Plan,
    Window,
    cached_attention,
    make_plan,
    seen_mean,
    self_attention,
)
from steerjax.models.config import REMAT, LlamaConfig
from steerjax.models.embedding import look_up
from steerjax.models.rope import apply_rope, rope_tables
from steerjax.parallel.rules import constrain, logical

Ints = Int[Array, "B T"]
States = Float[Array, "B T D"]


def keep_products(primitive, *arrays, **parameters) -> bool:
    """A checkpoint policy: products with kernels are kept, and what attention's backward pass needs of its forward."""
    products = jax.checkpoint_policies.dots_with_no_batch_dims_saveable(primitive, *arrays, **parameters)
    return products or parameters.get("name") == ATTENTION or primitive.name == CUDNN_FORWARD


# What a layer keeps for its backward pass: name -> checkpoint policy (None: everything, no remat).
REMAT_POLICIES = dict(zip(REMAT, (None, keep_products, jax.checkpoint_policies.nothing_saveable), strict=True))
# Letter of a kernel's dimension -> its logical axis.
AXES = {"D": "embed", "F": "mlp", "N": "heads", "K": "kv_heads", "H": "head", "V": "vocab", "R": "rank"}


@dataclass(frozen=True)
class Compute:
    """`ComputeConfig` with nothing left to choose (`bundle.build.resolve_compute`); `chunk` is its attention_chunk.

    `stacked`: the layers' parameters are one stack that is scanned; else a tuple of layers (`unstacked`), one after the
    other in the program. XLA copies a layer out of a stack on a CPU, which costs a decoding step twice its time.
    `flat`: projections see rows and tokens, and heads, as one dimension (`project`).
    """

    dtype: jnp.dtype = jnp.float32
    remat: str = "none"
    unroll: int = 1
    attention: str = "chunked"
    chunk: int = 256
    stacked: bool = True
    flat: bool = False


@jax.jit  # one program; else each shape of a parameter has two
def unstacked(params: dict) -> dict:
    """Parameters of a CausalLM for `Compute(stacked=False)`."""
    return params | {"llama": params["llama"] | {"layers": _each(params["llama"]["layers"])}}


def _each(stack: dict) -> tuple[dict, ...]:
    """The layers of a stack."""
    return tuple(jax.tree.map(operator.itemgetter(n), stack) for n in range(len(jax.tree.leaves(stack)[0])))


def in_dtype(params: dict, dtype) -> dict:
    """All but reward heads in the dtype of a computation, as the modules use them. Parts may have None for leaves."""
    cast = functools.partial(jax.tree.map, lambda x: x.astype(dtype))
    return {name: part if name.startswith("reward") else cast(part) for name, part in params.items()}


class Context(NamedTuple):
    """What all layers share: RoPE's tables, and which token sees which, as a plan (packed rows) or mask (a cache).

    `noise`, where there is dropout, are keys, one a row; in a layer they are the layer's own.
    """

    rope: tuple[Float[Array, "B T 1 H"], Float[Array, "B T 1 H"]]
    plan: Plan | None
    mask: Bool[Array, "B T S+T"] | None
    noise: Array | None = None  # keys [B]


def _fold(keys: Array, number) -> Array:
    return jax.vmap(jax.random.fold_in, (0, None))(keys, number)


def dropout(x: Float[Array, "B T ..."], keys: Array, rate: float) -> Float[Array, "B T ..."]:
    """x with each entry 0 at that rate, the others scaled up. A row's noise follows from its key, whatever the mesh."""
    keep = jax.vmap(lambda key: jax.random.bernoulli(key, 1 - rate, x.shape[1:]))(keys)
    return jnp.where(keep, x / (1 - rate), 0)


class RMSNorm(nn.Module):
    """x over its root mean square, times a scale; statistics in float32, returned in x's dtype."""

    epsilon: float

    @nn.compact
    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        scale = self.param("scale", logical(nn.initializers.ones, "norm"), (x.shape[-1],), jnp.float32)
        wide = x.astype(jnp.float32)
        normed = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + self.epsilon)
        # Multiplied as it is, its gradient in a batch of one row is a sum over the middle of [1, T, D]: 15 ms on a CPU.
        return jnp.broadcast_to(scale.astype(x.dtype), x.shape) * normed.astype(x.dtype)


def project(x: Float[Array, "B T ..."], kernel: Array, flat: bool) -> Float[Array, "B T ..."]:
    """x times a kernel over all but x's first two dimensions; `flat` as one product of matrices.

    With B and T apart, the kernel's gradient sums over two dimensions. XLA's CPU compiler transposes both operands in
    memory for that: a step takes 1.4 times as long.
    """
    inner = x.ndim - 2
    if not flat:
        return jnp.tensordot(x, kernel, inner)
    inputs = math.prod(kernel.shape[:inner])
    y = x.reshape(-1, inputs) @ kernel.reshape(inputs, -1)
    return y.reshape(*x.shape[:2], *kernel.shape[inner:])


class Linear(nn.Module):
    """x times a kernel; the equation names every dimension, and so the kernel's shape and axes."""

    equation: str
    config: LlamaConfig
    compute: Compute

    @nn.compact
    def __call__(self, x: Array, noise: Array | None = None) -> Array:
        c, (inputs, outputs) = self.config, self.equation.split("->")
        sizes = {"D": c.hidden_size, "F": c.intermediate_size, "N": c.num_heads, "K": c.num_kv_heads, "H": c.head_dim}
        sizes["R"] = c.lora.rank

        def param(name: str, init, letters: str) -> Array:
            axes, shape = [AXES[letter] for letter in letters], [sizes[letter] for letter in letters]
            return self.param(name, logical(init, *axes), shape, jnp.float32).astype(self.compute.dtype)

        kernel = param("kernel", nn.initializers.normal(c.initializer_range), inputs.split(",")[1])
        y = project(x, kernel, self.compute.flat)
        if c.lora.adapts(self.name):
            letters = inputs.split(",")[1]
            into, out = ("".join(x for x in letters if (x in outputs) == there) for there in (False, True))
            a = param("lora_a", nn.initializers.normal(c.initializer_range), into + "R")
            b = param("lora_b", nn.initializers.zeros, "R" + out)
            if noise is not None:
                x = dropout(x, _fold(noise, zlib.crc32(self.name.encode())), c.lora.dropout)
            low = project(x, a, self.compute.flat)
            y += project(low, b, self.compute.flat) * (c.lora.alpha / c.lora.rank)
        return y + param("bias", nn.initializers.zeros, outputs.removeprefix("BT")) if self.name in c.biased else y


class Attention(nn.Module):
    config: LlamaConfig
    compute: Compute

    @nn.compact
    def __call__(self, x: States, context: Context, cache: Cache | None):
        def linear(equation: str, name: str, x: Array) -> Array:
            return Linear(equation, self.config, self.compute, name=name)(x, context.noise)

        q, k = linear("BTD,DNH->BTNH", "q", x), linear("BTD,DKH->BTKH", "k", x)
        v = linear("BTD,DKH->BTKH", "v", x)
        if self.config.qk_norm:
            q, k = (RMSNorm(self.config.rms_norm_eps, name=f"{n}_norm")(y) for n, y in (("q", q), ("k", k)))
        q, k = (apply_rope(y, *context.rope) for y in (q, k))
        q = constrain(q, "batch", "length", "activation_heads", None)
        if cache is None:
            y = self_attention(q, k, v, context.plan)
        else:
            y, cache = cached_attention(q, k, v, cache, context.mask, self.compute.chunk), Cache(k, v)
        return linear("BTNH,NHD->BTD", "o", y), cache


class MLP(nn.Module):
    config: LlamaConfig
    compute: Compute

    @nn.compact
    def __call__(self, x: States, noise: Array | None) -> States:
        def linear(equation: str, name: str, x: Array) -> Array:
            return Linear(equation, self.config, self.compute, name=name)(x, noise)

        y = jax.nn.silu(linear("BTD,DF->BTF", "gate", x)) * linear("BTD,DF->BTF", "up", x)
        return linear("BTF,FD->BTD", "down", constrain(y, "batch", "length", "activation_mlp"))


class Block(nn.Module):
    """One layer; keys and values of its tokens come back where a cache goes in."""

    config: LlamaConfig
    compute: Compute

    @nn.compact
    def __call__(self, x: States, context: Context, cache: Cache | None):
        norm = functools.partial(RMSNorm, self.config.rms_norm_eps)
        normed = norm(name="attention_norm")(x)
        y, cache = Attention(self.config, self.compute, name="attention")(normed, context, cache)
        x = x + y
        x = x + MLP(self.config, self.compute, name="mlp")(norm(name="mlp_norm")(x), context.noise)
        return constrain(x, "batch", "length", "activation_embed"), cache


class Llama(nn.Module):
    """The backbone: token ids -> hidden states after the final norm. `layers` are one stack, its first dimension L, or
    a tuple of L."""

    config: LlamaConfig
    compute: Compute = Compute()

    def setup(self):
        c = self.config
        embedding = logical(nn.initializers.normal(c.initializer_range), "vocab", "embed")
        self.embedding = self.param("embedding", embedding, (c.vocab_size, c.hidden_size), jnp.float32)
        self.layers = self.param("layers", self._init_layers)
        self.final_norm = RMSNorm(c.rms_norm_eps)

    def initialize(self) -> None:
        """For `init`: every parameter, and no computation."""
        self.final_norm(jnp.zeros((1, self.config.hidden_size)))

    def _init_layers(self, key: Array) -> dict:
        """Each layer from a key of its own. The cached form runs: it needs no kernel and no mesh."""
        c, block = self.config, Block(self.config, self.compute, parent=None)
        one, none = jnp.zeros((1, 1, c.hidden_size), self.compute.dtype), jnp.zeros((1, 0, c.num_kv_heads, c.head_dim))
        arguments = one, self._context(jnp.zeros((1, 1), int), mask=jnp.ones((1, 1, 1), bool)), Cache(none, none)
        params = jax.vmap(lambda key: block.init(key, *arguments)["params"])(jax.random.split(key, c.num_layers))
        if not self.compute.stacked:
            return _each(meta.unbox(params))
        return meta.add_axis(params, 0, {nn.PARTITION_NAME: "layers"})

    def _context(self, positions: Ints, until=None, mask=None, noise=None) -> Context:
        c, run = self.config, self.compute
        window = Window(positions, positions + c.window) if c.window else None
        plan = None if until is None else make_plan(run.attention, until, run.chunk, run.dtype, window)
        return Context(rope_tables(positions, c.head_dim, c.rope_theta, c.rope_scaling), plan, mask, noise)

    def _embed(self, tokens: Ints) -> States:
        return look_up(self.embedding.astype(self.compute.dtype), tokens)

    def _run(self, x: States, context: Context, first: int, last: int, cache: Cache | None = None):
        """Layers [first, last): their output, and keys and values [L B T K H] where there is a cache, or L of them."""
        block = Block(self.config, self.compute, parent=None)

        def layer(x, inputs):
            params, cache, number = inputs
            noise = None if context.noise is None else _fold(context.noise, number)
            return block.apply({"params": params}, x, context._replace(noise=noise), cache)

        if (policy := REMAT_POLICIES[self.compute.remat]) is not None:
            layer = jax.checkpoint(layer, policy=policy, prevent_cse=False)
        if not self.compute.stacked:
            new = []
            for number in range(first, last):
                x, own = layer(x, (self.layers[number], cache and cache[number], number))
                new.append(own)
            return x, tuple(new)
        stack = jax.tree.map(lambda p: p[first:last], self.layers)
        inputs = stack, cache, jnp.arange(first, last)
        return jax.lax.scan(layer, x, inputs, unroll=min(self.compute.unroll, max(1, last - first)))

    def hidden(
        self,
        tokens: Ints,
        positions: Ints,
        until: Ints,
        frozen: int = 0,
        states: States | None = None,
        noise: Array | None = None,
    ) -> States:
        """Hidden states of packed rows.

        Args:
            positions: of each token in its own text.
            until: the first place in the row where a token is no longer seen (attention/mask.py).
            frozen: so many of the first layers, with the embedding, get no gradient.
            states: what those layers gave (`frozen_states`), where that is known.
            noise: keys of each row's dropout; without them there is none.
        """
        context = self._context(positions, until, noise=noise)
        if states is None:
            states, _ = self._run(self._embed(tokens), context._replace(noise=None), 0, frozen)
        x = jax.lax.stop_gradient(states.astype(self.compute.dtype)) if frozen else states
        x, _ = self._run(x, context, frozen, self.config.num_layers)
        return self.final_norm(x)

    def frozen_states(self, tokens, positions, until, frozen: int) -> States:
        """What the first `frozen` layers give; arguments of `hidden`."""
        return self._run(self._embed(tokens), self._context(positions, until), 0, frozen)[0]

    def extend(self, tokens: Ints, positions: Ints, cache: Cache, mask: Bool[Array, "B T S+T"]) -> tuple[States, Cache]:
        """States of new tokens that go on after cached ones (of all layers, S may be 0), and their own keys and values.

        `mask` says which tokens each new one sees: the cached ones, then the new ones, none after itself. Of layers
        that are not stacked, caches are a tuple of L.
        """
        context = self._context(positions, mask=mask)
        x, new = self._run(self._embed(tokens), context, 0, self.config.num_layers, cache)
        return self.final_norm(x), new


class Headed(nn.Module):
    """A Llama with a head; the Llama's methods are its own."""

    def initialize(self) -> None:
        self.llama.initialize()

    def hidden(self, *arguments, **options) -> States:
        return self.llama.hidden(*arguments, **options)

    def frozen_states(self, *arguments) -> States:
        return self.llama.frozen_states(*arguments)

    def extend(self, *arguments) -> tuple[States, Cache]:
        return self.llama.extend(*arguments)


class CausalLM(Headed):
    """Llama with a language-model head: float32 logits."""

    config: LlamaConfig
    compute: Compute = Compute()

    def setup(self):
        c = self.config
        self.llama = Llama(c, self.compute)
        if not c.tie_word_embeddings:
            init = logical(nn.initializers.normal(c.initializer_range), "embed", "vocab")
            self.lm_head = self.param("lm_head", init, (c.hidden_size, c.vocab_size), jnp.float32)

    def head(self, states: Float[Array, "... D"]) -> Float[Array, "... V"]:
        kernel = self.llama.embedding.T if self.config.tie_word_embeddings else self.lm_head
        return jnp.matmul(states, kernel.astype(self.compute.dtype), preferred_element_type=jnp.float32)

    def __call__(self, tokens: Ints, positions: Ints, until: Ints) -> Float[Array, "B T V"]:
        return self.head(self.hidden(tokens, positions, until))


class RewardModel(Headed):
    """Llama with a float32 head: predicted ratings of the text that ends at each token; at its end, of a response.

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

    def read(self, hidden: States, until: Ints) -> States:
        """The float32 states that the head reads."""
        return hidden.astype(jnp.float32) if self.readout == "last" else seen_mean(hidden, until)

    def head(self, states: Float[Array, "... D"]) -> Float[Array, "... A"]:
        """Ratings, float32."""
        ratings = jnp.einsum("...D,DA->...A", states, self.reward_head, precision="highest")
        return ratings + self.reward_bias if self.use_bias else ratings

    def __call__(self, tokens: Ints, positions: Ints, until: Ints) -> Float[Array, "B T A"]:
        return self.head(self.read(self.hidden(tokens, positions, until), until))
