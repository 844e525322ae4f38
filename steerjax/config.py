"""A recipe's ConfigDict -> a frozen experiment, checked before anything is compiled.

A recipe (`configs/*.py`) starts from `default_config()`, changes what it wants and returns the ConfigDict; `resolve`
turns it into an `Experiment`. Each package owns the values of its group (`GROUPS`), each objective its own. Inner code
takes these values as they are and checks nothing.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping

from steerjax.chat.labels import check_labels
from steerjax.data.config import Texts
from steerjax.errors import ConfigError
from steerjax.objectives import OBJECTIVES, find_objective
from steerjax.training.config import GROUPS, Experiment
from steerjax.typed import STRICT, typed


def _recipe() -> type:
    return _made(tuple(OBJECTIVES))  # a user may have added one


@functools.cache
def _made(objectives: tuple[str, ...]) -> type:
    """A dataclass of every group; of objectives that are not chosen too, so that no mistake stays hidden."""
    groups = GROUPS | {name: find_objective(name).Config for name in objectives}
    fields = [(name, group, dataclasses.field(default_factory=group)) for name, group in groups.items()]
    names = ("objectives", Texts, dataclasses.field(default=("regression",)))
    return dataclasses.make_dataclass("Recipe", [names, *fields], namespace={"__pydantic_config__": STRICT})


def default_config():
    """Every key at its default, as the ConfigDict that a recipe changes (an unknown key is an error there too)."""
    from ml_collections import ConfigDict

    config = ConfigDict(dataclasses.asdict(_recipe()()))
    config.model.update(num_kv_heads=0, head_dim=0)  # follow from num_heads and hidden_size, whatever a recipe sets
    return config


def resolve(config: Mapping) -> Experiment:
    """Checks a recipe's values and freezes them.

    Raises:
        ConfigError: an unknown key, a wrong type, a value out of range; names the key and the cure.
    """
    found = vars(typed(_recipe(), config, "config", ConfigError))
    names = found["objectives"]
    if len({find_objective(name).kind for name in names}) != 1 or len(set(names)) < len(names):
        cure = "at least one, none twice, and reward objectives with reward objectives, chat with chat"
        raise ConfigError(f"config.objectives is {names!r}; cure: {cure}")
    e = Experiment(names, {name: found[name] for name in names}, **{name: found[name] for name in GROUPS})
    schema = e.data.make_schema()
    for objective in e.objective.values():
        objective.check(schema)
    problems = {
        "the weight of every objective is 0; cure: one above 0, or nothing is trained":
            not any(objective.weight for objective in e.objective.values()),
        "config.model.keep_layers without a model to keep them of; cure: 0, or a config.model.source":
            e.model.keep_layers and e.model.source == "random",
        "config.chat.template='source' without a model that has one; cure: 'chatml', or a config.model.source":
            e.chat.template == "source" and e.model.source == "random",
        f"config.chat.labels='{e.chat.labels}' with a reward model, which writes no label line; cure: 'auto'":
            e.chat.labels in ("words", "tokens") and find_objective(names[0]).kind == "reward",
        "config.compute.cache_frozen without frozen layers; cure: false, or config.optimizer.frozen_layers above 0":
            e.compute.cache_frozen and not e.optimizer.frozen_layers,
    }  # fmt: skip
    for problem, there in problems.items():
        if there:
            raise ConfigError(problem)
    if e.chat.labels != "auto":
        check_labels(schema, e.chat.labels)
    return e
