"""What requested ratings did, as figures: response curves, slopes, leakage, STEERBENCH's measures. Pure functions.

An answer counts for an attribute's figures where the same was asked with another rating of it: in the same prompt and
with equal ratings of the others, if there are such answers (a grid has them). `Held` says what was equal.
"""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from scipy.stats import rankdata, zscore

from steerjax.evaluation.steerbench import MEASURES, binned, continuous, measures
from steerjax.report.figures import UNIT, Columns, mean_of
from steerjax.report.results import correlation, rank_correlation

PERMUTATIONS = 4999
TEXT = ("characters", "words", "grade")  # what is measured of a text; grade is Flesch and Kincaid's
VARIANTS = {"steerbench": continuous, "steerbench binned": binned}
HELD = ("the prompt and the other ratings", "the other ratings", "the prompt", "nothing")


def held(units: np.ndarray, requested: np.ndarray, attribute: int) -> tuple[str, np.ndarray, np.ndarray]:
    """Strata of answers [n] that differ in the requested rating of one attribute.

    Args:
        units: names of prompts [n]. requested: ratings [n, A], NaN where none was asked for.

    Returns:
        what is equal within a stratum, of `HELD`, the first that leaves one with two ratings; the number of each
        answer's stratum, which means nothing where it does not count; whether it counts. Where one rating alone was
        asked for, all answers with it are one stratum.
    """
    asked, others = requested[:, attribute], np.delete(requested, attribute, axis=1)
    _, prompt = np.unique(units, return_inverse=True)
    # NaN, no request, is a value as good as any; as -inf it is equal to itself.
    _, context = np.unique(np.nan_to_num(others, nan=-np.inf), axis=0, return_inverse=True)
    for what, parts in zip(HELD, ((prompt, context), (context,), (prompt,), (np.zeros_like(prompt),)), strict=True):
        _, stratum = np.unique(np.stack([part.ravel() for part in parts]), axis=1, return_inverse=True)
        stratum, seen = stratum.ravel(), ~np.isnan(asked)
        size = stratum.max(initial=0) + 1
        low, high = np.full(size, np.inf), np.full(size, -np.inf)
        np.minimum.at(low, stratum[seen], asked[seen])
        np.maximum.at(high, stratum[seen], asked[seen])
        if (low < high).any():
            return what, stratum, seen & (low < high)[stratum]
    return HELD[-1], stratum, seen


def deviations(values: np.ndarray, strata: np.ndarray, seen: np.ndarray) -> np.ndarray:
    """What each value is more than its stratum's mean [n]; NaN where not `seen`."""
    size = strata.max(initial=0) + 1
    mean = np.bincount(strata[seen], values[seen], size) / np.maximum(np.bincount(strata[seen], minlength=size), 1)
    return np.where(seen, values - mean[strata], np.nan)


def columns(rows: Sequence[Mapping[str, Any]]) -> Columns:
    """Rows of rows.jsonl (`steerability.measured`) as columns [n].

    `asked/A`: the rating, NaN where the answer does not count for A; `step/A` and `step rated/A`: what it is more than
    in the stratum's mean, of all answers and of those with predictions; `predicted/B`; `exact/A`, where the answer
    counts; `rounded/A`, the whole prediction; `differing`; `cut`;
    the text's measures; STEERBENCH's of each answer to another than the neutral request.
    """
    names = list(dict.fromkeys(name for row in rows for name in row["requested"]))
    rated = list(dict.fromkeys(name for row in rows for name in row["predicted"]))
    out = {UNIT: np.array([row["prompt"] for row in rows])}
    requested, predicted = _table(rows, "requested", names), _table(rows, "predicted", rated)
    exact, rounded = (_table(rows, key, names) for key in ("exact", "rounded"))
    seen = ~np.isnan(predicted).all(1)
    for place, name in enumerate(names):
        _, strata, counts = held(out[UNIT], requested, place)
        out[f"asked/{name}"] = np.where(counts, requested[:, place], np.nan)
        out[f"step/{name}"] = deviations(requested[:, place], strata, counts)
        out[f"step rated/{name}"] = deviations(requested[:, place], strata, counts & seen)
        out[f"exact/{name}"] = np.where(counts, exact[:, place], np.nan)
        out[f"rounded/{name}"] = rounded[:, place]
    out |= {f"predicted/{name}": column for name, column in zip(rated, predicted.T, strict=True)}
    out |= {key: np.array([row[key] for row in rows], np.float64) for key in (*TEXT, "cut")}
    out["differing"] = np.where(np.isnan(exact).all(1), np.nan, (exact == 0).sum(1))
    return out | _steerbench(rows, out[UNIT])


def measure(columns: Columns) -> dict[str, tuple[float, int]]:
    """Figures of `columns`.

    `A=N/KEY`: mean of predicted A (KEY `predicted`) or of a measure of the text where A was requested as N. Of each
    KEY, over the requested ratings of A: `A/slope/KEY`, per requested point; `A/spearman/KEY`; `A/rising/KEY`, the
    share of steps to the next rating where the mean rises. `A/exact`: share of answers whose rounded prediction is the
    request; undefined where all predictions round to one rating, which meets the requests of it by no steering.
    `A/exact by chance`: that share, were the requests shuffled among the answers. `leakage/A/B`: slope of predicted B
    over the requests of A. `distance`: attributes of an answer that differ from the request. `cut`: share of answers
    cut at the limit of tokens. `steerbench...`: medians over answers.
    """
    found = {}
    rated = [name.removeprefix("predicted/") for name in columns if name.startswith("predicted/")]
    for name in (name.removeprefix("asked/") for name in columns if name.startswith("asked/")):
        asked, unrated = columns[f"asked/{name}"], np.full(len(columns[UNIT]), np.nan)
        keys = {"predicted": columns.get(f"predicted/{name}", unrated)} | {key: columns[key] for key in TEXT}
        for key, values in keys.items():
            step = columns[f"step rated/{name}" if key == "predicted" else f"step/{name}"]
            seen = ~np.isnan(asked) & ~np.isnan(values)
            levels, place, counts = np.unique(asked[seen], return_inverse=True, return_counts=True)
            means = np.bincount(place, values[seen], len(levels)) / counts
            for level, mean, count in zip(levels.tolist(), means.tolist(), counts.tolist(), strict=True):
                found[f"{name}={level:g}/{key}"] = mean, count
            rising = [after > before for before, after in pairwise(means.tolist())]
            found[f"{name}/slope/{key}"] = slope(step[seen], values[seen])
            found[f"{name}/spearman/{key}"] = _spearman(asked[seen], values[seen])
            found[f"{name}/rising/{key}"] = (float(np.mean(rising)) if rising else np.nan), int(seen.sum())
        found |= _exact(name, asked, columns[f"rounded/{name}"], columns[f"exact/{name}"])
        for other in rated:
            if other != name:
                values, step = columns[f"predicted/{other}"], columns[f"step rated/{name}"]
                seen = ~np.isnan(step) & ~np.isnan(values)
                found[f"leakage/{name}/{other}"] = slope(step[seen], values[seen])
    found |= {"distance": mean_of(columns["differing"]), "cut": mean_of(columns["cut"])}
    for key in (f"{variant}/{name}" for variant in VARIANTS for name in MEASURES):
        values = columns[key][~np.isnan(columns[key])]
        found[key] = (float(np.median(values)) if len(values) else np.nan), len(values)
    return found


def _exact(name: str, asked: np.ndarray, rounded: np.ndarray, exact: np.ndarray) -> dict[str, tuple[float, int]]:
    """`A/exact` and `A/exact by chance` of answers [n]."""
    seen = ~np.isnan(exact)
    asked, rounded, count = asked[seen], rounded[seen], int(seen.sum())
    if len(np.unique(asked)) < 2 or len(np.unique(rounded)) < 2:
        return {f"{name}/exact": (np.nan, count), f"{name}/exact by chance": (np.nan, count)}
    chance = sum(np.mean(asked == level) * np.mean(rounded == level) for level in np.unique(rounded))
    return {f"{name}/exact": (float(exact[seen].mean()), count), f"{name}/exact by chance": (float(chance), count)}


def slope(x: np.ndarray, y: np.ndarray) -> tuple[float, int]:
    """Of the line of least squares through y over x [n], and n; NaN where x is constant."""
    x = x - x.mean() if len(x) else x
    spread = x @ x
    return (float(x @ y / spread) if spread > 1e-12 * max(1, len(x)) else np.nan), len(x)


def trend(requested: np.ndarray, measured: np.ndarray, strata: np.ndarray, seed: int = 0) -> dict[str, Any]:
    """Spearman correlation of request and measurement [n], NaN left out, and a two-sided permutation p-value.

    Requests are permuted within strata. Returns `n`, `spearman` and `p`, None where either side is constant.
    """
    seen = ~np.isnan(requested) & ~np.isnan(measured)
    x, y, random = requested[seen], measured[seen], np.random.default_rng(seed)
    if correlation(x, y) is None:
        return {"n": len(x), "spearman": None, "p": None}
    order = np.argsort(strata[seen], kind="stable")
    x, y = (zscore(rankdata(values)[order]) for values in (x, y))
    strata, spearman = strata[seen][order], np.mean(x * y)
    by_chance = [np.mean(x[np.lexsort((random.random(len(x)), strata))] * y) for _ in range(PERMUTATIONS)]
    extreme = int(np.sum(np.abs(by_chance) >= abs(spearman) - 1e-12))
    return {"n": len(x), "spearman": float(spearman), "p": (1 + extreme) / (1 + PERMUTATIONS)}


def trends(rows: Sequence[Mapping[str, Any]], columns: Columns) -> dict[str, dict[str, Any]]:
    """Of each attribute what was `held` and, by key, the `trend`."""
    names = [name.removeprefix("asked/") for name in columns if name.startswith("asked/")]
    requested, found = _table(rows, "requested", names), {}
    for place, name in enumerate(names):
        what, strata, _ = held(columns[UNIT], requested, place)
        keys = {"predicted": f"predicted/{name}"} | {key: key for key in TEXT}
        tests = {key: trend(columns[f"asked/{name}"], columns[column], strata)
                 for key, column in keys.items() if column in columns}  # fmt: skip
        found[name] = {"held": what, "trends": tests}
    return found


def _spearman(x: np.ndarray, y: np.ndarray) -> tuple[float, int]:
    value = rank_correlation(x, y)
    return (np.nan if value is None else value), len(x)


def _table(rows: Sequence[Mapping[str, Any]], key: str, names: Sequence[str]) -> np.ndarray:
    """[n, names] of a mapping in each row; NaN where it lacks the name, or has None, or an earlier version wrote it."""
    values = [[row.get(key, {}).get(name) for name in names] for row in rows]
    return np.array(values, np.float64).reshape(len(rows), len(names))


def _steerbench(rows: Sequence[Mapping[str, Any]], units: np.ndarray) -> dict[str, np.ndarray]:
    """The measures of each answer [n] by `VARIANT/MEASURE`; NaN for the neutral request, and where it or the answer to
    it has no prediction. The source is the mean prediction of the prompt's answers to the neutral request."""
    names = list(dict.fromkeys(name for row in rows for name in row["output"]))
    output, target = _table(rows, "output", names), _table(rows, "goal", names)
    neutral, whole = np.array([row["neutral"] for row in rows], bool), ~np.isnan(output).any(1)
    _, prompt = np.unique(units, return_inverse=True)
    count = np.bincount(prompt[neutral & whole], minlength=len(rows))[prompt]
    total = [np.bincount(prompt[neutral & whole], column[neutral & whole], len(rows))[prompt] for column in output.T]
    used = ~neutral & whole & (count > 0) & bool(names)
    source = np.stack(total, 1)[used] / count[used, None] if names else output[used]
    found = {}
    for variant, movement in VARIANTS.items():
        for name, values in measures(movement(source, output[used], target[used])).items():
            found[f"{variant}/{name}"] = np.full(len(rows), np.nan)
            found[f"{variant}/{name}"][used] = values
    return found
