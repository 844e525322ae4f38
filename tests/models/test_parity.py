"""Logits and rewards equal transformers' in float32, on random tiny configs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta

from steerjax.models.attention import Cache
from steerjax.models.config import LlamaConfig, RopeScaling
from steerjax.models.families import FAMILIES
from steerjax.models.llama import CausalLM, Compute, RewardModel

pytestmark = pytest.mark.parity

BASE = {"vocab_size": 97, "hidden_size": 48, "intermediate_size": 80, "num_layers": 2, "num_heads": 4}
CASES = {
    "multi-head": {"num_kv_heads": 4},
    "gqa-2": {"num_kv_heads": 2},
    "gqa-4": {"num_kv_heads": 1},
    "tied": {"tie_word_embeddings": True},
    "untied": {"tie_word_embeddings": False},
    "theta-5e5": {"rope_theta": 5e5},
    "llama3-8": {"rope_theta": 5e5, "rope_scaling": RopeScaling(8.0), "start": 8150},
    "llama3-32": {"rope_theta": 5e5, "rope_scaling": RopeScaling(32.0), "start": 9000},
    "head-dim-20": {"head_dim": 20},
    "epsilon": {"rms_norm_eps": 1e-3},
    "attention-bias": {"attention_bias": True},
    "mlp-bias": {"mlp_bias": True},
    "one-layer": {"num_layers": 1},
    "mistral": {"family": "mistral"},
    "mistral-window": {"family": "mistral", "window": 5},
    "mistral-window-1": {"family": "mistral", "window": 1},
    "qwen2": {"family": "qwen2"},
    "qwen3": {"family": "qwen3", "head_dim": 20},
    "qwen3-bias": {"family": "qwen3", "attention_bias": True},
}


def theirs(config: LlamaConfig, architecture: str):
    """transformers' class: `architecture` is Config, ForCausalLM or ForSequenceClassification."""
    import transformers

    return getattr(transformers, FAMILIES[config.family].prefix + architecture)


def hf_config(config: LlamaConfig, **more):
    rope = {"rope_type": "default", "rope_theta": config.rope_theta}
    scaling = config.rope_scaling
    if scaling.factor != 1:
        rope |= {"rope_type": "llama3", "factor": scaling.factor, "low_freq_factor": scaling.low_freq_factor}
        rope |= {"high_freq_factor": scaling.high_freq_factor}
        rope |= {"original_max_position_embeddings": scaling.original_max_position_embeddings}
    if config.family == "mistral":
        more["sliding_window"] = config.window or None
    return theirs(config, "Config")(
        vocab_size=config.vocab_size, hidden_size=config.hidden_size, intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_layers, num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_kv_heads, head_dim=config.head_dim, rms_norm_eps=config.rms_norm_eps,
        tie_word_embeddings=config.tie_word_embeddings, attention_bias=config.attention_bias,
        mlp_bias=config.mlp_bias, rope_parameters=rope, max_position_embeddings=131072, **more,
    )  # fmt: skip


def randomize(module, seed: int):
    """Fills every parameter, biases and norms too, so that none can be left out unseen."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.1 * noise if "norm" in name else 0.15 * noise)
    return module.eval()


def from_torch(module, config: LlamaConfig) -> dict:
    """transformers' parameters as ours, written out by hand: the oracle does not use our key map."""
    weights = {name: value.detach().numpy() for name, value in module.state_dict().items()}
    D, N, K, H = config.hidden_size, config.num_heads, config.num_kv_heads, config.head_dim
    shapes = {
        "attention.q": ("self_attn.q_proj", (D, N, H)),
        "attention.k": ("self_attn.k_proj", (D, K, H)),
        "attention.v": ("self_attn.v_proj", (D, K, H)),
        "attention.o": ("self_attn.o_proj", (N, H, D)),
        "mlp.gate": ("mlp.gate_proj", (D, config.intermediate_size)),
        "mlp.up": ("mlp.up_proj", (D, config.intermediate_size)),
        "mlp.down": ("mlp.down_proj", (config.intermediate_size, D)),
    }

    def stack(name, reshape):
        return np.stack([reshape(weights[f"model.layers.{i}.{name}"]) for i in range(config.num_layers)])

    layers: dict = {"attention": {}, "mlp": {}}
    for ours, (theirs, shape) in shapes.items():
        group, name = ours.split(".")
        entry = {"kernel": stack(f"{theirs}.weight", lambda w, shape=shape: w.T.reshape(shape))}
        if f"model.layers.0.{theirs}.bias" in weights:
            bias_shape = shape[1:] if name in ("q", "k", "v") else shape[-1:]
            entry["bias"] = stack(f"{theirs}.bias", lambda b, shape=bias_shape: b.reshape(shape))
        layers[group][name] = entry
    for letter in "qk" if "model.layers.0.self_attn.q_norm.weight" in weights else "":
        layers["attention"][f"{letter}_norm"] = {"scale": stack(f"self_attn.{letter}_norm.weight", lambda w: w)}
    layers["attention_norm"] = {"scale": stack("input_layernorm.weight", lambda w: w)}
    layers["mlp_norm"] = {"scale": stack("post_attention_layernorm.weight", lambda w: w)}
    return {
        "embedding": weights["model.embed_tokens.weight"],
        "layers": layers,
        "final_norm": {"scale": weights["model.norm.weight"]},
    }, weights


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(("attention", "chunk"), [("chunked", 8), ("chunked", 256), ("blockwise", 8)])
def test_logits_equal_transformers(name, attention, chunk):
    import torch

    case = {**BASE, **CASES[name]}
    start = case.pop("start", 0)
    config = LlamaConfig(**case)
    model = theirs(config, "ForCausalLM")(hf_config(config, attn_implementation="eager"))
    params, weights = from_torch(randomize(model, seed=0), config)
    params = {"llama": params}
    if not config.tie_word_embeddings:
        params["lm_head"] = weights["lm_head.weight"].T

    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (2, 24))
    positions = np.arange(24)[None].repeat(2, 0) + start
    with torch.no_grad():
        expected = model(input_ids=torch.tensor(tokens), position_ids=torch.tensor(positions)).logits.numpy()
    module = CausalLM(config, Compute(attention=attention, chunk=chunk))
    logits = jax.jit(module.apply)({"params": params}, tokens, positions, np.full((2, 24), 24))
    assert np.abs(expected).max() > 0.5  # the comparison is of something
    np.testing.assert_allclose(logits, expected, atol=1e-4, rtol=0)


def until_of(lengths, row_length: int) -> np.ndarray:
    """One text a row, then padding that sees itself."""
    places = np.arange(row_length)[None]
    return np.where(places < lengths[:, None], lengths[:, None], places + 1).astype(np.int32)


@pytest.mark.parametrize("family", FAMILIES)
def test_rewards_equal_sequence_classification(family):
    """Right padding, rows of different length, five labels."""
    import torch

    config = LlamaConfig(**BASE, num_kv_heads=2, family=family)
    more = {"num_labels": 5, "pad_token_id": 0, "attn_implementation": "eager"}
    model = randomize(theirs(config, "ForSequenceClassification")(hf_config(config, **more)), seed=1)
    params, weights = from_torch(model, config)
    params = {"llama": params, "reward_head": weights["score.weight"].T}

    lengths = np.array([24, 7, 15])
    tokens = np.random.default_rng(1).integers(1, config.vocab_size, (3, 24))
    real = np.arange(24)[None] < lengths[:, None]
    tokens = np.where(real, tokens, 0)
    with torch.no_grad():
        expected = model(torch.tensor(tokens), attention_mask=torch.tensor(real.astype(int))).logits.numpy()
    positions = np.arange(24)[None].repeat(3, 0)
    rewards = RewardModel(config, 5).apply({"params": params}, tokens, positions, until_of(lengths, 24))
    np.testing.assert_allclose(rewards[np.arange(3), lengths - 1], expected, atol=1e-4, rtol=0)


REWARD = LlamaConfig(**BASE | {"num_layers": 3}, num_kv_heads=2)
ROWS = np.random.default_rng(2).integers(0, REWARD.vocab_size, (2, 16)), np.arange(16)[None].repeat(2, 0)


def initialized(model) -> dict:
    return meta.unbox(model.init(jax.random.key(0), method="initialize")["params"])


def gradients(model, params, **options):
    """Of a sum over the hidden states where two texts end; `options` are of `hidden`."""

    def loss(params):
        until = until_of(np.array([16, 9]), 16)
        hidden = model.apply({"params": params}, *ROWS, until, method="hidden", **options)
        return jnp.square(model.apply({"params": params}, hidden, method="head")[[0, 1], [15, 8]]).sum()

    return jax.jit(jax.grad(loss))(params)


def assert_close(actual, expected):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), actual, expected)


@pytest.mark.slow
def test_remat_and_unroll_change_nothing():
    """Loss and gradients are the same for every remat policy and unroll."""
    params = initialized(RewardModel(REWARD, 2))
    plain = gradients(RewardModel(REWARD, 2), params)
    for options in (
        {"remat": "full"},
        {"remat": "dots"},
        {"unroll": 3},
        {"unroll": 2, "remat": "full"},
        {"flat": True},
    ):
        assert_close(gradients(RewardModel(REWARD, 2, compute=Compute(**options)), params), plain)


@pytest.mark.slow
@pytest.mark.parametrize("frozen", [1, 2, 3])
def test_frozen_layers_get_no_gradient_and_the_rest_the_same(frozen):
    model = RewardModel(REWARD, 2)
    params = initialized(model)
    plain, found = gradients(model, params), gradients(model, params, frozen=frozen)
    assert not np.any(found["llama"].pop("embedding"))
    del plain["llama"]["embedding"]
    for leaf in jax.tree.leaves(found["llama"]["layers"]):
        assert not np.any(leaf[:frozen])
    upper = jax.tree.map(lambda x: x[frozen:], (found["llama"].pop("layers"), plain["llama"].pop("layers")))
    assert_close(*upper)
    assert_close(found, plain)
    # And from the states that the frozen layers gave.
    until = until_of(np.array([16, 9]), 16)
    states = model.apply({"params": params}, *ROWS, until, frozen, method="frozen_states")
    known = gradients(model, params, frozen=frozen, states=states)
    assert_close(jax.tree.map(lambda x: x[frozen:], known["llama"].pop("layers")), upper[0])


def test_extending_a_cache_equals_one_forward():
    """In pieces of 5, 1 and 10 tokens, each after the keys and values of those before."""
    model = CausalLM(REWARD)
    params, (tokens, positions) = initialized(model), ROWS
    whole = model.apply({"params": params}, tokens, positions, np.full((2, 16), 16), method="hidden")
    none = jnp.zeros((REWARD.num_layers, 2, 0, REWARD.num_kv_heads, REWARD.head_dim))
    cache, states = Cache(none, none), []
    for start, stop in ((0, 5), (5, 6), (6, 16)):
        mask = np.broadcast_to(np.arange(stop) <= np.arange(start, stop)[:, None], (2, stop - start, stop))
        part = tokens[:, start:stop], positions[:, start:stop]
        new, added = model.apply({"params": params}, *part, cache, mask, method="extend")
        cache = jax.tree.map(lambda a, b: jnp.concatenate([a, b], axis=2), cache, added)
        states.append(new)
    assert cache.keys.shape == (3, 2, 16, 2, 12)
    np.testing.assert_allclose(np.concatenate(states, axis=1), whole, rtol=1e-5, atol=1e-5)
