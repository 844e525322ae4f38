"""Rows cut over a context axis give what whole rows give, and only keys and values are gathered for it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta
from jax.sharding import NamedSharding

from steerjax.config import MeshConfig
from steerjax.data.packing import Branch, PromptGroup, pack
from steerjax.models.attention import backends
from steerjax.models.attention.cudnn import cudnn_attention
from steerjax.models.attention.mask import Layout
from steerjax.models.attention.splash import splash_attention
from steerjax.models.llama import CausalLM, Compute
from steerjax.models.reward_head import RewardModel
from steerjax.parallel.mesh import make_mesh
from steerjax.parallel.rules import partition_spec
from steerjax.planning.hlo import collectives
from steerjax.training.reward import make_loss as reward_loss
from steerjax.training.reward import reward_inputs
from steerjax.training.sft import make_loss as sft_loss
from steerjax.training.sft_data import SFTBatch
from tests.helpers import TINY, assert_trees_close, host_batch, random_groups, random_tokens

T, ROWS = 256, 4
WEIGHTS = np.array([1.0, 0.5, 2.0], np.float32)


def groups_with_branches_in_the_middle():
    """Random groups, and long ones that a cut of the row goes through, with branches inside their prompts."""
    random = np.random.default_rng(1)
    groups = random_groups([3, 1, 2, 4] * 3, seed=2)
    for first in (100, 200):
        prompt = random.integers(1, TINY.vocab_size, 60).astype(np.int32)
        branches = [
            Branch(random_tokens(random, 20), np.ones(3, np.float32), np.ones(3, bool), first + at, at)
            for at in (10, 10, 45, 60)
        ]
        groups.append(PromptGroup(prompt, tuple(branches)))
    return groups


def reward_case(compute: Compute, frozen: int = 0):
    groups = groups_with_branches_in_the_middle()
    rows = pack(groups, T, 12, range(len(groups)))[:ROWS]
    batch = jax.tree.map(lambda x: x[0], host_batch(groups, rows, T, 12))
    model = RewardModel(TINY, 3, compute=compute, frozen=frozen)
    return reward_loss(model, WEIGHTS, "ratings"), jax.jit(model.init)(jax.random.key(0), reward_inputs(batch)), batch


def sft_case(compute: Compute, frozen: int = 0):
    random = np.random.default_rng(0)
    segments = np.repeat(np.array([[1] * 100 + [2] * 140 + [0] * 16], np.int32), ROWS, 0)
    positions = np.concatenate([np.arange(100), np.arange(140), np.zeros(16)]).astype(np.int32)[None].repeat(ROWS, 0)
    tokens, targets = random.integers(1, TINY.vocab_size, (2, ROWS, T)).astype(np.int32)
    weights = ((segments > 0) * random.integers(0, 2, (ROWS, T))).astype(np.float32)
    fields = {"tokens": tokens, "targets": targets, "positions": positions, "segments": segments, "weights": weights}
    batch = SFTBatch(**fields)
    model = CausalLM(TINY, compute, frozen)
    one = [x[:, :1] for x in (tokens, positions, segments)]
    variables = jax.jit(model.init)(jax.random.key(0), one[0], one[1], Layout(one[2], one[2]))
    return sft_loss(model, 32), variables, batch


def compiled(case, mesh_sizes: tuple[int, ...], attention: str, remat: str = "none", **options):
    """The compiled (params, batch) -> ((sum, rest), gradients), and its arguments in their shards."""
    mesh = make_mesh(MeshConfig(*mesh_sizes), jax.devices()[: int(np.prod(mesh_sizes))])
    loss, variables, batch = case(Compute(chunk=64, attention=attention, remat=remat), **options)
    cut = NamedSharding(mesh, partition_spec(("batch", "length")))
    rows = NamedSharding(mesh, partition_spec(("batch",)))
    batch = jax.tree.map(lambda x: jax.device_put(x, cut if x.shape[1:] == (T,) else rows), batch)
    params = jax.device_put(meta.unbox(variables["params"]), NamedSharding(mesh, partition_spec(())))
    with jax.set_mesh(mesh):
        return jax.jit(jax.value_and_grad(loss, has_aux=True)).lower(params, batch).compile(), params, batch


CASES = {"reward": (reward_case, {}), "frozen": (reward_case, {"frozen": 1}), "sft": (sft_case, {})}


@functools.cache
def on_one_device(name: str):
    case, options = CASES[name]
    step, *arguments = compiled(case, (1, 1, 1, 1), "chunked", **options)
    (total, _), gradients = step(*arguments)
    return total, gradients


def check(name: str, mesh: tuple[int, ...], attention: str):
    case, options = CASES[name]
    step, *arguments = compiled(case, mesh, attention, **options)
    (total, _), gradients = step(*arguments)
    expected_total, expected = on_one_device(name)
    np.testing.assert_allclose(total, expected_total, rtol=1e-5)
    assert_trees_close(gradients, expected, rtol=1e-5)
    assert jnp.abs(expected["llama"]["layers"]["attention"]["k"]["kernel"]).max() > 1e-3


@pytest.mark.parametrize(
    ("name", "mesh"),
    [("reward", (1, 1, 1, 4)), ("reward", (2, 1, 2, 2)), ("frozen", (2, 1, 2, 2)), ("sft", (2, 1, 2, 2))],
    ids=str,
)
@pytest.mark.parametrize("attention", ["chunked", "blockwise"])
def test_context_parallel_equals_none(name, mesh, attention):
    check(name, mesh, attention)


@pytest.mark.parametrize("mesh", [(2, 1, 2, 1), (1, 1, 2, 2)], ids=str)
@pytest.mark.parametrize("attention", ["splash", "cudnn"])
def test_kernels_on_a_mesh(attention, mesh, monkeypatch):
    """As the model calls them on TPU and GPU; the kernels run as plain JAX."""
    monkeypatch.setattr(backends, "splash_attention", functools.partial(splash_attention, interpret=True))
    monkeypatch.setattr(backends, "cudnn_attention", functools.partial(cudnn_attention, implementation="xla"))
    check("reward", mesh, attention)


@pytest.mark.parametrize("attention", ["chunked", "blockwise"])
def test_only_keys_and_values_are_gathered(attention):
    """Forward, in the recomputation, and scattered back; else sums of parameters' gradients and what is small."""
    step, *_ = compiled(reward_case, (1, 1, 1, 4), attention, remat="full")
    found = [c for c in collectives(step.as_text(), 4) if c.times == TINY.num_layers]
    whole, part = ((ROWS, length, TINY.num_kv_heads, TINY.head_dim) for length in (T, T // 4))
    assert [c.shape for c in found if c.kind == "all-gather"] == [whole] * 4
    assert [c.shape for c in found if c.kind == "reduce-scatter"] == [part] * 2
    rest = [c for c in found if c.kind not in ("all-gather", "reduce-scatter")]
    assert {c.kind for c in rest} == {"all-reduce"}
    assert all(ROWS not in c.shape for c in rest)  # of parameters
