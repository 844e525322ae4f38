"""Training on kept states of frozen layers equals training with those layers in the model."""

import numpy as np
import pytest

from steerjax.bundle import open_bundle
from steerjax.config import default_config, resolve
from steerjax.report.records import read_metrics
from steerjax.training.train import train
from tests.helpers import assert_trees_close


def experiment(*, cached: bool, frozen_layers: int = 2, steps: int = 3):
    config = default_config()
    config.model.update(hidden_size=32, intermediate_size=64, num_layers=3, num_heads=2, num_kv_heads=1)
    config.batch.update(rows=8, row_length=2304)
    config.compute.cache_frozen = cached
    config.optimizer.update(frozen_layers=frozen_layers, schedule="constant", warmup_steps=0)
    config.train.update(steps=steps, plots=False, checkpoint_every=2)
    return resolve(config.to_dict())


def losses(workdir, step=None):
    return [r["loss"] for r in read_metrics(workdir / "metrics.jsonl") if step in (None, r["step"])]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("whole")
    return workdir, train(experiment(cached=False), workdir)["regression"]


@pytest.mark.slow
@pytest.mark.parametrize("frozen_layers", [2, 3])
def test_cached_equals_whole(whole, tmp_path, frozen_layers):
    """Losses, predictions and checkpoints; also where the head alone is trained."""
    workdir, expected = whole
    if frozen_layers == 3:
        workdir = tmp_path / "whole"
        expected = train(experiment(cached=False, frozen_layers=3), workdir)["regression"]
    cached = tmp_path / "cached"
    found = train(experiment(cached=True, frozen_layers=frozen_layers), cached)["regression"]
    np.testing.assert_allclose(losses(cached), losses(workdir), rtol=1e-5)
    np.testing.assert_allclose(found.detail.predicted, expected.detail.predicted, rtol=1e-4, atol=1e-4)
    params = [open_bundle(folder).params for folder in (cached, workdir)]
    assert_trees_close(*params, rtol=1e-4)
    assert params[0]["llama"]["layers"]["mlp"]["up"]["kernel"].shape[0] == 3  # one stack, whatever is frozen


@pytest.mark.slow
def test_a_cached_run_goes_on_and_may_drop_the_cache(whole, tmp_path, capsys):
    train(experiment(cached=True, steps=2), tmp_path)
    said = capsys.readouterr().out
    phases = ["reading and packing", "making parameters", "frozen layers 1/", "compiling", "step 1/2"]
    places = [said.index(phase) for phase in phases]
    assert places == sorted(places)
    train(experiment(cached=False), tmp_path)
    np.testing.assert_allclose(losses(tmp_path, 3), losses(whole[0], 3), rtol=1e-5)
