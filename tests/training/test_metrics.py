"""What a run says of the time that is left."""

import pytest

from steerjax.training.metrics import Progress, duration

pytestmark = pytest.mark.short


@pytest.mark.parametrize(("seconds", "words"), [(0.4, "0 s"), (89, "89 s"), (600, "10 min"), (9000, "2.5 h")])
def test_durations(seconds, words):
    assert duration(seconds) == words


def test_lines_off_a_terminal_say_how_long_it_takes(monkeypatch, capsys):
    clock = iter(range(100))
    monkeypatch.setattr("time.monotonic", lambda: 60.0 * next(clock))
    progress = Progress(10, 20, active=True)  # resumed; a step a minute after the first, which compiles
    for step in range(11, 21):
        progress.step(step, "loss 1.0")
    progress.close()
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == ["step 11/20: loss 1.0", "step 12/20: loss 1.0, 8 min left"]
    assert lines[-1] == "step 20/20: loss 1.0"
    silent = Progress(0, 2, active=False)
    silent.step(1)
    assert capsys.readouterr().out == ""
