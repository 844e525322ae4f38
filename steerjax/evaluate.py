"""Measures a model.

python -m steerjax.evaluate --suite attributes --model DIR --data FILE [--train-data FILE] --output DIR
python -m steerjax.evaluate --suite steerability --input ANSWERS.jsonl [--reward-model DIR] --output DIR

attributes: a reward model's predictions against people's ratings, beside two trivial predictors that are fitted on
--train-data. steerability: answers of `generate` (and, with a reward model or after `annotate`, their predicted
ratings) against the ratings that were asked for.

The output holds metrics.json, plots, and for attributes report.md and predictions.jsonl.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from steerjax.command import add_scoring_options, open_scorer
from steerjax.errors import ConfigError, DataError, reported_errors
from steerjax.schema import STEERLM

if TYPE_CHECKING:
    import numpy as np

    from steerjax.data.conversation import Conversation
    from steerjax.data.loading import Skipped
    from steerjax.evaluation.steerability import Steered


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m steerjax.evaluate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--suite", required=True, metavar="NAME", help=f"one of: {', '.join(SUITES)}")
    add("--output", required=True, metavar="DIR", type=Path, help="a folder; files of an earlier report are replaced")
    add("--model", metavar="DIR", help="attributes: a run's folder, checkpoints/STEP, a Hugging Face folder, a hub id")
    add("--data", action="append", metavar="FILE", help="attributes: rated conversations; may stand several times")
    add("--train-data", action="append", default=[], metavar="FILE", help="attributes: to fit the baselines on")
    add("--input", metavar="FILE", help="steerability: what generate, or annotate after it, wrote")
    add("--reward-model", metavar="DIR", help="steerability: rates the answers, in place of ratings that they have")
    add_scoring_options(parser)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse_arguments(arguments)
    with reported_errors():
        if options.suite not in SUITES:
            raise ConfigError(f"--suite {options.suite}: there is no such suite; cure: one of {', '.join(SUITES)}")
        run, needed = SUITES[options.suite]
        for name in needed:
            if not vars(options)[name]:
                raise ConfigError(f"--suite {options.suite} needs --{name.replace('_', '-')}; see --help")
        run(options)


def evaluate_attributes(options: argparse.Namespace) -> None:
    """A reward model against people.

    Raises:
        SteerjaxError: a model or data that do not fit.
    """
    from steerjax.data.loading import write_skipped
    from steerjax.inference.scorer import predict, reading_schema
    from steerjax.report.page import evaluate_predictions, format_table, require_matplotlib, write_report
    from steerjax.report.results import average_mse

    require_matplotlib()
    scorer = open_scorer(options.model, options)
    names, schema = scorer.schema.names, reading_schema(scorer.schema)
    conversations, skipped = _load(options.data, schema, options)
    rated = [_rated_turns(conversation, names) for conversation in conversations]
    examples, predicted = predict(scorer, conversations, rated, skipped, skip=options.on_bad_row == "skip")
    if not examples:
        raise DataError("no rated response to evaluate", file=options.data[0], cure=f"rate {' or '.join(names)}")
    train = _load(options.train_data, schema, options)[0] if options.train_data else []
    trained = [(conversation, turn) for conversation in train for turn in _rated_turns(conversation, names)]
    result = evaluate_predictions(
        names, predicted, *_ratings(examples, names), _lengths(examples), [c.id for c, _ in examples],
        *_ratings(trained, names), _lengths(trained),
    )  # fmt: skip
    summary = {
        "model": str(scorer.description.path),
        "data": ", ".join(options.data),
        "baselines fitted on": ", ".join(options.train_data) or "nothing",
        "responses": f"{len(examples)} rated, {len(skipped)} rows or turns left out",
    }
    write_report(options.output, result, [], summary, json.dumps(_options(options), indent=2))
    listing = options.output / "skipped.jsonl"
    listing.unlink(missing_ok=True)
    if skipped:
        write_skipped(listing, skipped)
    _write_metrics(options, {
        "responses": len(examples), "skipped": len(skipped), "attributes": result.metrics,
        "baselines": dict(result.baselines), "average_mse": average_mse(result),
    })  # fmt: skip
    print(format_table(result))
    print(f"\n{scorer.counts}")
    if skipped:
        print(f"{len(skipped)} rows or turns were left out, listed in {listing}")
    print(f"report with plots: {options.output / 'report.md'}")


def evaluate_steerability(options: argparse.Namespace) -> None:
    """Answers against what was asked for.

    Raises:
        SteerjaxError: rows that are no answers, or a model that does not fit.
    """
    from steerjax.evaluation.steerability import format_steerability, plot_steerability, read_answers, steerability
    from steerjax.report.plots import require_matplotlib

    require_matplotlib()
    schema, answers = STEERLM, list(read_answers(options.input))
    if options.reward_model:
        answers = _with_predictions(answers, options)
    answers = [answer for answer, _ in answers]
    if not any(answer.requested for answer in answers):
        raise DataError("no answer to a request", file=options.input, cure="give what generate wrote")
    result = steerability(answers, schema)
    options.output.mkdir(parents=True, exist_ok=True)
    for name in result["attributes"]:
        plot_steerability(answers, name, options.output / f"steerability_{name}.png")
    _write_metrics(options, result)
    print(format_steerability(result))
    print(f"\nmetrics and plots are in {options.output}")


def _with_predictions(answers: list[tuple[Steered, Conversation | None]], options) -> list:
    """The answers with the reward model's ratings in place of any that they had."""
    from steerjax.inference.scorer import predict

    scorer = open_scorer(options.reward_model, options)
    conversations = [conversation for _, conversation in answers if conversation is not None]
    skipped: list[Skipped] = []
    turns = [[len(conversation.turns) - 1] for conversation in conversations]
    examples, predicted = predict(scorer, conversations, turns, skipped, skip=options.on_bad_row == "skip")
    ratings = {
        conversation.line: dict(zip(scorer.schema.names, map(float, values), strict=True))
        for (conversation, _), values in zip(examples, predicted, strict=True)
    }
    for entry in skipped:
        print(f"no prediction for {entry.file}:{entry.line}: {entry.reason}")
    return [
        (replace(answer, predicted=ratings.get(conversation.line) if conversation else None), conversation)
        for answer, conversation in answers
    ]


def _load(sources: Sequence[str], schema, options):
    from steerjax.data.loading import load_conversations

    # The same answer with the same ratings twice is two samples of one model (HelpSteer has such rows).
    return load_conversations(
        sources, schema, format=options.format, on_bad_row=options.on_bad_row, on_duplicate="keep"
    )  # fmt: skip


def _rated_turns(conversation: Conversation, names: Sequence[str]) -> list[int]:
    """Turns with a rating of one of the attributes."""
    return [i for i, turn in enumerate(conversation.turns) if any(name in (turn.ratings or {}) for name in names)]


def _ratings(examples: Sequence[tuple[Conversation, int]], names: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Human ratings [E, A], 0 where missing, and where they are."""
    import numpy as np

    rated = [conversation.turns[turn].ratings for conversation, turn in examples]
    values = np.array([[ratings.get(name, 0.0) for name in names] for ratings in rated], np.float64)
    mask = np.array([[name in ratings for name in names] for ratings in rated], bool)
    return values.reshape(-1, len(names)), mask.reshape(-1, len(names))


def _lengths(examples: Sequence[tuple[Conversation, int]]) -> list[int]:
    return [len(conversation.turns[turn].content) for conversation, turn in examples]


def _options(options: argparse.Namespace) -> dict:
    return {name: str(value) if isinstance(value, Path) else value for name, value in vars(options).items()}


def _write_metrics(options: argparse.Namespace, metrics: dict) -> None:
    """Writes metrics.json; a number that is not finite is null."""
    whole = {"suite": options.suite, "options": _options(options), **metrics}
    finite = json.loads(json.dumps(whole), parse_constant=lambda _: None)
    text = json.dumps(finite, indent=2, ensure_ascii=False)
    (options.output / "metrics.json").write_text(text + "\n", encoding="utf-8")


Suite = tuple[Callable[[argparse.Namespace], None], tuple[str, ...]]
SUITES: dict[str, Suite] = {  # name -> (what runs it, options that it needs)
    "attributes": (evaluate_attributes, ("model", "data")),
    "steerability": (evaluate_steerability, ("input",)),
}


if __name__ == "__main__":
    main()
