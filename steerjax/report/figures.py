"""Figures of an evaluation with their intervals, and of two evaluations of the same rows their differences.

A suite says what its rows are as columns, arrays `[n]` of one row each, and how figures follow from them (`Measure`).
Intervals come from drawing rows anew: rows of one `unit` (a prompt, a pair) are drawn together.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from steerjax.errors import DataError

UNIT = "unit"  # the column that names what is drawn together
DRAWS = 1000

Columns = Mapping[str, np.ndarray]
# Figure -> (value, NaN where it is undefined; how many rows it is of). It is called for every draw: no loop over rows.
Measure = Callable[[Columns], Mapping[str, tuple[float, int]]]


class Figure(NamedTuple):
    """A number with how many rows it is of and its 95% interval; None where it is undefined."""

    value: float | None
    count: int
    interval: tuple[float, float] | None

    def __str__(self) -> str:
        if self.value is None:
            return "-"
        return f"{self.value:.3f}" + (f" [{self.interval[0]:.3f}, {self.interval[1]:.3f}]" if self.interval else "")

    def to_json(self) -> dict:
        return {"value": self.value, "count": self.count, "interval": self.interval}


class Difference(NamedTuple):
    """By how much a figure of one evaluation is more than another's on the same rows: 95% interval and two-sided p of
    paired draws; None where it is undefined."""

    value: float | None
    count: int
    interval: tuple[float, float] | None
    p: float | None

    def to_json(self) -> dict:
        return self._asdict()


def figures(measure: Measure, columns: Columns, seed: int = 0) -> dict[str, Figure]:
    """Every figure, with the interval of the percentile bootstrap over units (1,000 draws); None for fewer than two
    units, or where one draw in twenty or more leaves it undefined."""
    found, units = measure(columns), _units(columns[UNIT])
    random, draws = np.random.default_rng(seed), []
    for _ in range(DRAWS if len(units) > 1 else 0):
        draws.append(measure(_take(columns, _drawn(units, random))))
    return {
        name: Figure(_finite(value), int(count), _interval(draws, name, value))
        for name, (value, count) in found.items()
    }


def differences(measure: Measure, one: Columns, other: Columns, seed: int = 0) -> dict[str, Difference]:
    """What each figure of `one` is more than of `other`, over the units that are in both.

    Raises DataError: none is in both, or a unit has other numbers of rows in them.
    """
    shared = sorted(set(one[UNIT].tolist()) & set(other[UNIT].tolist()))
    if not shared:
        raise DataError("the two evaluations have no row in common", cure="evaluate both on the same data")
    sides = []
    for columns in (one, other):
        units = dict(zip(np.unique(columns[UNIT]).tolist(), _units(columns[UNIT]), strict=True))
        sides.append([units[unit] for unit in shared])
    if any(len(a) != len(b) for a, b in zip(*sides, strict=True)):
        raise DataError(
            "a unit has other numbers of rows in the two evaluations", cure="evaluate both on the same data"
        )
    a, b = (_take(columns, np.concatenate(units)) for columns, units in zip((one, other), sides, strict=True))
    a, b = ({name: side[name] for name in a if name in b} for side in (a, b))
    sizes = [len(unit) for unit in sides[0]]
    units = np.split(np.arange(len(a[UNIT])), np.cumsum(sizes)[:-1])
    first, second = measure(a), measure(b)
    counts = {name: int(min(first[name][1], second[name][1])) for name in first if name in second}
    whole = {name: first[name][0] - second[name][0] for name in counts}
    random, draws = np.random.default_rng(seed), []
    for _ in range(DRAWS if len(units) > 1 else 0):
        index = _drawn(units, random)
        x, y = measure(_take(a, index)), measure(_take(b, index))
        draws.append({name: (x[name][0] - y[name][0], 0) for name in counts if name in x and name in y})
    found = {}
    for name, value in whole.items():
        interval = _interval(draws, name, value)
        found[name] = Difference(_finite(value), counts[name], interval, _p(draws, name) if interval else None)
    return found


def prompt_units(prompts: Sequence[str], rows: Sequence = ()) -> np.ndarray:
    """The column `UNIT` where rows of one prompt are drawn together; where all have one, each row is by itself, named
    by `rows` or its place."""
    return np.array(prompts if len(set(prompts)) > 1 else rows or range(len(prompts)))


def _units(names: np.ndarray) -> list[np.ndarray]:
    """Of each unit, in the order of their names, the places of its rows."""
    _, inverse, counts = np.unique(names, return_inverse=True, return_counts=True)
    return np.split(np.argsort(inverse, kind="stable"), np.cumsum(counts)[:-1]) if len(names) else []


def _drawn(units: Sequence[np.ndarray], random: np.random.Generator) -> np.ndarray:
    return np.concatenate([units[i] for i in random.integers(0, len(units), len(units))])


def _take(columns: Columns, index: np.ndarray) -> Columns:
    return {name: column[index] for name, column in columns.items()}


def _finite(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


def _interval(draws: Sequence[Mapping], name: str, value: float) -> tuple[float, float] | None:
    values = _values(draws, name)
    if not np.isfinite(value) or len(values) < 0.95 * DRAWS:
        return None
    low, high = np.percentile(values, [2.5, 97.5]).tolist()
    return low, high


def _values(draws: Sequence[Mapping], name: str) -> np.ndarray:
    """Of the draws that have the figure, and have it defined."""
    values = np.array([draw[name][0] for draw in draws if name in draw])
    return values[np.isfinite(values)]


def _p(draws: Sequence[Mapping], name: str) -> float:
    """Twice the smaller share of draws on one side of 0, that of the interval: below 0.05 where it leaves 0 out."""
    values = _values(draws, name)
    return float(min(1.0, 2 * min(np.sum(values <= 0) + 1, np.sum(values >= 0) + 1) / (len(values) + 1)))


def mean_of(values: np.ndarray) -> tuple[float, int]:
    """Mean and number of the values that are no NaN, as a `Measure` gives them."""
    seen = values[~np.isnan(values)]
    return (float(seen.mean()) if len(seen) else np.nan), len(seen)
