"""The tests, one folder for each package."""

import os
from pathlib import Path

# Data and tools beside the repository; what needs them is skipped where they are not.
SHARED = Path(os.environ.get("STEERJAX_SHARED", Path(__file__).parents[2] / "shared"))
