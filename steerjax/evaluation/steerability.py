"""Does a chat model do what the requested ratings say? Length and predicted ratings against the request.

The distance of an answer is the number of attributes whose rounded predicted rating differs from the requested one
(NeMo-Aligner, branch yi/alpha_steerlm).
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from scipy.stats import rankdata

from steerjax.data.conversation import Conversation, checked_ratings
from steerjax.data.formats import conversation_from_row
from steerjax.data.readers import iter_rows
from steerjax.errors import DataError
from steerjax.report.plots import BLUE, ORANGE, _figure, _save, _style
from steerjax.schema import STEERLM, Schema, round_rating

CHARACTERS, WORDS, PREDICTED = "characters", "words", "predicted"
PERMUTATIONS = 4999


@dataclass(frozen=True)
class Steered:
    """An answer, and the ratings that were asked for.

    Attributes:
        prompt: equal for answers to one prompt.
        requested: by attribute.
        text: of the answer.
        predicted: a reward model's ratings of it, by attribute; None where there are none.
    """

    prompt: str
    requested: Mapping[str, float]
    text: str
    predicted: Mapping[str, float] | None = None


def read_answers(source: str) -> Iterator[tuple[Steered, Conversation | None]]:
    """What `generate` wrote: the last turn of each row, with `generation.attributes` as the request.

    The conversation is None where the answer is empty; it has a length, but cannot be rated.

    Raises:
        DataError: a row that is no answer; names file and line.
    """
    for line, row in iter_rows(source):
        try:
            if isinstance(row, DataError):
                raise row
            made, turns = row.get("generation"), row.get("turns")
            if not isinstance(made, dict) or "attributes" not in made or not isinstance(turns, list) or not turns:
                cure = "give a file that generate wrote, or annotate after it"
                raise DataError("does not say what was asked for", field="generation.attributes", cure=cure)
            requested = checked_ratings(made["attributes"], STEERLM, "generation.attributes") or {}
            empty = isinstance(turns[-1], dict) and turns[-1].get("content") == ""
            readable = row | {"turns": [*turns[:-1], turns[-1] | {"content": "-"}]} if empty else row
            conversation = replace(conversation_from_row(readable, STEERLM, "conversation"), file=source, line=line)
            *before, answer = conversation.turns
            if answer.role != "assistant":
                raise DataError("the last turn is no answer", field="turns", cure="give a file that generate wrote")
            prompt = json.dumps([conversation.system, [turn.content for turn in before]])
            if empty:
                yield Steered(prompt, requested, ""), None
            else:
                yield Steered(prompt, requested, answer.content, answer.predicted_ratings), conversation
        except DataError as error:
            raise error.at(source, line) from None


def steerability(answers: Sequence[Steered], schema: Schema, seed: int = 0) -> dict:
    """What requests did, attribute by attribute.

    Args:
        seed: of the permutations.

    Returns:
        `answers`, their number; `attributes`, by name in the schema's order, those that were requested: `values`, for
        each requested rating n and the means of `characters`, `words`, `predicted` rating and `exact` (the share whose
        rounded prediction is the request), None without predictions; `trends`, where two ratings or more were
        requested, see `trend`, of each of the first three. `distance`: mean over the n answers with predictions, and
        the attributes that it counts.
    """
    attributes = {}
    for attribute in schema.attributes:
        asked = [answer for answer in answers if attribute.name in answer.requested]
        if not asked:
            continue
        requested = np.array([answer.requested[attribute.name] for answer in asked], np.float64)
        measured = _measured(asked, attribute.name)
        exact = [
            math.nan if math.isnan(p) else float(round_rating(p, attribute) == round_rating(r, attribute))
            for p, r in zip(measured[PREDICTED], requested, strict=True)
        ]
        prompts = [answer.prompt for answer in asked]
        levels = np.unique(requested)
        attributes[attribute.name] = {
            "values": [
                {"requested": float(level), "n": int((requested == level).sum())}
                | {key: _mean(x[requested == level]) for key, x in (measured | {"exact": np.array(exact)}).items()}
                for level in levels
            ],
            "trends": {k: trend(requested, x, prompts, seed) for k, x in measured.items()} if len(levels) > 1 else {},
        }
    return {"answers": len(answers), "attributes": attributes, "distance": _distance(answers, schema)}


def trend(requested: np.ndarray, measured: np.ndarray, prompts: Sequence[str], seed: int) -> dict:
    """Spearman correlation of request and measurement, with a two-sided permutation p-value.

    Requests are permuted among the answers to one prompt; where no prompt was asked with two ratings, among all.

    Args:
        requested, measured: [n]; answers with a NaN are left out.

    Returns:
        `n`, `spearman` and `p`; the last two None where either side is constant.
    """
    seen = ~np.isnan(measured)
    x, y = requested[seen], measured[seen]
    strata = np.unique([prompt for prompt, here in zip(prompts, seen, strict=True) if here], return_inverse=True)[1]
    if len(np.unique(x)) < 2 or len(np.unique(y)) < 2:
        return {"n": len(x), "spearman": None, "p": None}
    if len(np.unique(np.stack([strata, x]), axis=1).T) == len(np.unique(strata)):
        strata = np.zeros_like(strata)
    x, y = (ranks - ranks.mean() for ranks in (rankdata(x), rankdata(y)))
    norm = np.linalg.norm(x) * np.linalg.norm(y)
    found = float(x @ y / norm)
    random, places, extreme = np.random.default_rng(seed), np.argsort(strata, kind="stable"), 0
    ordered = y[places]
    for _ in range(PERMUTATIONS):
        shuffled = x[np.lexsort((random.random(len(x)), strata))]  # within each stratum
        extreme += abs(shuffled @ ordered / norm) >= abs(found) - 1e-12
    return {"n": len(x), "spearman": found, "p": (1 + int(extreme)) / (1 + PERMUTATIONS)}


def format_steerability(result: Mapping) -> str:
    """The result of `steerability` as plain text."""
    header = ["attribute", "requested", "n", CHARACTERS, WORDS, PREDICTED, "exact"]
    rows, sentences = [header], []
    for name, entry in result["attributes"].items():
        for value in entry["values"]:
            numbers = [_number(value[key], digits) for key, digits in ((CHARACTERS, 1), (WORDS, 1), (PREDICTED, 2))]
            exact = "-" if value["exact"] is None else f"{value['exact']:.0%}"
            rows.append([name, f"{value['requested']:g}", str(value["n"]), *numbers, exact])
        found = [(key, t) for key, t in entry["trends"].items() if t["spearman"] is not None]
        if found:
            words = "; ".join(f"{key} {t['spearman']:+.2f} (p {t['p']:.4f})" for key, t in found)
            sentences.append(f"{name}, Spearman of the request with {words}")
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(c.rjust(w) if i else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
        for row in rows
    ]
    distance = result["distance"]
    if distance["n"]:
        sentences.append(
            f"distance: {distance['mean']:.2f} of {len(distance['attributes'])} attributes differ from the request on "
            f"average ({distance['n']} answers)"
        )
    return "\n".join([*lines, "", *sentences]).rstrip()


def plot_steerability(answers: Sequence[Steered], name: str, path: str | Path) -> None:
    """Characters, and where there are predictions the predicted rating, against the requested rating.

    Raises:
        SteerjaxError: matplotlib is missing.
    """
    asked = [answer for answer in answers if name in answer.requested]
    requested = np.array([answer.requested[name] for answer in asked])
    measured = _measured(asked, name)
    keys = [key for key in (CHARACTERS, PREDICTED) if not np.isnan(measured[key]).all()]
    figure = _figure(4.6 * len(keys), 4.0)
    for axes, key in zip(figure.subplots(1, len(keys), squeeze=False)[0], keys, strict=True):
        seen = ~np.isnan(measured[key])
        x, y = requested[seen], measured[key][seen]
        jitter = (np.arange(len(x)) * 0.6180339887 % 1.0 - 0.5) * 0.3
        axes.scatter(x + jitter, y, s=13, color=BLUE, alpha=0.4, linewidths=0, label="one answer (spread sideways)")
        levels = np.unique(x)
        axes.plot(levels, [y[x == level].mean() for level in levels], "o-", color=ORANGE, label="mean")
        _style(axes, {CHARACTERS: "length of the answer", PREDICTED: f"predicted {name}"}[key])
        axes.set_xlabel(f"requested {name}", fontsize=10.5)
        axes.set_ylabel({CHARACTERS: "characters", PREDICTED: "rating"}[key], fontsize=10.5)
        axes.legend(frameon=False, fontsize=9)
    _save(figure, path)


def _measured(answers: Sequence[Steered], name: str) -> dict[str, np.ndarray]:
    """[n] of each measurement; NaN without a prediction."""
    return {
        CHARACTERS: np.array([len(answer.text) for answer in answers], np.float64),
        WORDS: np.array([len(answer.text.split()) for answer in answers], np.float64),
        PREDICTED: np.array([(answer.predicted or {}).get(name, math.nan) for answer in answers], np.float64),
    }


def _distance(answers: Sequence[Steered], schema: Schema) -> dict:
    counts, names = [], set()
    for answer in answers:
        requested, predicted = answer.requested, answer.predicted or {}
        both = [a for a in schema.attributes if a.name in requested and a.name in predicted]
        names |= {a.name for a in both}
        if both:
            counts.append(sum(round_rating(predicted[a.name], a) != round_rating(requested[a.name], a) for a in both))
    return {
        "mean": float(np.mean(counts)) if counts else None,
        "n": len(counts),
        "attributes": [name for name in schema.names if name in names],
    }


def _mean(values: np.ndarray) -> float | None:
    values = values[~np.isnan(values)]
    return float(values.mean()) if len(values) else None


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"
