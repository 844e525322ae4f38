"""The tests, one folder for each package."""

import os
from pathlib import Path

import pytest

# Data and tools beside the repository; what needs them is skipped where they are not.
SHARED = Path(os.environ.get("STEERJAX_SHARED", Path(__file__).parents[2] / "shared"))
WITHOUT_SHARED = "needs STEERJAX_SHARED"


def needs_shared(path: str) -> Path:
    """A file or folder of SHARED; without it the test is skipped, and the last line of the run counts it."""
    return SHARED / path if (SHARED / path).exists() else pytest.skip(WITHOUT_SHARED)
