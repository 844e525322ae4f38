"""A reward model's predictions against people's ratings, beside two trivial predictors fitted on --train-data.

The output holds metrics.json, report.md, plots, predictions.jsonl and skipped.jsonl (the rows that were left out).
"""

import argparse
from collections.abc import Sequence

from steerjax.command import MODEL, add_scoring_options
from steerjax.data.conversation import Turn
from steerjax.errors import DataError


def add_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--model", required=True, metavar="DIR", help=MODEL)
    add("--data", required=True, action="append", metavar="FILE", help="rated conversations; may stand several times")
    add("--train-data", action="append", default=[], metavar="FILE", help="to fit the baselines on")
    add_scoring_options(parser)


def run(options: argparse.Namespace) -> dict:
    """Writes the report and prints its table.

    Returns `responses` and `skipped`, numbers; `attributes` and `baselines`, see `EvaluationResult`; `average_mse`.
    """
    from steerjax.data.loading import load_conversations, write_skipped
    from steerjax.inference.scorer import open_scorer, predict, reading_schema
    from steerjax.report.page import format_table, write_report
    from steerjax.report.plots import require_matplotlib
    from steerjax.report.results import evaluate_predictions

    require_matplotlib()
    scorer = open_scorer(options.model, options)
    names, schema, how = scorer.schema.names, reading_schema(scorer.schema), options.on_bad_row

    def load(files: Sequence[str]):
        """Conversations, the places of their turns with a rating of one of the attributes, and what was left out."""
        if not files:
            return [], [], []
        loaded = load_conversations(files, schema, format=options.format, on_bad_row=how)
        rated = [[i for i, t in enumerate(c.turns) if set(names) & set(t.ratings or ())] for c in loaded.conversations]
        return loaded.conversations, rated, loaded.skipped

    conversations, turns, skipped = load(options.data)
    trained = [c.turns[turn] for c, rated in zip(*load(options.train_data)[:2], strict=True) for turn in rated]
    rated, predicted, refused = predict(scorer, conversations, turns, skip=how == "skip")
    skipped += refused
    if not rated and refused:
        what = f"all {len(refused)} rated responses were left out, the first of them: {refused[0].reason}"
        raise DataError(what, file=refused[0].file, line=refused[0].line, cure="a larger --row-length, or other rows")
    if not rated:
        raise DataError("no rated response to evaluate", file=options.data[0], cure=f"rate {' or '.join(names)}")
    tested, ids = [conversations[c].turns[turn] for c, turn in rated], [conversations[c].id for c, _ in rated]
    result = evaluate_predictions(scorer.schema, predicted, *_arrays(tested, names), ids, *_arrays(trained, names))
    summary = {
        "model": scorer.description.path,
        "data": ", ".join(options.data),
        "baselines fitted on": ", ".join(options.train_data) or "nothing",
        "responses": f"{len(rated)} rated, {len(skipped)} rows or turns left out",
    }
    write_report(options.output, result, [], summary, "\n".join(f"{k}: {v}" for k, v in vars(options).items()))
    write_skipped(options.output / "skipped.jsonl", skipped)
    print(f"{format_table(result)}\n\n{scorer.counts}\n{len(skipped)} rows or turns left out (skipped.jsonl)")
    print(f"report with plots: {options.output / 'report.md'}")
    return {
        "responses": len(rated), "skipped": len(skipped), "attributes": result.metrics,
        "baselines": result.baselines, "average_mse": result.average_mse(),
    }  # fmt: skip


def _arrays(turns: Sequence[Turn], names: Sequence[str]) -> tuple:
    """Human ratings [E, A], NaN where there is none, and the characters of each response."""
    import numpy as np

    values = np.array([[turn.ratings.get(name, np.nan) for name in names] for turn in turns]).reshape(-1, len(names))
    return values, [len(turn.content) for turn in turns]
