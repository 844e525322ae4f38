"""What was tried is counted: by door (what is attacked) and kind (how), over all processes of pytest, as a table."""

import os
from collections import Counter
from pathlib import Path

import pytest

from tests.faults.table import RESULTS, merge, text

_TRIED: Counter[tuple[str, str]] = Counter()
_FAILED: Counter[tuple[str, str]] = Counter()


@pytest.fixture(scope="session")
def tried():
    """`tried(door, kind, count=1, failed=0)` adds to the table."""

    def add(door: str, kind: str, count: int = 1, failed: int = 0) -> None:
        _TRIED[door, kind] += count
        _FAILED[door, kind] += failed

    return add


def pytest_sessionfinish(session):
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["faults"] = [[*key, _TRIED[key], _FAILED[key]] for key in _TRIED]


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node):
    """xdist: a worker has ended."""
    for door, kind, count, failed in getattr(node, "workeroutput", {}).get("faults", ()):
        _TRIED[door, kind] += count
        _FAILED[door, kind] += failed


def pytest_terminal_summary(terminalreporter):
    if not _TRIED:
        return
    rows = [[*key, _TRIED[key], _FAILED[key]] for key in sorted(_TRIED)]
    terminalreporter.section("what was tried")
    terminalreporter.write_line(text(rows))
    if os.environ.get("STEERJAX_FAULTS"):  # a run whose counts docs/reliability.md is to give
        merge(Path(RESULTS), rows)
