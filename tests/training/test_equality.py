"""Packed equals unpacked; micro-batches and meshes change nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from steerjax.config import MeshConfig, OptimizerConfig
from steerjax.data.packing import pack, unpacked_rows
from steerjax.errors import ConfigError
from steerjax.models.llama import Compute
from steerjax.models.reward_head import RewardModel
from steerjax.objectives.regression import masked_squared_error
from steerjax.parallel.mesh import make_mesh
from steerjax.training.input import row_examples
from steerjax.training.optimizer import make_optimizer
from steerjax.training.reward import dummy_inputs, make_feeder, make_loss, reward_inputs
from steerjax.training.schedules import make_schedule
from steerjax.training.state import abstract_state, shardings_of
from steerjax.training.step import make_train_step
from tests.helpers import TINY, assert_trees_close, host_batch, init_params, random_groups, random_state

WEIGHTS = np.array([1.0, 0.5, 2.0], np.float32)


def loss_gradient_predictions(model, params, groups, rows, row_length, average="ratings"):
    batch = host_batch(groups, rows, row_length, 8)
    first = jax.tree.map(lambda x: x[0], batch)

    def loss(params):
        predictions = model.apply({"params": params}, reward_inputs(first))
        total, count = masked_squared_error(predictions, first.ratings, first.mask, WEIGHTS, average)
        return total / count, predictions

    (value, predictions), gradient = jax.value_and_grad(loss, has_aux=True)(params)
    by_example = {}
    for row, outputs in zip(rows, np.asarray(predictions), strict=True):
        by_example |= dict(zip(row_examples(groups, row), outputs, strict=False))
    return value, gradient, np.stack([by_example[i] for i in sorted(by_example)])


@pytest.mark.parametrize("responses", [1, 2, 4])
@pytest.mark.parametrize("readout", ["last", "mean"])
@pytest.mark.parametrize("average", ["ratings", "examples"])
def test_packed_with_shared_prompts_equals_one_row_a_response(responses, readout, average):
    groups = random_groups([responses] * 6, seed=responses)
    model = RewardModel(TINY, 3, readout=readout, compute=Compute(chunk=16))
    packed = pack(groups, 96, 8, range(6))
    assert len(packed) < 6 * responses
    params = init_params(model, host_batch(groups, packed, 96, 8))
    shared = loss_gradient_predictions(model, params, groups, packed, 96, average)
    alone = loss_gradient_predictions(model, params, groups, unpacked_rows(groups), 64, average)
    np.testing.assert_allclose(shared[0], alone[0], rtol=1e-5)
    np.testing.assert_allclose(shared[2], alone[2], rtol=1e-5, atol=1e-5)
    assert_trees_close(shared[1], alone[1], rtol=1e-5)


def test_padding_and_other_segments_are_never_seen():
    """Changing every token of other segments, other branches and the padding changes no prediction of a response."""
    groups = random_groups([2, 2, 2], seed=5)
    model = RewardModel(TINY, 3, compute=Compute(chunk=16))
    (row,) = pack(groups, 256, 8, range(3))
    batch = jax.tree.map(lambda x: x[0], host_batch(groups, [row], 256, 8))
    params = init_params(model, host_batch(groups, [row], 256, 8))
    before = model.apply({"params": params}, reward_inputs(batch))
    for response in range(6):
        end = batch.ends[0, response]
        segment, branch = batch.segments[0, end], batch.branches[0, end]
        own = (batch.segments[0] == segment) & np.isin(batch.branches[0], (0, branch))
        changed = batch._replace(tokens=np.where(own, batch.tokens, (batch.tokens + 7) % TINY.vocab_size))
        after = model.apply({"params": params}, reward_inputs(changed))
        np.testing.assert_array_equal(before[0, response], after[0, response])
        assert np.abs(before - after).max() > 1e-3  # the change is seen by the others


def one_update(mesh_sizes, micro_batches, devices=8):
    """Loss and parameters after two updates on a mesh (data, fsdp, tensor, context)."""
    mesh = make_mesh(MeshConfig(*mesh_sizes), jax.devices()[:devices])
    groups = tuple(random_groups([4, 1, 2, 3] * 20, seed=3))
    rows = pack(groups, 64, 8, range(len(groups)))[:32]
    model = RewardModel(TINY, 3, compute=Compute(chunk=32))
    optimizer = make_optimizer(OptimizerConfig(clip_norm=0.5))
    abstract = abstract_state(model, (dummy_inputs(),), optimizer, mesh)
    schedule = make_schedule(OptimizerConfig(learning_rate=1e-2, schedule="constant", warmup_steps=1), 10)
    shardings = shardings_of(abstract)
    feed = make_feeder(groups, 64, 8, micro_batches, mesh)
    step = jax.jit(
        make_train_step(make_loss(model, WEIGHTS, "ratings"), optimizer, schedule),
        in_shardings=(shardings, feed.shardings), out_shardings=(shardings, None), donate_argnums=0,
    )  # fmt: skip
    with jax.set_mesh(mesh):
        state = random_state(model, optimizer, abstract)
        batch = feed(rows)
        losses = []
        for _ in range(2):
            state, metrics = step(state, batch)
            losses.append(metrics["loss"])
    return np.array(losses), jax.device_get(state.params), state


@pytest.fixture(scope="module")
def single():
    return one_update((1, 1, 1, 1), 1, devices=1)


@pytest.mark.parametrize("mesh", [(8, 1, 1, 1), (4, 2, 1, 1), (2, 2, 2, 1), (1, 8, 1, 1), (2, 1, 2, 2)], ids=str)
@pytest.mark.parametrize("micro_batches", [1, 2, 4])
def test_eight_devices_equal_one(single, mesh, micro_batches):
    losses, params, state = one_update(mesh, micro_batches)
    np.testing.assert_allclose(losses, single[0], rtol=1e-5)
    assert_trees_close(params, single[1], rtol=1e-5)
    assert losses[1] < losses[0]
    kernel = state.params["llama"]["layers"]["mlp"]["up"]["kernel"]
    shard = kernel.addressable_shards[0].data.shape
    assert np.prod(shard) * mesh[1] * mesh[2] == kernel.size  # fsdp and tensor cut it, nothing else does


@pytest.mark.short
@pytest.mark.parametrize("micro_batches", [2, 4, 8])
def test_micro_batches_equal_one(single, micro_batches):
    losses, params, _ = one_update((1, 1, 1, 1), micro_batches, devices=1)
    np.testing.assert_allclose(losses, single[0], rtol=1e-5)
    assert_trees_close(params, single[1], rtol=1e-5)


def test_frozen_parameters_stay_and_cost_no_optimizer_state():
    """What is trained moves exactly as if the rest were constants."""
    groups, model = random_groups([2, 2]), RewardModel(TINY, 3)
    config, mesh = OptimizerConfig(clip_norm=0.0), make_mesh(MeshConfig(), jax.devices()[:1])
    optimizer, loss = make_optimizer(config), make_loss(model, WEIGHTS, "ratings")
    batch = host_batch(groups, pack(groups, 128, 8, range(2)), 128, 8)

    def update(frozen):
        abstract = abstract_state(model, (dummy_inputs(),), optimizer, mesh, frozen)
        state = random_state(model, optimizer, abstract, frozen)
        assert jax.tree.structure(state) == jax.tree.structure(abstract)
        return state, jax.jit(make_train_step(loss, optimizer, lambda step: 1e-2, frozen))(state, batch)[0]

    _, free = update(())
    before, after = update(("embedding", "mlp/(up|gate)"))
    for name in ("embedding", "layers/mlp/up/kernel", "layers/mlp/gate/kernel"):
        trees = [state.params["llama"] for state in (before, after)]
        np.testing.assert_array_equal(*(leaf_at(tree, name) for tree in trees))
    for name in ("layers/mlp/down/kernel", "layers/attention/q/kernel", "final_norm/scale"):
        np.testing.assert_allclose(leaf_at(after.params["llama"], name), leaf_at(free.params["llama"], name), rtol=1e-6)
    frozen_size = sum(leaf_at(after.params["llama"], n).size for n in ("embedding", "layers/mlp/up/kernel")) + 4096
    sizes = [sum(leaf.size for leaf in jax.tree.leaves(state.optimizer)) for state in (free, after)]
    assert sizes[0] - sizes[1] == 2 * frozen_size
    with pytest.raises(ConfigError, match=r"no parameter matches 'embeding'; cure: one of llama/embedding"):
        abstract_state(model, (dummy_inputs(),), optimizer, mesh, ("embeding",))


def test_the_first_moment_in_bfloat16():
    """Half its size, and the first step is nearly the same; gradients and parameters stay float32."""
    groups, model = random_groups([2, 2]), RewardModel(TINY, 3)
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    batch = host_batch(groups, pack(groups, 128, 8, range(2)), 128, 8)
    after = {}
    for dtype in ("float32", "bfloat16"):
        optimizer = make_optimizer(OptimizerConfig(first_moment_dtype=dtype))
        abstract = abstract_state(model, (dummy_inputs(),), optimizer, mesh)
        state = random_state(model, optimizer, abstract)
        step = jax.jit(make_train_step(make_loss(model, WEIGHTS, "ratings"), optimizer, lambda step: 1e-2))
        after[dtype] = step(state, batch)[0]
    sizes = {d: [x.dtype.name for x in jax.tree.leaves(s.optimizer)] for d, s in after.items()}
    assert sizes["bfloat16"].count("bfloat16") == len(jax.tree.leaves(after["float32"].params))
    assert "bfloat16" not in sizes["float32"]
    assert all(x.dtype == np.float32 for x in jax.tree.leaves(after["bfloat16"].params))
    assert_trees_close(after["bfloat16"].params, after["float32"].params, rtol=1e-2)


def leaf_at(tree, name: str):
    for key in name.split("/"):
        tree = tree[key]
    return tree


@pytest.mark.short
def test_a_step_that_is_not_finite_changes_nothing_but_its_counters():
    groups = random_groups([2, 2])
    model = RewardModel(TINY, 3)
    optimizer = make_optimizer(OptimizerConfig())
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    step = jax.jit(make_train_step(make_loss(model, WEIGHTS, "ratings"), optimizer, lambda step: 1e-2))
    state = random_state(model, optimizer, abstract_state(model, (dummy_inputs(),), optimizer, mesh))
    good = host_batch(groups, pack(groups, 128, 8, range(2)), 128, 8)
    bad = good._replace(ratings=np.where(good.mask, np.inf, 0).astype(np.float32))

    after, metrics = step(state, bad)
    assert not np.isfinite(metrics["grad_norm"])
    jax.tree.map(np.testing.assert_array_equal, after.params, state.params)
    jax.tree.map(np.testing.assert_array_equal, after.optimizer, state.optimizer)
    assert (after.step, after.bad_steps, after.bad_in_row) == (1, 1, 1)
    after, _ = step(after, bad)
    assert (after.step, after.bad_steps, after.bad_in_row) == (2, 2, 2)
    after, metrics = step(after, good)
    assert (after.step, after.bad_steps, after.bad_in_row) == (3, 2, 0)
    assert np.isfinite(metrics["loss"])
    assert jnp.abs(after.params["reward_head"] - state.params["reward_head"]).max() > 1e-3
