"""Eight virtual CPU devices, one compile cache for all workers, and the checks that hide nothing."""

import os
import resource
import signal
from pathlib import Path

os.environ["JAX_PLATFORMS"] = os.environ.get("STEERJAX_TEST_PLATFORM", "cpu")
# Most of a test's time is compiling. With STEERJAX_SLOW=1 programs are compiled as users have them.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "0" if os.environ.get("STEERJAX_SLOW") else "1")

import jax
import pytest

from tests import SHARED, WITHOUT_SHARED

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_compilation_cache_dir", os.environ.get("JAX_COMPILATION_CACHE_DIR", "/tmp/steerjax-test-cache"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)

if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # pytest was started in the background of a script
    signal.signal(signal.SIGINT, signal.default_int_handler)

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module", autouse=True)
def _bounded_memory():
    """A worker that keeps every program it compiled holds 9 GiB in the end."""
    yield
    if resource.getrusage(resource.RUSAGE_SELF).ru_maxrss > 3 << 20:  # KiB
        jax.clear_caches()


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the checkout."""
    return REPOSITORY


def pytest_collection_modifyitems(items):
    if not os.environ.get("STEERJAX_SLOW"):
        for item in items:
            if {"slow", "faults"} & {mark.name for mark in item.iter_markers()}:
                item.add_marker(pytest.mark.skip(reason="only with STEERJAX_SLOW=1"))


@pytest.hookimpl(wrapper=True, tryfirst=True)  # so that it stands after the list of skipped tests
def pytest_terminal_summary(terminalreporter):
    result = yield
    skipped = terminalreporter.stats.get("skipped", [])
    left_out = sum(WITHOUT_SHARED in str(report.longrepr) for report in skipped)
    if left_out:
        found = "lacks what they read" if SHARED.is_dir() else "is not there"
        terminalreporter.write_line(f"{left_out} tests left out: {SHARED} {found}; STEERJAX_SHARED=FOLDER gives it")
    return result
