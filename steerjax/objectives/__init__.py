"""What a model learns, one file an objective. A new one is a file like `regression.py` and a line in `OBJECTIVES`."""

import importlib
from collections.abc import Mapping
from typing import Any

from steerjax.errors import ConfigError
from steerjax.objectives.objective import Evaluation, Objective, ObjectiveConfig, Setting
from steerjax.schema import Schema

__all__ = ["OBJECTIVES", "Evaluation", "Objective", "ObjectiveConfig", "Setting", "find_objective", "predicted_schema"]

OBJECTIVES: dict[str, str] = {  # name, also of its config group -> module:class
    "attribute_lm": "steerjax.objectives.attribute_lm:AttributeLM",
    "bradley_terry": "steerjax.objectives.bradley_terry:BradleyTerry",
    "regression": "steerjax.objectives.regression:Regression",
    "sft": "steerjax.objectives.sft:SFT",
    "steerlm2": "steerjax.objectives.steerlm2:SteerLM2",
}


def predicted_schema(objectives: Mapping[str, Any], schema: Schema) -> Schema:
    """What a model with these objectives (name -> config) predicts: of the data's attributes, then of their own."""
    wanted = {a: None for name, config in objectives.items() for a in find_objective(name).predicts(config, schema)}
    return Schema(
        tuple(a for a in schema.attributes if a in wanted) + tuple(a for a in wanted if a not in schema.attributes)
    )


def find_objective(name: str) -> type[Objective]:
    """The class of an objective. Raises ConfigError: there is none of that name."""
    if name not in OBJECTIVES:
        raise ConfigError(f"config.objectives: there is no {name!r:.80}; cure: one of {', '.join(OBJECTIVES)}")
    module, cls = OBJECTIVES[name].split(":")
    return getattr(importlib.import_module(module), cls)
