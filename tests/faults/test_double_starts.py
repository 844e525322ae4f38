"""Two starts in one folder at once: one trains, the other is refused or goes on after it; the bits are one run's."""

import random
import shutil
import time

import pytest

from tests.faults.tiny_runs import TinyRuns, differences


@pytest.fixture(scope="module")
def runs(tmp_path_factory, repository):
    found = TinyRuns(tmp_path_factory.mktemp("starts"), repository)
    yield found
    found.close()


@pytest.mark.faults
@pytest.mark.parametrize("seed", range(8))
def test_double_starts(runs, tried, seed):
    draw = random.Random(seed)
    for _ in range(5):
        workdir = runs.folder / f"double-{seed}"
        shutil.rmtree(workdir, ignore_errors=True)
        logs = [runs.folder / f"double-{seed}-{number}.log" for number in (1, 2)]
        for log in logs:
            log.unlink(missing_ok=True)
        first = runs.start(workdir, logs[0])
        time.sleep(draw.choice((0, 0, draw.uniform(0, runs.seconds))))
        second = runs.start(workdir, logs[1])
        statuses = [runs.wait(first), runs.wait(second)]
        said = [log.read_text() for log in logs]
        assert 0 in statuses, said
        for status, text in zip(statuses, said, strict=True):
            assert status in (0, 2), text
            assert status == 0 or "cure: " in text, text
            assert "Traceback" not in text, text
        found = differences(workdir, runs.whole)
        tried("double start", "train", 1, bool(found))
        assert not found
