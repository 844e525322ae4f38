"""A recipe's ConfigDict -> a frozen experiment, checked before anything is compiled.

A recipe (`configs/*.py`) starts from `default_config()`, changes what it wants and returns the ConfigDict; `resolve`
turns it into an `Experiment`. Each package owns the values of its group (`GROUPS`), each objective its own. Inner code
takes these values as they are and checks nothing.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping

from steerjax.errors import ConfigError
from steerjax.objectives import OBJECTIVES, find_objective
from steerjax.training.config import GROUPS, Experiment
from steerjax.typed import typed


def default_config():
    """Every key at its default, as the ConfigDict that a recipe changes (an unknown key is an error there too)."""
    from ml_collections import ConfigDict

    groups = GROUPS | {name: find_objective(name).Config for name in OBJECTIVES}
    config = ConfigDict({"objectives": ("regression",)})
    for name, group in groups.items():
        config[name] = ConfigDict(dataclasses.asdict(group()))
    config.model.update(num_kv_heads=0, head_dim=0)  # follow from num_heads and hidden_size, whatever a recipe sets
    return config


def resolve(config: Mapping) -> Experiment:
    """Checks a recipe's values and freezes them.

    Raises:
        ConfigError: an unknown key, a wrong type, a value out of range; names the key and the cure.
    """
    known = ("objectives", *GROUPS, *OBJECTIVES)
    for key in config:
        if key not in known:
            close = difflib.get_close_matches(key, known, n=1)
            cure = f"did you mean config.{close[0]}?" if close else f"the groups are {', '.join(known)}"
            raise ConfigError(f"unknown key config.{key}; cure: {cure}")
    names = typed(tuple[str, ...], config.get("objectives", ("regression",)), "config.objectives", ConfigError)
    chosen = {name: find_objective(name) for name in names}
    if len({objective.kind for objective in chosen.values()}) != 1 or len(chosen) < len(names):
        raise ConfigError(
            f"config.objectives is {names!r}; cure: at least one, none twice, and reward objectives with reward "
            "objectives, chat with chat"
        )

    def group(name: str, cls: type):
        return typed(cls, config.get(name, {}), f"config.{name}", ConfigError)

    for name in OBJECTIVES:  # those that are not chosen too, so that no mistake stays hidden
        group(name, find_objective(name).Config)
    objectives = {name: group(name, objective.Config) for name, objective in chosen.items()}
    experiment = Experiment(names, objectives, **{name: group(name, cls) for name, cls in GROUPS.items()})
    _check(experiment)
    return experiment


def _check(e: Experiment) -> None:
    """Rules over keys of several groups."""
    schema = e.data.make_schema()
    for objective in e.objective.values():
        objective.check(schema)
    for holds, message in (
        (any(objective.weight for objective in e.objective.values()),
         "the weight of every objective is 0; cure: one above 0, or nothing is trained"),
        (not e.model.keep_layers or e.model.source != "random",
         "config.model.keep_layers without a model to keep them of; cure: 0, or a config.model.source"),
        (not e.compute.cache_frozen or e.optimizer.frozen_layers,
         "config.compute.cache_frozen without frozen layers; cure: false, or config.optimizer.frozen_layers above 0"),
    ):  # fmt: skip
        if not holds:
            raise ConfigError(message)
