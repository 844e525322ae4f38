"""Fits or not, and the search for a change that makes it fit, with a compiler that is made up."""

from dataclasses import replace

import pytest

from steerjax.config import Experiment, default_config, resolve
from steerjax.planning.compile import Compiled
from steerjax.planning.fit import RESERVE, find_cure, fits

pytestmark = pytest.mark.short


def compiled(used: float, *, runs: bool = True) -> Compiled:
    return Compiled(1.0, 10, 1e12, "chunked", used, {"argument": used} if runs else {}, "")


def needs(e: Experiment) -> Compiled:
    """100 on one device of the mesh's fsdp axis; activations by remat and micro-batch."""
    activations = {"none": 80, "dots": 50, "full": 30}[e.compute.remat] / e.batch.micro_batches
    return compiled(100 / e.mesh.fsdp + activations)


def experiment() -> Experiment:
    config = default_config()
    config.mesh.update(data=2, fsdp=2)
    config.batch.update(rows=16, row_length=64)
    config.compute.remat = "none"
    return resolve(config.to_dict())


EXPERIMENT = experiment()


def search(hbm: float, e: Experiment = EXPERIMENT):
    return list(find_cure(e, needs, hbm))


def test_the_reserve_counts():
    assert fits(compiled(100 * (1 - RESERVE)), 100)
    assert not fits(compiled(100 * (1 - RESERVE) + 1), 100)
    assert not fits(compiled(1, runs=False), 100)


def test_what_fits_is_compiled_once():
    (attempt,) = search(1000)
    assert attempt.good
    assert attempt.flags == ()
    assert attempt.experiment == EXPERIMENT


def test_the_cheapest_change_comes_first_and_changes_add_up():
    *before, last = search(50 / (1 - RESERVE))
    assert last.good
    assert not any(attempt.good for attempt in before)
    assert [attempt.flags[-1] for attempt in before[1:]] == [
        "--config.mesh.fsdp=4", "--config.compute.remat=dots", "--config.compute.remat=full",
    ]  # fmt: skip
    assert last.flags == (
        "--config.mesh.data=1", "--config.mesh.fsdp=4", "--config.compute.remat=full", "--config.batch.micro_batches=2",
    )  # fmt: skip
    assert last.experiment.batch.micro_batches == 2
    assert needs(last.experiment).used <= 50


def test_it_gives_up_where_a_micro_batch_cannot_be_cut_further():
    attempts = search(10)
    assert not attempts[-1].good
    assert attempts[-1].experiment.batch.micro_batches == 4  # one row a device
    whole = replace(
        EXPERIMENT, mesh=replace(EXPERIMENT.mesh, data=1, fsdp=16), compute=replace(EXPERIMENT.compute, remat="full")
    )
    assert len(search(10, whole)) == 1
    assert len(list(find_cure(EXPERIMENT, needs, 10, search=False))) == 1
