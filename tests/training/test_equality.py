"""Trees equal one row an example; micro-batches, meshes and objectives that are added up change nothing."""

import jax
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from steerjax.bundle.build import abstract_parameters, random_parameters
from steerjax.data.batch import Feeder
from steerjax.data.packing import pack, unshared_rows
from steerjax.data.trees import Example, grow
from steerjax.errors import ConfigError
from steerjax.models.llama import CausalLM, Compute, RewardModel
from steerjax.objectives import Setting
from steerjax.objectives.objective import TRAIN
from steerjax.objectives.regression import Regression, RegressionConfig
from steerjax.parallel.mesh import MeshConfig, make_mesh
from steerjax.parallel.rules import shardings_of
from steerjax.training.config import OptimizerConfig
from steerjax.training.input import make_feeder
from steerjax.training.optimizer import make_optimizer, partition
from steerjax.training.schedules import make_schedule
from steerjax.training.state import abstract_state, make_state
from steerjax.training.step import make_train_step
from tests.helpers import (
    SCHEMA,
    TINY,
    assert_trees_close,
    host_batch,
    init_params,
    loss_and_gradients,
    outputs_at_ends,
    random_ratings,
    rated_examples,
    regression,
    sft,
    slow_but,
)
from tests.refusals import refused


def assert_equal_to_one_row_an_example(module, objectives, trees, row_length, longest):
    """Loss, metrics and every gradient; and of rewards every prediction."""
    params = init_params(module)
    packed, alone = pack(trees, row_length), unshared_rows(trees)
    results = [
        loss_and_gradients(module, objectives, host_batch(objectives, trees, rows, length), params)
        for rows, length in ((packed, row_length), (alone, longest))
    ]
    ((loss, sums), gradients), ((expected, expected_sums), expected_gradients) = results
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    for name, pair in sums.items():
        np.testing.assert_allclose(pair, expected_sums[name], rtol=1e-5, atol=1e-6, err_msg=name)
    assert_trees_close(gradients, expected_gradients, rtol=1e-5)
    for objective in objectives:
        if objective.kind == "reward":
            ours = outputs_at_ends(module, objective, trees, packed, row_length, params)
            theirs = outputs_at_ends(module, objective, trees, alone, longest, params)
            assert ours.keys() == theirs.keys()
            assert_trees_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("responses", slow_but(4, [1, 2, 4]))
@pytest.mark.parametrize("readout", ["last", "mean"])
@pytest.mark.parametrize("average", slow_but("ratings", ["ratings", "examples"]))
def test_rewards_in_trees_equal_one_row_a_response(responses, readout, average):
    objective = regression(average)
    trees = grow(rated_examples(objective, [responses] * 6, seed=responses))
    assert len(trees) == 6
    assert len(pack(trees, 96)) < 6 * responses
    module = RewardModel(TINY, 3, readout=readout, compute=Compute(chunk=16))
    assert_equal_to_one_row_an_example(module, [objective], trees, 96, 64)


def random_trees(objective, seed: int, count: int, depth: int) -> list[Example]:
    """Examples that go on from places inside earlier ones, from a vocabulary of three, so that much is shared."""
    random = np.random.default_rng(seed)
    texts: list[tuple[np.ndarray, int]] = []
    examples = []
    for _ in range(count):
        earlier = [text for text in texts if text[1] < depth]
        if earlier and random.random() < 0.8:
            base, level = earlier[random.integers(len(earlier))]
            tokens = np.concatenate(
                [base[: random.integers(2, len(base) + 1)], random.integers(1, 4, random.integers(1, 6))]
            )
            level += 1
        else:
            tokens, level = random.integers(1, 4, random.integers(3, 9)), 1
        tokens = tokens.astype(np.int32)
        texts.append((tokens, level))
        if isinstance(objective, Regression):
            examples.append(objective.example(TRAIN, tokens, 2, random_ratings(random)))
        else:
            trained = random.random(len(tokens)) < 0.5
            trained[0], trained[-1] = False, True
            examples.append(objective.example(TRAIN, tokens, 2, trained))
    if isinstance(objective, Regression):
        objective.data["validation"] = objective.data[TRAIN]
        objective.check_data()
    return examples


@pytest.mark.slow
@settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(seed=st.integers(0, 10**6), depth=st.integers(1, 6), attention=st.sampled_from(["chunked", "blockwise"]),
       kind=st.sampled_from(["reward", "chat"]))  # fmt: skip
def test_random_trees_equal_one_row_an_example(seed, depth, attention, kind):
    """Targets that differ at a branching and after equal texts included."""
    compute = Compute(chunk=32, attention=attention)
    objective = regression() if kind == "reward" else sft()
    module = RewardModel(TINY, 3, compute=compute) if kind == "reward" else CausalLM(TINY, compute)
    trees = grow(random_trees(objective, seed, 24, depth))
    assert_equal_to_one_row_an_example(module, [objective], trees, 64, 64)


def test_padding_and_other_branches_are_never_seen():
    """Changing every token that an example does not see changes no prediction of it."""
    objective = regression()
    trees = grow(rated_examples(objective, [2, 2, 2], seed=5))
    module = RewardModel(TINY, 3, compute=Compute(chunk=16))
    params = {"params": init_params(module)}
    (row,) = pack(trees, 256)
    batch = jax.tree.map(lambda x: x[0], host_batch([objective], trees, [row], 256))
    run = jax.jit(module.apply)
    before = run(params, batch.tokens, batch.positions, batch.until)
    places = np.arange(256)
    ends = np.flatnonzero(batch.targets["regression"]["counts"][0].any(-1))
    assert len(ends) == 6
    for end in ends:
        own = (places <= end) & (end < batch.until[0])
        changed = np.where(own, batch.tokens, (batch.tokens + 7) % TINY.vocab_size)
        after = run(params, changed, batch.positions, batch.until)
        np.testing.assert_array_equal(before[0, end], after[0, end])
        assert np.abs(before - after).max() > 1e-3  # the change is seen by the others


def updated(objectives, module, trees, rows, mesh, micro_batches, *, config=None, updates=2):
    """Losses and the state after some updates, on a mesh."""
    # Adam makes a whole step of a gradient that is all rounding; a larger epsilon keeps such steps small.
    config = config or OptimizerConfig(clip_norm=0.5, epsilon=1e-4)
    optimizer = make_optimizer(config)
    whole = abstract_parameters(module, mesh)
    abstract = abstract_state(whole, optimizer, config, mesh)
    schedule = make_schedule(OptimizerConfig(learning_rate=1e-2, schedule="constant", warmup_steps=1), 10)
    feed: Feeder = make_feeder(trees, objectives, 64, mesh, micro_batches)
    shardings = shardings_of(abstract)
    step = jax.jit(
        make_train_step(module, objectives, optimizer, schedule, config.frozen_layers),
        in_shardings=(shardings, feed.shardings), out_shardings=(shardings, None), donate_argnums=0,
    )  # fmt: skip
    with jax.set_mesh(mesh):
        state = make_state(random_parameters(module, whole, 0), abstract, optimizer, config)
        batch, losses = feed(rows), []
        for _ in range(updates):
            state, metrics = step(state, batch)
            losses.append(metrics["loss"])
        return np.array(losses), state


def one_update(mesh_sizes, micro_batches, devices=8):
    """Loss and parameters after two updates on a mesh (data, fsdp, tensor, context)."""
    mesh = make_mesh(MeshConfig(*mesh_sizes), jax.devices()[:devices])
    objective = regression()
    trees = grow(rated_examples(objective, [4, 1, 2, 3] * 20, seed=3))
    rows = pack(trees, 64)[:32]
    losses, state = updated(
        [objective], RewardModel(TINY, 3, compute=Compute(chunk=32)), trees, rows, mesh, micro_batches
    )
    return losses, jax.device_get(state.params), state


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


class Second(Regression):
    """The same over other data, so that two objectives have other counts."""

    name = "second"


@pytest.mark.short
@pytest.mark.parametrize("micro_batches", slow_but(1, [1, 4]))
def test_two_objectives_give_the_weighted_sum_of_both(micro_batches):
    first = regression()
    second = Second(RegressionConfig(weight=0.25, average="examples"), Setting(SCHEMA, None))
    examples = rated_examples(first, [3, 2, 1, 2], seed=1) + rated_examples(second, [1, 4, 1], seed=2)
    trees = grow(examples)
    rows = pack(trees, 64)
    rows += [()] * (-len(rows) % 4)
    module = RewardModel(TINY, 3, compute=Compute(chunk=32))
    params = init_params(module)
    losses, gradients = [], []
    for objectives in ([first, second], [first], [second]):
        batch = host_batch(objectives, trees, rows, 64)
        (loss, _), gradient = loss_and_gradients(module, objectives, batch, params)
        losses.append(loss)
        gradients.append(gradient)
    np.testing.assert_allclose(losses[0], losses[1] + losses[2], rtol=1e-6)  # `loss` has the weight
    assert_trees_close(gradients[0], jax.tree.map(lambda a, b: a + b, *gradients[1:]), rtol=1e-5)
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    stepped, _ = updated([first, second], module, trees, rows, mesh, micro_batches, updates=1)
    with jax.set_mesh(mesh):
        fresh = random_parameters(module, abstract_parameters(module, mesh), 0)
    batch = host_batch([first, second], trees, rows, 64)
    np.testing.assert_allclose(stepped[0], loss_and_gradients(module, [first, second], batch, fresh)[0][0], rtol=1e-5)


def rows_and_step(config: OptimizerConfig):
    objective, module = regression(), RewardModel(TINY, 3)
    trees = grow(rated_examples(objective, [2, 2]))
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    whole, optimizer = abstract_parameters(module, mesh), make_optimizer(config)
    abstract = abstract_state(whole, optimizer, config, mesh)
    state = make_state(random_parameters(module, whole, 0), abstract, optimizer, config)
    step = jax.jit(make_train_step(module, [objective], optimizer, lambda step: 1e-2, config.frozen_layers))
    return state, step, host_batch([objective], trees, pack(trees, 128), 128)


def leaf_at(tree, name: str):
    for key in name.split("/"):
        tree = tree[key]
    return tree


def test_frozen_parameters_stay_and_cost_no_optimizer_state():
    """What is trained moves exactly as if the rest were constants."""
    free, step, batch = rows_and_step(OptimizerConfig(clip_norm=0.0))
    moved = step(free, batch)[0]
    before, step, batch = rows_and_step(OptimizerConfig(clip_norm=0.0, frozen=("embedding", "mlp/(up|gate)")))
    after = step(before, batch)[0]
    for name in ("embedding", "layers/mlp/up/kernel", "layers/mlp/gate/kernel"):
        np.testing.assert_array_equal(*(leaf_at(state.whole()["llama"], name) for state in (before, after)))
        assert leaf_at(after.params["llama"], name) is None
    for name in ("layers/mlp/down/kernel", "layers/attention/q/kernel", "final_norm/scale"):
        np.testing.assert_allclose(
            leaf_at(after.params["llama"], name), leaf_at(moved.params["llama"], name), rtol=1e-6
        )
    sizes = [sum(leaf.size for leaf in jax.tree.leaves(state.optimizer)) for state in (free, after)]
    assert sizes[0] - sizes[1] == 2 * sum(leaf.size for leaf in jax.tree.leaves(after.frozen))
    with refused(ConfigError, "embeding", cure="llama/embedding"):
        partition(free.params, OptimizerConfig(frozen=("embeding",)))


def test_frozen_layers_are_cut_from_one_stack():
    """The first layer and the embedding stay; the second moves as it does when all the others are constants."""
    config = OptimizerConfig(clip_norm=0.0, frozen_layers=1)
    before, step, batch = rows_and_step(config)
    after = step(before, batch)[0]
    whole = [state.whole()["llama"] for state in (before, after)]
    up = [leaf_at(tree, "layers/mlp/up/kernel") for tree in whole]
    assert up[0].shape[0] == TINY.num_layers
    np.testing.assert_array_equal(up[0][0], up[1][0])
    np.testing.assert_array_equal(whole[0]["embedding"], whole[1]["embedding"])
    free, free_step, _ = rows_and_step(OptimizerConfig(clip_norm=0.0))
    # Gradients, not parameters: AdamW's first step turns rounding of a small gradient into a whole step.
    moments = [leaf_at(s.optimizer[1].mu["llama"], "layers/mlp/up/kernel") for s in (after, free_step(free, batch)[0])]
    assert moments[0].shape[0] == 1
    assert_trees_close(moments[0][0], moments[1][1], rtol=1e-6)


@pytest.mark.parametrize("frozen_layers", [0, 1])
def test_the_parameters_are_held_once(frozen_layers):
    """What the state was made of is a part of it or is freed; what is saved is no copy but of a stack that is cut."""
    config = OptimizerConfig(frozen_layers=frozen_layers)
    mesh, module = make_mesh(MeshConfig(), jax.devices()[:1]), RewardModel(TINY, len(SCHEMA))
    whole, optimizer = abstract_parameters(module, mesh), make_optimizer(config)
    params = random_parameters(module, whole, 0)
    state = make_state(params, abstract_state(whole, optimizer, config, mesh), optimizer, config)
    kept = {id(x) for x in jax.tree.leaves((state.params, state.frozen))}
    assert all(id(x) in kept or x.is_deleted() for x in jax.tree.leaves(params))
    saved = jax.tree_util.tree_leaves_with_path(state.whole())
    assert all(id(x) in kept or (frozen_layers and "layers" in jax.tree_util.keystr(path)) for path, x in saved)


@pytest.mark.slow
def test_the_first_moment_in_bfloat16():
    """Half its size, and the first step is nearly the same; gradients and parameters stay float32."""
    after = {}
    for dtype in ("float32", "bfloat16"):
        state, step, batch = rows_and_step(OptimizerConfig(first_moment_dtype=dtype))
        after[dtype] = step(state, batch)[0]
    sizes = {d: [x.dtype.name for x in jax.tree.leaves(s.optimizer)] for d, s in after.items()}
    assert sizes["bfloat16"].count("bfloat16") == len(jax.tree.leaves(after["float32"].params))
    assert "bfloat16" not in sizes["float32"]
    assert all(x.dtype == np.float32 for x in jax.tree.leaves(after["bfloat16"].params))
    assert_trees_close(after["bfloat16"].params, after["float32"].params, rtol=1e-2)


@pytest.mark.short
def test_a_step_that_is_not_finite_changes_nothing_but_its_counters():
    state, step, good = rows_and_step(OptimizerConfig())
    arrays = good.targets["regression"]
    infinite = np.where(arrays["counts"] > 0, np.inf, 0).astype(np.float32)
    bad = good._replace(targets={"regression": arrays | {"ratings": infinite}})
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
    assert np.abs(after.params["reward_head"] - state.params["reward_head"]).max() > 1e-3
