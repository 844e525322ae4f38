"""Parameter and FLOP counts against published ones."""

import dataclasses

import jax
import pytest

from steerjax.models.config import LlamaConfig, LoraConfig, RopeScaling
from steerjax.models.flops import peak_flops, training_flops
from steerjax.models.llama import CausalLM, RewardModel

pytestmark = pytest.mark.short

PUBLISHED = {
    "llama-2-7b": (6_738_415_616, LlamaConfig(32000, 4096, 11008, 32, 32, 32, tie_word_embeddings=False)),
    "llama-2-70b": (68_976_648_192, LlamaConfig(32000, 8192, 28672, 80, 64, 8, tie_word_embeddings=False)),
    "llama-3.1-8b": (
        8_030_261_248,
        LlamaConfig(128256, 4096, 14336, 32, 32, 8, rope_scaling=RopeScaling(8.0), tie_word_embeddings=False),
    ),
    "llama-3.2-1b": (1_235_814_400, LlamaConfig(128256, 2048, 8192, 16, 32, 8, rope_scaling=RopeScaling(32.0))),
    "tinyllama-1.1b": (1_100_048_384, LlamaConfig(32000, 2048, 5632, 22, 32, 4, tie_word_embeddings=False)),
    "smollm2-135m": (134_515_008, LlamaConfig(49152, 576, 1536, 30, 9, 3)),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameter_counts(name):
    published, config = PUBLISHED[name]
    module = CausalLM(config)
    shapes = jax.eval_shape(lambda key: module.init(key, method="initialize"), jax.random.key(0))
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == published


def test_training_flops_are_six_a_parameter_and_token_plus_attention():
    config = PUBLISHED["llama-2-70b"][1]
    tokens, pairs = 4096, 4096 * 4097 // 2
    by_hand = 6 * tokens * (80 * (2 * 8192 * 128 * (64 + 8) + 3 * 8192 * 28672) + 8192 * 32000)
    by_hand += 12 * pairs * 80 * 8192
    assert training_flops(config, tokens, pairs, head_outputs=32000) == by_hand
    # within 1% of 6 N T + causal attention with N all parameters but the embedding
    assert by_hand == pytest.approx(6 * tokens * (68_976_648_192 - 32000 * 8192) + 12 * pairs * 80 * 8192, rel=0.01)


def test_with_adapters_their_gradients_are_computed_and_those_of_the_matrices_are_not():
    config = PUBLISHED["llama-3.1-8b"][1]
    adapted = dataclasses.replace(config, lora=LoraConfig(rank=32))
    module = RewardModel(adapted, 1)
    shapes = jax.eval_shape(lambda key: module.init(key, method="initialize"), jax.random.key(0))
    leaves = jax.tree_util.tree_leaves_with_path(shapes)
    adapters = sum(leaf.size for path, leaf in leaves if "lora_" in jax.tree_util.keystr(path))
    by_hand = 4 * 32 * config.block_parameters + 6 * adapters
    assert training_flops(adapted, 1, 0) == by_hand


def test_peaks():
    assert peak_flops("TPU v5 lite") == 197e12
    assert peak_flops("TPU v5p") == peak_flops("TPU v5") == 459e12
    assert peak_flops("NVIDIA H100 80GB HBM3") == 989e12
    assert peak_flops("cpu") is None
