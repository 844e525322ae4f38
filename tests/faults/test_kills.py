"""Real processes that are killed or asked to stop at random moments, saves and plots included, end in the same bits."""

import random
import shutil
import signal

import pytest

from tests.faults.tiny_runs import ENDED, TinyRuns, differences

KILL, TERM, INT = signal.SIGKILL, signal.SIGTERM, signal.SIGINT


@pytest.fixture(scope="module")
def runs(tmp_path_factory, repository):
    found = TinyRuns(tmp_path_factory.mktemp("kills"), repository)
    yield found
    found.close()


@pytest.mark.parametrize(
    ("number", "seed", "wanted"),
    [
        pytest.param(KILL, 0, 1, marks=pytest.mark.faults),
        *(pytest.param(KILL, seed, 10, marks=pytest.mark.faults) for seed in range(1, 11)),
        *(pytest.param(number, seed, 5, marks=pytest.mark.faults) for number in (TERM, INT) for seed in range(1, 7)),
    ],
)
def test_a_run_goes_on_to_the_same_bits(runs, tried, number, seed, wanted):
    """`wanted` signals that found the process alive; up to three a run, then it may end."""
    draw, landed = random.Random(f"{number}/{seed}"), 0
    while landed < wanted:
        workdir, of_this = runs.folder / f"{number.name}-{seed}", 0
        shutil.rmtree(workdir, ignore_errors=True)
        for _ in range(20):
            again = of_this < 3 and landed < wanted
            status, said = runs.run(workdir, *((number, draw.uniform(0, runs.seconds)) if again else ()))
            assert status in (ENDED if again else (0,)), said
            assert "Traceback" not in said, said
            of_this += again and status != 0
            landed += again and status != 0
            if status == 0:
                break
        found = differences(workdir, runs.whole, unevaluated=number != KILL)
        tried("run killed" if number == KILL else "run stopped", number.name, of_this, of_this * bool(found))
        assert not found
