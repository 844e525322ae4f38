"""A reward model's predictions against people's ratings, beside two trivial predictors fitted on --train-data.

By attribute and in the average: errors, correlations, agreement, calibration, how often the better rated of two
responses to the same turns is predicted higher, and how much a prediction follows length where people's rating does
not. Where rows carry several raters (lists in place of numbers, as HelpSteer2's disagreements), people's agreement
among themselves stands beside the model's with them.
"""

import argparse
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace

import numpy as np

from steerjax.command import MODEL, add_scoring_options
from steerjax.data.conversation import Conversation, context_key
from steerjax.data.loading import Skipped, file_hashes, load_conversations, prompt_key, write_skipped
from steerjax.data.readers import iter_rows
from steerjax.errors import DataError
from steerjax.evaluation.suite import Result, figure_table, kept_rows, row_name
from steerjax.report.figures import UNIT, Columns, figures, prompt_units
from steerjax.report.page import format_table
from steerjax.report.plots import plot_confusion, plot_correlations, plot_predictions
from steerjax.report.results import (
    LOG_LENGTH,
    MEAN_RATING,
    baseline,
    calibration_slope,
    correlation,
    evaluate_predictions,
    kappa_of_whole,
    pooled_kappa,
    rank_correlation,
    rater_pairs,
    whole,
)  # fmt: skip
from steerjax.report.results import (
    MODEL as PREDICTED,
)
from steerjax.schema import Schema

WHO = (PREDICTED, MEAN_RATING, LOG_LENGTH)


def add_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--model", required=True, metavar="DIR", help=MODEL)
    add("--data", required=True, action="append", metavar="FILE", help="rated conversations; repeatable")
    add("--train-data", action="append", default=[], metavar="FILE", help="to fit the baselines on")
    add_scoring_options(parser)


def run(options: argparse.Namespace) -> Result:
    from steerjax.checksums import folder_checksum
    from steerjax.inference.scorer import open_scorer, predicted_ratings, reading_schema

    o, scorer = options, open_scorer(options.model, options)
    schema, how, skipped = scorer.schema, options.on_bad_row, []

    def load(files: Sequence[str]) -> list[tuple[Conversation, int]]:
        """Every turn with a rating of one of the attributes."""
        loaded = load_conversations(files, reading_schema(schema), format=o.format, on_bad_row=how)
        skipped.extend(loaded.skipped)
        rated = [place for c in loaded.conversations for place in c.rated()]
        return [(c, i) for c, i in rated if set(schema.names) & set(c.turns[i].ratings)]

    rated, left_out = load(o.data), list(skipped)
    tested = _once(rated)
    trained = [c.turns[i] for c, i in _once(load(o.train_data))] if o.train_data else []
    if not tested:
        raise DataError("no rated response to evaluate", file=o.data[0], cure=f"rate {' or '.join(schema.names)}")
    raters = _raters(o.data, schema)
    lengths = [len(c.turns[i].content) for c, i in tested]
    fitted = _ratings(trained, schema), [len(turn.content) for turn in trained]
    guesses = {who: baseline(degree, *fitted, lengths) for degree, who in enumerate(WHO[1:])}

    def compute(part: range) -> list[dict]:
        """The rows of these turns, each with a prediction, or why it has none."""
        found = predicted_ratings(scorer, *zip(*(tested[i] for i in part), strict=True), skip=how == "skip")
        return [
            _named(*tested[i]) | (
                {"skipped": asdict(one)} if isinstance(one, Skipped)
                else _row(tested[i], one, {who: g[i] for who, g in guesses.items()}, raters, schema)
            )
            for one, i in zip(found, part, strict=True)
        ]  # fmt: skip

    settings = {
        "suite": "attributes", "model": folder_checksum(scorer.description.path), "attributes": schema.to_json(),
        "data": file_hashes(o.data), "train_data": file_hashes(o.train_data), "row_length": scorer.row_length,
        **{key: vars(o)[key] for key in ("format", "template", "dtype", "on_bad_row")},
        "shared_turns": "once",
    }  # fmt: skip
    rows = kept_rows(o.output, settings, len(tested), compute, chunk=128, unit="response")
    kept = [row for row in rows if "skipped" not in row]
    refused = [row for row in rows if "skipped" in row]
    if not kept:
        first = Skipped(**refused[0]["skipped"])
        said = f"all {len(refused)} rated responses were left out, the first of them: {first.reason}"
        raise DataError(said, file=first.file, line=first.line, cure="a larger --row-length, or other rows")
    write_skipped(o.output / "skipped.jsonl", [*left_out, *(Skipped(**row["skipped"]) for row in refused)])
    return _result(o, scorer, schema, rows, kept, fitted, len(rated) - len(tested))


def _once(rated: Sequence[tuple[Conversation, int]]) -> list[tuple[Conversation, int]]:
    """Of a turn that several conversations share, the first."""
    found: dict = {}
    for place, (conversation, turn) in enumerate(rated):
        found.setdefault(conversation.messages()[turn] or place, (conversation, turn))
    return list(found.values())


def _result(o, scorer, schema: Schema, rows: list[dict], kept: list[dict], fitted: tuple, shared: int) -> Result:
    human, predicted = (_ratings_of(kept, key, schema) for key in ("ratings", "predicted_ratings"))
    lengths, ids = [row["characters"] for row in kept], [row["id"] for row in kept]
    result, prompts = evaluate_predictions(schema, predicted, human, lengths, ids, *fitted), [r["prompt"] for r in kept]
    result = replace(result, units=prompts if len(set(prompts)) > 1 else None)  # as in `columns`
    found = figures(measure, columns(rows))
    plots = {
        "predictions.png": "Predicted against human ratings",
        "confusion.png": "Whole ratings, both ways",
    }
    plot_predictions(result, o.output / "predictions.png")
    plot_confusion(result, o.output / "confusion.png")
    if len(schema) > 1:
        plots["correlations.png"] = "Which attributes go together in human and in predicted ratings"
        plot_correlations(result, o.output / "correlations.png")
    more = [name for name in found if name.split("/")[-1] in _MORE and found[name].count]
    text = "\n\n".join([format_table(result), figure_table(found, more), _EXPLANATION])
    summary = {
        "model": scorer.description.path, "data": ", ".join(o.data),
        "baselines fitted on": ", ".join(o.train_data) or "nothing",
        "responses": f"{len(kept)} rated, {len(rows) - len(kept)} without a prediction (rows.jsonl), "
        + (f"{shared} that several conversations share count once, " if shared else "")
        + "rows that were left out: skipped.jsonl",
        "computed": scorer.counts,
    }  # fmt: skip
    detail = {
        "responses": len(kept), "skipped": len(rows) - len(kept), "attributes": result.metrics,
        "baselines": result.baselines, "average_mse": result.average_mse(),
    }  # fmt: skip
    return Result(found, text, plots, summary, detail)


_MORE = ("slope", "bias", "pairs", "longer", "length", "people", "model with people")
_EXPLANATION = """\
slope: by how much human ratings rise where predictions rise by 1 (1 is calibrated); bias: by how much predictions are
above human ratings in the mean; pairs: of two responses to the same turns, how often the better rated has the higher
prediction; longer: of preferring the longer one; length: correlation of prediction and log length among responses of
equal human rating; people: quadratic-weighted kappa of two raters of a response; model with people: of the prediction
and a rater."""


def columns(rows: Sequence[Mapping]) -> Columns:
    """Of each row with a prediction: what people gave, what each predictor says, how many pairs of a context are right.

    Rows of one prompt are drawn together, unless all have one.
    """
    rows = [row for row in rows if "skipped" not in row]
    names = list(dict.fromkeys(name for row in rows for name in row["predicted_ratings"]))
    contexts = np.array([row.get("context", row["prompt"]) for row in rows])
    found = {UNIT: prompt_units([row["prompt"] for row in rows], [str(row_name(row)) for row in rows])}
    found["log length"] = np.log1p(np.array([row["characters"] for row in rows], np.float64))
    for name in names:
        found[f"{name}:human"] = human = _column(row["ratings"].get(name) for row in rows)
        for who in WHO:
            found[f"{name}:{who}"] = _column(
                (row["predicted_ratings"] if who == PREDICTED else row["baselines"][who]).get(name) for row in rows
            )
            found[f"{name}:{who}:whole"] = _column(row["whole"][who].get(name) for row in rows)
        found[f"{name}:human:whole"] = _column(row["whole"]["human"].get(name) for row in rows)
        for who, values in ((PREDICTED, found[f"{name}:{PREDICTED}"]), ("longer", found["log length"])):
            right, count = _pairs(human, values, contexts)
            found[f"{name}:{who}:right"], found[f"{name}:pairs"] = right, count
        raters = [row.get("raters", {}).get(name, ()) for row in rows]
        if any(len(each) > 1 for each in raters):
            found[f"{name}:raters"] = np.array([*itertools.zip_longest(*raters, fillvalue=np.nan)], np.float64).T
    return found


def measure(found: Columns) -> dict[str, tuple[float, int]]:
    out: dict[str, tuple[float, int]] = {}
    names = [key.removesuffix(":human") for key in found if key.endswith(":human")]
    for name in names:
        y, y_whole = found[f"{name}:human"], found[f"{name}:human:whole"]
        for who in WHO:
            x, x_whole = found[f"{name}:{who}"], found[f"{name}:{who}:whole"]
            seen, end = ~np.isnan(x) & ~np.isnan(y), "" if who == PREDICTED else f" of {who}"
            count = int(seen.sum())
            values = {
                "mse": np.mean((x[seen] - y[seen]) ** 2) if count else np.nan,
                "mae": np.mean(np.abs(x[seen] - y[seen])) if count else np.nan,
                "pearson": correlation(x[seen], y[seen]),
                "kappa": kappa_of_whole(x_whole[seen], y_whole[seen]),
            }
            if who == PREDICTED:
                values |= {
                    "spearman": rank_correlation(x[seen], y[seen]),
                    "slope": calibration_slope(x[seen], y[seen]),
                    "bias": np.mean(x[seen] - y[seen]) if count else np.nan,
                }
            out |= {f"{name}/{key}{end}": (np.nan if v is None else v, count) for key, v in values.items()}
        pairs = found[f"{name}:pairs"].sum()
        for key, who in (("pairs", PREDICTED), ("longer", "longer")):
            out[f"{name}/{key}"] = found[f"{name}:{who}:right"].sum() / pairs if pairs else np.nan, int(pairs)
        seen = ~np.isnan(y)
        out[f"{name}/length"] = (
            _partial(found[f"{name}:{PREDICTED}"][seen], found["log length"][seen], y[seen]),
            int(seen.sum()),
        )
        if (raters := found.get(f"{name}:raters")) is not None:
            x, y = rater_pairs(raters)
            kappa = kappa_of_whole(x, y)
            out[f"{name}/people"] = (np.nan if kappa is None else kappa), len(x)
            out[f"{name}/model with people"] = pooled_kappa(found[f"{name}:{PREDICTED}:whole"], raters)
    for key in ("mse", "mae", "pearson", "spearman", "kappa", "slope", "bias", "pairs", "longer", "length"):
        values = [out[f"{name}/{key}"] for name in names if out[f"{name}/{key}"][1]]
        defined = [value for value, _ in values if not np.isnan(value)]
        out[f"average/{key}"] = float(np.mean(defined)) if defined else np.nan, sum(count for _, count in values)
    return out


def _pairs(human: np.ndarray, values: np.ndarray, contexts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of each row: the pairs that it is the better rated of (the other one answers the same turns), and how many of
    them `values` order so; a tie is half right."""
    right, count = np.zeros((2, len(human)))
    order = np.argsort(contexts, kind="stable")
    for group in np.split(order, np.flatnonzero(contexts[order][1:] != contexts[order][:-1]) + 1):
        better = human[group][:, None] > human[group][None]
        sign = np.sign(values[group][:, None] - values[group][None])
        count[group] = better.sum(1)
        right[group] = np.where(better, (sign + 1) / 2, 0).sum(1)
    return right, count


def _partial(x: np.ndarray, length: np.ndarray, y: np.ndarray) -> float:
    """Correlation of x and length, both less their means at each human rating; NaN where undefined."""
    _, group = np.unique(y, return_inverse=True)
    counts = np.maximum(np.bincount(group), 1) if len(group) else np.ones(1)
    x, length = (z - (np.bincount(group, z) / counts)[group] for z in (x, length))
    found = correlation(x, length)
    return np.nan if found is None else found


def _named(conversation: Conversation, turn: int) -> dict:
    """What names a row; the message tells the two responses of a pair apart."""
    id = conversation.turns[turn].id
    return {"id": conversation.id, "turn": turn, **({"message": id} if id else {})}


def _row(place, predicted: Mapping[str, float], guesses: Mapping, raters: Mapping, schema: Schema) -> dict:
    conversation, turn = place
    said = conversation.turns[turn]
    ratings = {name: float(said.ratings[name]) for name in schema.names if name in said.ratings}
    sides = {"human": ratings, PREDICTED: predicted}
    for who, values in guesses.items():
        sides[who] = {n: float(v) for n, v in zip(schema.names, values, strict=True) if np.isfinite(v)}
    last = all(later.role != "assistant" for later in conversation.turns[turn + 1 :])  # a row's lists are of it
    own = raters.get((conversation.file, conversation.line)) if last else None
    return {
        "prompt": prompt_key(conversation), "characters": len(said.content),
        "context": context_key(conversation.system, conversation.turns[:turn]),
        "ratings": ratings, "predicted_ratings": sides[PREDICTED], "baselines": {who: sides[who] for who in guesses},
        "whole": {who: {n: float(whole(v, schema[n])) for n, v in each.items()} for who, each in sides.items()},
        **({"raters": own} if own else {}),
    }  # fmt: skip


def _raters(sources: Sequence[str], schema: Schema) -> dict[tuple[str, int], dict[str, list[float]]]:
    """Of each row with lists of ratings, by file and line; these rows were read, and so checked, before."""
    found = {}
    for source in sources:
        for line, row in iter_rows(source):
            if isinstance(row, dict):
                lists = {name: row[name] for name in schema.names if isinstance(row.get(name), list)}
                found |= {(source, line): lists} if lists else {}
    return found


def _ratings(turns: Sequence, schema: Schema) -> np.ndarray:
    return _ratings_of([{"ratings": turn.ratings} for turn in turns], "ratings", schema)


def _ratings_of(rows: Sequence[Mapping], key: str, schema: Schema) -> np.ndarray:
    """[E, A], NaN where there is none."""
    values = [[row[key].get(name, np.nan) for name in schema.names] for row in rows]
    return np.array(values, np.float64).reshape(-1, len(schema))


def _column(values) -> np.ndarray:
    return np.array([np.nan if value is None else value for value in values], np.float64)
