"""Does a chat model do what the requested ratings say? Length and predicted ratings against the request.

The answers are what `generate` wrote; predicted ratings are those that `annotate` added, or --reward-model's. The
distance of an answer is the number of attributes whose rounded predicted rating differs from the requested one
(NeMo-Aligner, branch yi/alpha_steerlm). The output holds metrics.json and a plot an attribute.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import numpy as np
import pydantic.dataclasses
from pydantic import Field, FiniteFloat
from scipy.stats import rankdata

from steerjax.command import add_scoring_options, open_scorer
from steerjax.data.conversation import Conversation, Turn
from steerjax.data.readers import iter_rows
from steerjax.errors import DataError, ModelError
from steerjax.report.page import text_table
from steerjax.report.plots import new_figure, require_matplotlib, save, scatter_with_means, style
from steerjax.schema import SCHEMAS, Attribute, Schema, round_rating, schema_from_json
from steerjax.typed import typed

if TYPE_CHECKING:
    from steerjax.data.loading import Skipped
    from steerjax.inference.scorer import Scorer

CHARACTERS, WORDS, PREDICTED = "characters", "words", "predicted"
PERMUTATIONS = 4999
# Of a row's keys only those that are read are checked.
_loose = pydantic.dataclasses.dataclass(frozen=True, config=pydantic.ConfigDict(strict=True, extra="ignore"))


def add_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--input", required=True, metavar="FILE", help="what generate, or annotate after it, wrote")
    add("--reward-model", metavar="DIR", help="rates the answers, in place of ratings that they have")
    add("--model", metavar="DIR", help="whose attributes were asked for, with their ranges: the chat model's folder")
    add("--schema", choices=tuple(SCHEMAS), help="the same, by the name of a preset; default: told from the answers")
    add_scoring_options(parser)


@dataclass(frozen=True)
class Steered:
    """An answer, and the ratings that were asked for.

    Attributes:
        prompt: equal for answers to one prompt.
        requested: by attribute.
        text: of the answer; an empty one has a length, but cannot be rated.
        predicted: a reward model's ratings of it, by attribute; none where it has not been rated.
        conversation: prompt and answer.
    """

    prompt: str
    requested: Mapping[str, float]
    text: str
    predicted: Mapping[str, float] = field(default_factory=dict)
    conversation: Conversation | None = None


def run(options: argparse.Namespace) -> dict:
    """Plots each requested attribute, prints the table and returns what `steerability` does, and the `ranges`.

    Raises:
        SteerjaxError: rows that are no answers, or a model that does not fit.
    """
    require_matplotlib()
    answers, known = list(read_answers(options.input)), _known_attributes(options)
    if options.reward_model:
        scorer = open_scorer(options.reward_model, options)
        answers, known = _rated(answers, scorer, options), (*scorer.schema.attributes, *known)
    if not any(answer.requested for answer in answers):
        raise DataError("no answer to a request", file=options.input, cure="give what generate wrote")
    schema = requested_schema(answers, known)
    for answer in answers:
        for name, value in answer.requested.items():
            if not schema[name].low <= value <= schema[name].high:
                message = f"{value:g} was asked for, outside {schema[name].low:g}..{schema[name].high:g}"
                cure = "name the model that answered with --model, or its preset with --schema"
                raise DataError(message, file=options.input, line=answer.conversation.line, field=name, cure=cure)
    result = steerability(answers, schema)
    options.output.mkdir(parents=True, exist_ok=True)
    for attribute in schema.attributes:
        plot_steerability(answers, attribute, options.output / f"steerability_{attribute.name}.png")
    print(format_steerability(result))
    told = [f"{a.name} {a.low:g} to {a.high:g}" for a in schema.attributes if a not in known]
    if told:
        print(f"ranges told from the answers: {', '.join(told)}; --model or --schema knows them")
    print(f"\nmetrics and plots are in {options.output}")
    return {**result, "ranges": {a.name: [a.low, a.high] for a in schema.attributes}}


@_loose
class _Turn:
    role: Literal["user", "assistant"]
    content: str
    predicted_ratings: dict[str, FiniteFloat] | None = None


@_loose
class _Generation:
    attributes: dict[str, FiniteFloat]


@_loose
class _Row:
    turns: Annotated[tuple[_Turn, ...], Field(min_length=1)]
    generation: _Generation
    system: str | None = None


def read_answers(source: str) -> Iterator[Steered]:
    """What `generate` wrote: the last turn of each row, with `generation.attributes` as the request.

    Raises:
        DataError: a row that is no answer; names file and line.
    """
    for line, row in iter_rows(source):
        if isinstance(row, DataError):
            raise row
        try:
            read = typed(_Row, row, "row", DataError)
            *before, answer = read.turns
            if answer.role != "assistant":
                raise DataError("the last turn is no answer", field="turns")
        except DataError as error:
            cure = "give a file that generate wrote, or annotate after it"
            raise DataError(error.message, file=source, line=line, field=error.field, cure=cure) from None
        turns = tuple(Turn(turn.role, turn.content) for turn in read.turns)
        yield Steered(
            prompt=json.dumps([read.system, [turn.content for turn in before]]),
            requested=read.generation.attributes,
            text=answer.content,
            predicted=answer.predicted_ratings or {},
            conversation=Conversation(turns, read.system, file=source, line=line),
        )


def _known_attributes(options: argparse.Namespace) -> tuple[Attribute, ...]:
    """Of --schema or --model; none where neither is given."""
    if options.schema:
        return SCHEMAS[options.schema].attributes
    if not options.model:
        return ()
    from steerjax.bundle import describe

    schema = describe(options.model, template=options.template).schema
    if schema is None:
        raise ModelError(f"'{options.model}' does not name its attributes\n  cure: --schema, or leave --model out")
    return schema.attributes


def requested_schema(answers: Sequence[Steered], known: Sequence[Attribute]) -> Schema:
    """The attributes that were asked for: those of `known` first, and of two with one name the last.

    The range of one that is not known spans the requests and the predictions.
    """
    seen: dict[str, list[float]] = {}
    for answer in answers:
        for name, value in answer.requested.items():
            seen.setdefault(name, []).extend([value, answer.predicted.get(name, value)])
    entries = {attribute.name: asdict(attribute) for attribute in known if attribute.name in seen}
    for name, values in seen.items():
        low, high = math.floor(min(values)), math.ceil(max(values))
        entries.setdefault(name, {"name": name, "low": low, "high": max(low + 1, high)})
    return schema_from_json(entries.values(), "generation.attributes", DataError)


def _rated(answers: Sequence[Steered], scorer: Scorer, options: argparse.Namespace) -> list[Steered]:
    """The answers with the reward model's ratings in place of any that they had."""
    from steerjax.inference.scorer import predict

    conversations = [answer.conversation for answer in answers if answer.text]
    turns = [[len(conversation.turns) - 1] for conversation in conversations]
    skipped: list[Skipped] = []
    examples, predicted = predict(scorer, conversations, turns, skipped, skip=options.on_bad_row == "skip")
    for entry in skipped:
        print(f"no prediction for {entry.file}:{entry.line}: {entry.reason}")
    ratings = {
        conversation.line: dict(zip(scorer.schema.names, row, strict=True))
        for (conversation, _), row in zip(examples, predicted.tolist(), strict=True)
    }
    return [replace(answer, predicted=ratings.get(answer.conversation.line, {})) for answer in answers]


def steerability(answers: Sequence[Steered], schema: Schema, seed: int = 0) -> dict:
    """What requests did, attribute by attribute; `seed` is that of the permutations.

    Returns:
        `answers`, their number; `attributes`, by name in the schema's order, those that were requested: `values`, for
        each requested rating n and the means of `characters`, `words`, `predicted` rating and `exact` (the share whose
        rounded prediction is the request), None without predictions; `trends`, where two ratings or more were
        requested, see `trend`, of each of the first three. `distance`: mean over the n answers with predictions, and
        the attributes that it counts.
    """
    attributes = {}
    exact = np.full((len(answers), len(schema)), np.nan)  # is the rounded prediction the request
    for a, attribute in enumerate(schema.attributes):
        asked = [i for i, answer in enumerate(answers) if attribute.name in answer.requested]
        if not asked:
            continue
        requested, measured = _measured([answers[i] for i in asked], attribute.name)
        exact[asked, a] = [
            math.nan if math.isnan(p) else round_rating(p, attribute) == round_rating(r, attribute)
            for p, r in zip(measured[PREDICTED], requested, strict=True)
        ]
        prompts, levels = [answers[i].prompt for i in asked], np.unique(requested)
        attributes[attribute.name] = {
            "values": [
                {"requested": float(level), "n": int((requested == level).sum())}
                | {key: _mean(x[requested == level]) for key, x in (measured | {"exact": exact[asked, a]}).items()}
                for level in levels
            ],
            "trends": {k: trend(requested, x, prompts, seed) for k, x in measured.items()} if len(levels) > 1 else {},
        }
    rated = ~np.isnan(exact)
    differing = (exact == 0).sum(1)[rated.any(1)]
    distance = {
        "mean": _mean(differing),
        "n": len(differing),
        "attributes": [name for name, some in zip(schema.names, rated.any(0), strict=True) if some],
    }
    return {"answers": len(answers), "attributes": attributes, "distance": distance}


def trend(requested: np.ndarray, measured: np.ndarray, prompts: Sequence[str], seed: int) -> dict:
    """Spearman correlation of request and measurement, with a two-sided permutation p-value.

    Requests are permuted among the answers to one prompt; where no prompt was asked with two ratings, among all.

    Args:
        requested, measured: [n]; answers with a NaN are left out.

    Returns:
        `n`; `spearman` and `p`, None where either side is constant.
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
    rows, sentences = [["attribute", "requested", "n", CHARACTERS, WORDS, PREDICTED, "exact"]], []
    for name, entry in result["attributes"].items():
        for value in entry["values"]:
            numbers = [
                "-" if value[key] is None else format(value[key], form)
                for key, form in ((CHARACTERS, ".1f"), (WORDS, ".1f"), (PREDICTED, ".2f"), ("exact", ".0%"))
            ]
            rows.append([name, f"{value['requested']:g}", str(value["n"]), *numbers])
        found = [(key, t) for key, t in entry["trends"].items() if t["spearman"] is not None]
        if found:
            words = "; ".join(f"{key} {t['spearman']:+.2f} (p {t['p']:.4f})" for key, t in found)
            sentences.append(f"{name}, Spearman of the request with {words}")
    distance = result["distance"]
    if distance["n"]:
        sentences.append(
            f"distance: {distance['mean']:.2f} of {len(distance['attributes'])} attributes differ from the request on "
            f"average ({distance['n']} answers)"
        )
    return "\n".join([*text_table(rows, left=(0,)), "", *sentences]).rstrip()


def plot_steerability(answers: Sequence[Steered], attribute: Attribute, path: str | Path) -> None:
    """Characters, and where there are predictions the predicted rating, against the requested rating."""
    name = attribute.name
    requested, measured = _measured([answer for answer in answers if name in answer.requested], name)
    labels = {CHARACTERS: ("length of the answer", "characters"), PREDICTED: (f"predicted {name}", "rating")}
    keys = [key for key in labels if not np.isnan(measured[key]).all()]
    figure = new_figure(4.6 * len(keys), 4.0)
    for axes, key in zip(figure.subplots(1, len(keys), squeeze=False)[0], keys, strict=True):
        seen = ~np.isnan(measured[key])
        scatter_with_means(axes, requested[seen], measured[key][seen], attribute, "answer")
        style(axes, labels[key][0])
        axes.set_xlabel(f"requested {name}", fontsize=10.5)
        axes.set_ylabel(labels[key][1], fontsize=10.5)
        axes.legend(frameon=False, fontsize=9)
    save(figure, path)


def _measured(answers: Sequence[Steered], name: str) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """[n] requests, and [n] of each measurement; NaN without a prediction."""
    return np.array([answer.requested[name] for answer in answers], np.float64), {
        CHARACTERS: np.array([len(answer.text) for answer in answers], np.float64),
        WORDS: np.array([len(answer.text.split()) for answer in answers], np.float64),
        PREDICTED: np.array([answer.predicted.get(name, math.nan) for answer in answers], np.float64),
    }


def _mean(values: np.ndarray) -> float | None:
    values = values[~np.isnan(values)]
    return float(values.mean()) if len(values) else None
