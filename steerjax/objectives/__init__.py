"""What a model learns, one file an objective. A new one is a file like `regression.py` and a line in `OBJECTIVES`."""

import importlib

from steerjax.errors import ConfigError
from steerjax.objectives.objective import Evaluation, Objective, Setting

__all__ = ["OBJECTIVES", "Evaluation", "Objective", "Setting", "find_objective"]

OBJECTIVES: dict[str, str] = {  # name, also of its config group -> module:class
    "regression": "steerjax.objectives.regression:Regression",
    "sft": "steerjax.objectives.sft:SFT",
}


def find_objective(name: str) -> type[Objective]:
    """The class of an objective. Raises ConfigError: there is none of that name."""
    if name not in OBJECTIVES:
        raise ConfigError(f"config.objectives: there is no '{name}'; cure: one of {', '.join(OBJECTIVES)}")
    module, cls = OBJECTIVES[name].split(":")
    return getattr(importlib.import_module(module), cls)
