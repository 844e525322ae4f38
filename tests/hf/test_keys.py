"""The key map: any part of our arrays, and back."""

import itertools

import jax
import ml_dtypes
import numpy as np
import pytest
from flax.core import meta

from steerjax.hf.keys import CAUSAL_LM, CLASSIFIER, _transposed, stacked_shapes, tensors
from steerjax.models.config import LlamaConfig
from steerjax.models.llama import CausalLM
from tests.hf_folders import CLASSIFIER as CLASSIFIER_CONFIG
from tests.hf_folders import TINY, oracle, random_tensors

CONFIG = LlamaConfig(
    vocab_size=6, hidden_size=8, intermediate_size=6, num_layers=3, num_heads=4, num_kv_heads=2, attention_bias=True,
    mlp_bias=True, tie_word_embeddings=False,
)  # fmt: skip
RAW = TINY | {
    "vocab_size": 6, "hidden_size": 8, "intermediate_size": 6, "attention_bias": True, "mlp_bias": True,
    "tie_word_embeddings": False,
}  # fmt: skip


@pytest.mark.parametrize("shape", [(1, 1), (127, 300), (128, 256), (129, 5), (0, 3)])
def test_a_transpose_by_tiles(shape):
    matrix = np.random.default_rng(0).standard_normal(shape).astype(ml_dtypes.bfloat16)
    for array in (matrix, matrix[:, ::-1]):
        found = _transposed(array)
        assert found.flags["C_CONTIGUOUS"]
        assert found.tobytes() == np.ascontiguousarray(array.T).tobytes()


def whole(shape) -> tuple[slice, ...]:
    return tuple(slice(0, size) for size in shape)


def parts(size: int) -> list[slice]:
    return [slice(0, size), slice(size // 2, size), slice(0, 1), slice(None)]


@pytest.mark.short
def test_every_part_of_every_tensor():
    stored = random_tensors(RAW)
    expected = oracle(stored, RAW)
    known = tensors(CONFIG, CAUSAL_LM)
    assert {t.name: t.shape for t in known} == {name: value.shape for name, value in stored.items()}
    assert {t.path for t in known} == expected.keys()
    for tensor in known:
        ours = expected[tensor.path] if tensor.layer is None else expected[tensor.path][tensor.layer]
        assert tensor.ours == ours.shape
        for index in itertools.product(*map(parts, ours.shape)):
            block = stored[tensor.name][tensor.hf_index(index)]
            np.testing.assert_array_equal(tensor.to_ours(block, index), ours[index], err_msg=tensor.name)
        back = tensor.to_hf(ours)
        assert back.flags.c_contiguous
        np.testing.assert_array_equal(back, stored[tensor.name])
        assert tensor.hf_index(whole(ours.shape)) == whole(tensor.shape)


def test_no_more_is_read_than_needed():
    """A part along whole outer dimensions reads exactly its own numbers."""
    for tensor in tensors(CONFIG, CAUSAL_LM):
        shape = tensor.ours
        for axis in {0, 1 if tensor.path.endswith(("q/kernel", "k/kernel", "v/kernel")) else len(shape) - 1}:
            if tensor.path.endswith("bias") and axis:  # the H of [N, H] comes whole
                continue
            index = tuple(slice(0, size // 2 if i == axis else size) for i, size in enumerate(shape))
            size = np.prod([part.stop - part.start for part in tensor.hf_index(index)])
            assert size == np.prod([part.stop - part.start for part in index]), tensor.name


def test_classifier_and_prefix():
    raw = RAW | CLASSIFIER_CONFIG
    known = tensors(CONFIG, CLASSIFIER, 5)
    assert {t.name: t.shape for t in known} == {n: v.shape for n, v in random_tensors(raw).items()}
    assert {t.name for t in tensors(CONFIG, CAUSAL_LM, prefix="")} >= {"norm.weight", "layers.2.mlp.up_proj.bias"}


class SomeBiases(LlamaConfig):
    """As Qwen2 has them."""

    biased = ("q", "k", "v")


@pytest.mark.parametrize("biases", [{}, {"attention_bias": True}, {"mlp_bias": True}, "some"], ids=str)
def test_the_model_and_the_map_have_the_same_parameters(biases):
    config = SomeBiases(vocab_size=6) if biases == "some" else LlamaConfig(vocab_size=6, **biases)
    boxed = jax.eval_shape(lambda key: CausalLM(config).init(key, method="initialize"), jax.random.key(0))["params"]
    leaves = jax.tree_util.tree_leaves_with_path(meta.unbox(boxed))
    found = {jax.tree_util.keystr(path, simple=True, separator="/"): leaf.shape for path, leaf in leaves}
    assert found == stacked_shapes(tensors(config, CAUSAL_LM))
    assert sum(path.endswith("/bias") for path in found) == len(config.biased)
