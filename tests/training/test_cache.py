"""Training on cached states of frozen layers equals training with those layers in the model."""

import dataclasses

import jax
import numpy as np
import pytest

from steerjax.bundle.store import CheckpointStore
from steerjax.config import default_config, resolve
from steerjax.training import loop
from steerjax.training.metrics import read_metrics
from steerjax.training.state import training_part
from tests.helpers import assert_trees_close


def experiment(*, cached: bool, frozen_layers: int = 2, steps: int = 3):
    config = default_config()
    config.data.on_duplicate = "keep"
    config.model.update(hidden_size=32, intermediate_size=64, num_layers=3, num_heads=2, num_kv_heads=1)
    config.batch.update(rows=8, row_length=2304)
    config.compute.cache_frozen = cached
    config.optimizer.update(frozen_layers=frozen_layers, schedule="constant", warmup_steps=0)
    config.train.update(steps=steps, plots=False, checkpoint_every=2)
    return resolve(config.to_dict())


def last_checkpoint(workdir, e):
    schema = loop.SCHEMAS["helpsteer"]
    e, _ = loop.with_source(e)
    renderer = loop.make_renderer(e, schema)
    e = loop._with_vocabulary(e, renderer.tokenizer)
    mesh = loop.make_mesh(e.mesh)
    run = loop.Run(e, loop.RewardTask(e, schema, renderer, mesh), mesh)
    with CheckpointStore(workdir / "checkpoints", 2) as store:
        return jax.device_get(store.restore(store.latest_step(), run.whole, training_part(run.abstract))[0])


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("whole")
    evaluation = loop.train(experiment(cached=False), workdir)
    return workdir, evaluation, last_checkpoint(workdir, experiment(cached=False))


@pytest.mark.parametrize("frozen_layers", [2, 3])
def test_cached_equals_whole(whole, tmp_path, frozen_layers):
    """Losses, predictions and checkpoints; also the run that stops, resumes and drops the cache on the way."""
    if frozen_layers == 3:  # the head alone
        whole_dir = tmp_path / "whole"
        whole = whole_dir, loop.train(experiment(cached=False, frozen_layers=3), whole_dir), None
    workdir = tmp_path / "cached"
    evaluation = loop.train(experiment(cached=True, frozen_layers=frozen_layers), workdir)
    losses = [[r["loss"] for r in read_metrics(d / "metrics.jsonl")] for d in (whole[0], workdir)]
    np.testing.assert_allclose(*losses, rtol=1e-5)
    np.testing.assert_allclose(evaluation.detail.predicted, whole[1].detail.predicted, rtol=1e-4, atol=1e-4)
    if whole[2] is not None:
        params = last_checkpoint(workdir, experiment(cached=True))
        assert_trees_close(params, whole[2], rtol=1e-4)
        assert params["llama"]["frozen_layers"]["mlp"]["up"]["kernel"].shape[0] == 2


def test_a_cached_run_goes_on(whole, tmp_path):
    loop.train(experiment(cached=True, steps=2), tmp_path)
    loop.train(experiment(cached=True), tmp_path)
    losses = [[r["loss"] for r in read_metrics(d / "metrics.jsonl") if r["step"] == 3] for d in (whole[0], tmp_path)]
    np.testing.assert_allclose(*losses, rtol=1e-5)


def test_frozen_layers_are_not_trained(whole):
    e = experiment(cached=False)
    first = dataclasses.replace(e, train=dataclasses.replace(e.train, steps=1))
    schema, mesh = loop.SCHEMAS["helpsteer"], loop.make_mesh(e.mesh)
    first, _ = loop.with_source(first)
    renderer = loop.make_renderer(first, schema)
    first = loop._with_vocabulary(first, renderer.tokenizer)
    task = loop.RewardTask(first, schema, renderer, mesh)
    with jax.set_mesh(mesh):
        run = loop.Run(first, task, mesh)
        params, _ = loop.initial_parameters(None, task, run.whole, first.train.seed)
    start, end = jax.device_get(params)["llama"], whole[2]["llama"]
    jax.tree.map(np.testing.assert_array_equal, start["frozen_layers"], end["frozen_layers"])
    np.testing.assert_array_equal(start["embedding"], end["embedding"])
    assert np.abs(start["layers"]["mlp"]["up"]["kernel"] - end["layers"]["mlp"]["up"]["kernel"]).max() > 0
    moments = sum(x.size for x in jax.tree.leaves(run.abstract.optimizer))
    trained = [params["llama"]["layers"], params["llama"]["final_norm"], params["reward_head"]]
    assert moments == 2 * sum(x.size for x in jax.tree.leaves(trained)) + 1  # and Adam's count
