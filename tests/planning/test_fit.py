"""Fits or not, and the search for a change that makes it fit, with a compiler that is made up."""

from dataclasses import replace

import pytest

from steerjax.config import Experiment, default_config, resolve
from steerjax.planning import compile as compiling
from steerjax.planning.compile import RESERVE, Compiled, find_cure, plannable

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


@pytest.fixture
def search(monkeypatch):
    """All that is tried for four devices with so much memory."""
    monkeypatch.setattr(compiling, "compile_step", lambda e, devices: needs(e))
    return lambda hbm, e=EXPERIMENT, devices=4: list(find_cure(e, [None] * devices, hbm))


def test_the_reserve_counts():
    assert compiled(100 * (1 - RESERVE)).fits(100)
    assert not compiled(100 * (1 - RESERVE) + 1).fits(100)
    assert not compiled(1, runs=False).fits(100)


def test_what_fits_is_compiled_once(search):
    ((flags, tried, result),) = search(1000)
    assert result.fits(1000)
    assert flags == ()
    assert tried == plannable(EXPERIMENT, 4)


def test_the_cheapest_change_comes_first_and_changes_add_up(search):
    hbm = 50 / (1 - RESERVE)
    *before, (flags, tried, result) = search(hbm)
    assert result.fits(hbm)
    assert not any(result.fits(hbm) for _, _, result in before)
    assert [flags[-1] for flags, _, _ in before[1:]] == [
        "--config.mesh.fsdp=4", "--config.compute.remat=dots", "--config.compute.remat=full",
    ]  # fmt: skip
    assert flags == (
        "--config.mesh.data=1", "--config.mesh.fsdp=4", "--config.compute.remat=full", "--config.batch.micro_batches=2",
    )  # fmt: skip
    assert tried.batch.micro_batches == 2
    assert needs(tried).used <= 50


def test_it_gives_up_where_a_micro_batch_cannot_be_cut_further(search):
    _, tried, result = search(10)[-1]
    assert not result.fits(10)
    assert tried.batch.micro_batches == 4  # one row a device
    whole = replace(
        EXPERIMENT, mesh=replace(EXPERIMENT.mesh, data=1, fsdp=16), compute=replace(EXPERIMENT.compute, remat="full")
    )
    assert len(search(10, whole, 16)) == 1
