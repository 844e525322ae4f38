"""Does a chat model do what the requested ratings say? Length and predicted ratings against the request.

The answers are what `generate` wrote, the predicted ratings what `annotate` added, or --reward-model's. The distance
of an answer is the number of attributes whose rounded predicted rating is not the requested one (NeMo-Aligner, branch
yi/alpha_steerlm). The output holds metrics.json and a plot an attribute.
"""

import argparse
import functools
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pydantic.dataclasses
from pydantic import ConfigDict
from scipy.stats import rankdata, zscore

from steerjax.command import add_scoring_options
from steerjax.data.conversation import Conversation, Turn
from steerjax.data.readers import iter_rows
from steerjax.errors import DataError
from steerjax.report.page import text_table
from steerjax.report.plots import new_figure, require_matplotlib, scatter_with_means
from steerjax.report.results import correlation
from steerjax.schema import SCHEMAS, Attribute, Schema, round_rating
from steerjax.typed import typed

PERMUTATIONS = 4999


def add_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--input", required=True, metavar="FILE", help="what generate, or annotate after it, wrote")
    add("--reward-model", metavar="DIR", help="rates the answers, in place of ratings that they have")
    add("--model", metavar="DIR", help="the chat model, for the ranges of its attributes")
    add("--schema", choices=SCHEMAS, help="a preset that has them; default: told from the answers")
    add_scoring_options(parser)


@dataclass(frozen=True)
class Answer:
    """The last turn of a conversation, the ratings that were asked for and a reward model's, by attribute."""

    conversation: Conversation
    requested: Mapping[str, float]
    predicted: Mapping[str, float]

    @property
    def prompt(self) -> Hashable:
        return self.conversation.system, self.conversation.turns[:-1]

    @property
    def text(self) -> str:
        return self.conversation.turns[-1].content


def run(options: argparse.Namespace) -> dict:
    """Plots each requested attribute, prints the table, returns what `steerability` does, and the `ranges`."""
    require_matplotlib()
    answers, known = list(read_answers(options.input)), Schema(())
    if options.reward_model:
        from steerjax.inference.scorer import open_scorer

        scorer = open_scorer(options.reward_model, options)
        answers, known = _rated(answers, scorer, options.on_bad_row == "skip"), scorer.schema
    if options.schema:
        known = SCHEMAS[options.schema]
    elif options.model:
        from steerjax.bundle import describe

        known = describe(options.model, template=options.template).schema or known
    schema = requested_schema(answers, known)
    if not len(schema):
        raise DataError("no answer to a request", file=options.input, cure="give what generate wrote")
    result = steerability(answers, schema)
    options.output.mkdir(parents=True, exist_ok=True)
    for attribute in schema.attributes:
        plot_steerability(answers, attribute, options.output / f"steerability_{attribute.name}.png")
    print(format_steerability(result))
    if told := [f"{a.name} {a.low:g} to {a.high:g}" for a in schema.attributes if a not in known.attributes]:
        print(f"ranges told from the answers: {', '.join(told)}; --model or --schema knows them")
    print(f"\nmetrics and plots are in {options.output}")
    return {**result, "ranges": {a.name: [a.low, a.high] for a in schema.attributes}}


# Of a row's keys only those that are read are checked.
_loose = pydantic.dataclasses.dataclass(frozen=True, config=ConfigDict(strict=True, allow_inf_nan=False))


@_loose
class _Generation:
    attributes: dict[str, float]


@_loose
class _Row:
    turns: tuple[Turn, ...]
    generation: _Generation
    system: str | None = None


def read_answers(source: str) -> Iterator[Answer]:
    """What `generate` wrote. Raises DataError: a row that is no answer; names file and line."""
    for line, row in iter_rows(source):
        if isinstance(row, DataError):
            raise row
        cure = "give a file that generate wrote, or annotate after it"
        refuse = functools.partial(DataError, file=source, line=line, cure=cure)
        read = typed(_Row, row, "row", refuse)
        if not read.turns or read.turns[-1].role != "assistant":
            raise refuse("the last turn is no answer", field="turns")
        turns = tuple(Turn(turn.role, turn.content) for turn in read.turns)
        conversation = Conversation(turns, read.system, file=source, line=line)
        yield Answer(conversation, read.generation.attributes, read.turns[-1].predicted_ratings or {})


def requested_schema(answers: Sequence[Answer], known: Schema) -> Schema:
    """The attributes that were asked for: those of `known`, then others, whose ranges span the requests.

    Raises DataError: a request outside a known range; names file and line.
    """
    asked: dict[str, list[float]] = {}
    for answer in answers:
        for name, value in answer.requested.items():
            asked.setdefault(name, []).append(value)
            if name in known.names and not (a := known[name]).low <= value <= a.high:
                wrong = f"{value:g} was asked for, outside {a.low:g}..{a.high:g}"
                cure = "name the model that answered with --model, or its preset with --schema"
                raise DataError(wrong, name, cure, file=answer.conversation.file, line=answer.conversation.line)
    told = (
        {"name": name, "low": min(values), "high": max(*values, min(values) + 1)}
        for name, values in asked.items() if name not in known.names
    )  # fmt: skip
    others = typed(tuple[Attribute, ...], tuple(told), "generation.attributes", DataError)
    return Schema(tuple(a for a in known.attributes if a.name in asked) + others)


def _rated(answers: Sequence[Answer], scorer, skip: bool) -> list[Answer]:
    """The answers with the reward model's ratings in place of any that they had."""
    from steerjax.inference.scorer import predict

    turns = [[len(answer.conversation.turns) - 1] if answer.text else [] for answer in answers]
    places, predicted, skipped = predict(scorer, [answer.conversation for answer in answers], turns, skip=skip)
    for entry in skipped:
        print(f"no prediction for {entry.file}:{entry.line}: {entry.reason}")
    ratings = [dict(zip(scorer.schema.names, row, strict=True)) for row in predicted.tolist()]
    rated = dict(zip((place for place, _ in places), ratings, strict=True))
    return [replace(answer, predicted=rated.get(place, {})) for place, answer in enumerate(answers)]


def steerability(answers: Sequence[Answer], schema: Schema, seed: int = 0) -> dict:
    """What requests did; `seed` is that of the permutations.

    Returns:
        `answers`, their number; `attributes`, by name: `values`, for each requested rating n and the means of
        `characters`, `words`, `predicted` rating and `exact` (the share whose rounded prediction is the request), None
        without predictions; `trends`, see `trend`, of the first three, where two ratings or more were requested.
        `distance`: mean over the n answers with predictions, and the attributes that it counts.
    """
    attributes, prompts = {}, [answer.prompt for answer in answers]
    exact = np.full((len(answers), len(schema)), np.nan)
    for attribute, column in zip(schema.attributes, exact.T, strict=True):
        measured = _measured(answers, attribute)
        requested, column[:] = measured.pop("requested"), measured["exact"]
        levels = np.unique(requested[~np.isnan(requested)]).tolist()
        values = [
            {"requested": level, "n": int(np.sum(requested == level))}
            | {key: _mean(numbers[requested == level]) for key, numbers in measured.items()}
            for level in levels
        ]
        keys = ("characters", "words", "predicted") if len(levels) > 1 else ()
        trends = {key: trend(requested, measured[key], prompts, seed) for key in keys}
        if levels:
            attributes[attribute.name] = {"values": values, "trends": trends}
    rated = ~np.isnan(exact)
    differing = (exact == 0).sum(1)[rated.any(1)]
    counted = [name for name, some in zip(schema.names, rated.any(0), strict=True) if some]
    distance = {"mean": _mean(differing), "n": len(differing), "attributes": counted}
    return {"answers": len(answers), "attributes": attributes, "distance": distance}


def trend(requested: np.ndarray, measured: np.ndarray, prompts: Sequence[Hashable], seed: int) -> dict:
    """Spearman correlation of request and measurement [n], and a two-sided permutation p-value; answers with NaN out.

    Requests are permuted among the answers to one prompt; where no prompt was asked with two ratings, among all.
    Returns `n`, `spearman` and `p`, None where either side is constant.
    """
    seen = ~np.isnan(measured)
    x, y, random = requested[seen], measured[seen], np.random.default_rng(seed)
    if correlation(x, y) is None:
        return {"n": len(x), "spearman": None, "p": None}
    numbers = {prompt: number for number, prompt in enumerate(prompts)}
    strata = np.array([numbers[prompt] for prompt in prompts])[seen]
    if len(np.unique([strata, x], axis=1).T) == len(np.unique(strata)):
        strata[:] = 0
    order = np.argsort(strata)
    x, y = (zscore(rankdata(values)[order]) for values in (x, y))
    strata, spearman = strata[order], np.mean(x * y)
    by_chance = [np.mean(x[np.lexsort((random.random(len(x)), strata))] * y) for _ in range(PERMUTATIONS)]
    extreme = int(np.sum(np.abs(by_chance) >= abs(spearman) - 1e-12))
    return {"n": len(x), "spearman": float(spearman), "p": (1 + extreme) / (1 + PERMUTATIONS)}


def format_steerability(result: Mapping) -> str:
    """The result of `steerability` as plain text."""
    forms = {"requested": "g", "n": "d", "characters": ".1f", "words": ".1f", "predicted": ".2f", "exact": ".0%"}
    rows, sentences = [["attribute", *forms]], []
    for name, entry in result["attributes"].items():
        for value in entry["values"]:
            rows.append([name, *("-" if value[key] is None else format(value[key], f) for key, f in forms.items())])
        found = {key: t for key, t in entry["trends"].items() if t["spearman"] is not None}
        if found:
            words = "; ".join(f"{key} {t['spearman']:+.2f} (p {t['p']:.4f})" for key, t in found.items())
            sentences.append(f"{name}, Spearman of the request with {words}")
    distance = result["distance"]
    if distance["n"]:
        many = f"{distance['mean']:.2f} of {len(distance['attributes'])} attributes"
        sentences.append(f"distance: {many} differ from the request on average ({distance['n']} answers)")
    return "\n".join([*text_table(rows, "<>>>>>>"), "", *sentences]).rstrip()


def plot_steerability(answers: Sequence[Answer], attribute: Attribute, path: Path) -> None:
    """Characters, and where there are predictions the predicted rating, against the requested rating."""
    name, measured = attribute.name, _measured(answers, attribute)
    titles = {"characters": "length of the answer (characters)", "predicted": f"predicted {name}"}
    keys = [key for key in titles if not np.isnan(measured[key]).all()]
    with new_figure(path, 4.6 * len(keys), 4.0) as figure:
        for axes, key in zip(figure.subplots(1, len(keys), squeeze=False)[0], keys, strict=True):
            seen = ~np.isnan(measured[key])
            scatter_with_means(axes, measured["requested"][seen], measured[key][seen], attribute, "answer")
            axes.set(title=titles[key], xlabel=f"requested {name}")
            axes.legend()


def _measured(answers: Sequence[Answer], attribute: Attribute) -> dict[str, np.ndarray]:
    """[n] of each measurement; NaN where the attribute was not requested or has no prediction."""
    table = np.full((len(answers), 5), np.nan)
    for row, answer in zip(table, answers, strict=True):
        if (requested := answer.requested.get(attribute.name)) is not None:
            row[:3] = requested, len(answer.text), len(answer.text.split())
            if (predicted := answer.predicted.get(attribute.name)) is not None:
                row[3:] = predicted, round_rating(predicted, attribute) == round_rating(requested, attribute)
    return dict(zip(("requested", "characters", "words", "predicted", "exact"), table.T, strict=True))


def _mean(values: np.ndarray) -> float | None:
    values = values[~np.isnan(values)]
    return float(values.mean()) if len(values) else None
