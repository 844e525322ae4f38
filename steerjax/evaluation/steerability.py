"""Does a chat model do what the requested ratings say?

steerjax evaluate --suite steerability --model CHAT --reward-model RM [--prompts FILE] --output DIR
steerjax evaluate --suite steerability --input FILE [--reward-model RM] --output DIR

The first form answers held-out prompts over a grid of requests, and --reward-model rates the answers; the second takes
what `generate` wrote, and the ratings that `annotate` added unless --reward-model is given. The figures: response
curves of predicted ratings and of the text (characters, words, Flesch-Kincaid grade), slopes, leakage into the other
attributes, the share of requests that are met, and STEERBENCH's measures (arXiv 2505.23816).

Steering is measured from the neutral request: the model's default ratings with --attributes over them or, of a file,
the most common request. STEERBENCH's source is the prediction for the same prompt's answer to that request; its target
is the requested rating, for the attributes whose requested rating is another than the neutral one.
"""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from steerjax.command import KEY, MODEL, add_scoring_options, describe_model
from steerjax.data.loading import Skipped, file_hashes
from steerjax.errors import ConfigError, DataError
from steerjax.evaluation.pages import request_words, write_pages
from steerjax.evaluation.steering_answers import (
    SteeredAnswer,
    generate_answers,
    neutral_request,
    read_answers,
    requested_schema,
)
from steerjax.evaluation.steering_measures import columns, measure, trends
from steerjax.evaluation.steering_report import Found, draw, report_text
from steerjax.evaluation.suite import Result, kept_rows
from steerjax.evaluation.text_measures import flesch_kincaid, text_measures
from steerjax.report.figures import figures
from steerjax.schema import SCHEMAS, Attribute, Schema, round_rating

__all__ = ["add_options", "columns", "measure", "run"]


def add_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--input", metavar="FILE", help="what generate, or annotate after it, wrote, in place of --prompts")
    add("--model", metavar="DIR", help=f"the chat model: {MODEL}; with --input for its attributes alone")
    add("--server", metavar="URL", help=f"answers in place of --model, e.g. http://localhost:8000; {KEY}")
    add("--server-model", metavar="NAME", help="default: the one model that it serves")
    add("--reward-model", metavar="DIR", help="rates the answers")
    add("--prompts", default="embedded:helpsteer2", metavar="FILE", help="held-out ones; default embedded:helpsteer2")
    add("--limit", type=int, default=40, metavar="N", help="prompts to answer; default 40")
    grid = "ratings to ask for, the others neutral; repeatable; 'A=0,4 B=0,4' for all four; default each at 3 ratings"
    add("--grid", action="append", default=[], metavar="NAME=N,...", help=grid)
    add("--attributes", default="", metavar="NAME=N,...", help="the neutral request, over the model's default ratings")
    add("--system", metavar="TEXT", help="system text of prompts that have none")
    add("--max-new-tokens", type=int, default=256, metavar="N", help="an answer is cut there; default 256")
    add("--temperature", type=float, default=0.0, metavar="T", help="0 is greedy, the default")
    add("--seed", type=int, default=0)
    add("--batch-size", type=int, default=8, metavar="N", help="answers at a time, or requests to a server; default 8")
    add(
        "--schema",
        choices=SCHEMAS,
        help="a preset that has them; default: the model's, or told from the answers",
    )
    add_scoring_options(parser)
    add("--reward-template", help="of a reward model that does not name it; default: --template where that is alone")


def run(options: argparse.Namespace) -> Result:
    """Writes answers, plots and pages. Raises SteerjaxError: options that do not fit, rows that are no answers."""
    from steerjax.checksums import folder_checksum

    o = options
    _check(o)
    about = None
    if o.model:
        about = describe_model(o.model, o)
    source, made = (o.input, []) if o.input else generate_answers(o, about)
    answers, scorer = list(read_answers(source)), None
    if o.reward_model:
        from steerjax.inference.scorer import open_scorer

        template = o.reward_template or (None if o.model or o.server else o.template)
        scorer = open_scorer(o.reward_model, argparse.Namespace(**(vars(o) | {"template": template})))
    own = SCHEMAS[o.schema] if o.schema else about.schema if about and about.schema else None
    known = own or (scorer.schema if scorer else Schema(()))
    schema = requested_schema(answers, known)
    if not len(schema):
        raise DataError("no answer to a request", file=source, cure="give what generate wrote")
    space = goal_space(schema, known, scorer.schema if scorer else Schema(()))
    neutral = dict(_neutral(o, answers, schema))
    grade, which = flesch_kincaid()
    settings = {
        "suite": "steerability", "answers": file_hashes([source])[source],
        "reward_model": folder_checksum(scorer.description.path) if scorer else None,
        "ranges": [[a.name, a.low, a.high] for a in space.attributes], "neutral": neutral, "grade": which,
        "row_length": o.row_length, "dtype": o.dtype, "template": o.template, "reward_template": o.reward_template,
    }  # fmt: skip

    def compute(part: range) -> list[dict]:
        some = answers[part.start : part.stop]
        some = _rated(some, scorer, o.on_bad_row == "skip") if scorer else some
        return [measured(answer, space, neutral, grade) for answer in some]

    rows = kept_rows(o.output, settings, len(answers), compute, unit="answer")
    answers = [replace(answer, predicted=row["predicted"]) for answer, row in zip(answers, rows, strict=True)]
    table = columns(rows)
    found = Found(schema, space, neutral, table, figures(measure, table), trends(rows, table))
    rated = sum(bool(answer.predicted) for answer in answers)
    summary = {
        **({"chat model": o.server or o.model} if o.server or o.model else {}),
        "answers": f"{len(answers)} of {source}",
        "predicted ratings": f"{rated} answers, by {o.reward_model or 'what wrote the answers'}" if rated else "none",
        "neutral request": request_words(neutral), "Flesch-Kincaid grade": which,
        **({"generated": "; ".join(made)} if made else {}),
    }  # fmt: skip
    if told := [f"{a.name} {a.low:g} to {a.high:g}" for a in schema.attributes if a not in known.attributes]:
        summary["ranges told from the answers"] = f"{', '.join(told)}; --model or --schema knows them"
    return Result(
        found.figures, report_text(found), draw(found, o.output), summary, found.detail(),
        write_pages(answers, schema, neutral, o.output),
    )  # fmt: skip


def goal_space(requested: Schema, *known: Schema) -> Schema:
    """The attributes whose range is known, each once, those that were asked for first."""
    attributes: dict[str, Attribute] = {}
    for schema in (requested, *known):
        for attribute in schema.attributes:
            attributes.setdefault(attribute.name, attribute)
    return Schema(tuple(attributes.values()))


def measured(answer: SteeredAnswer, space: Schema, neutral: Mapping[str, float], grade) -> dict[str, Any]:
    """A row of rows.jsonl. `output`: the predicted ratings as 0 to 1 of their ranges; `goal`: likewise the requested
    ratings that are not the neutral ones, None where an attribute was to stay; `rounded`: predictions as whole ratings;
    `exact`: are they the request; `neutral`: this answers the neutral request."""
    asked, predicted = answer.requested, answer.predicted
    known = [a for a in space.attributes if a.name in predicted]

    def part(value: float, a: Attribute) -> float:
        return min(1.0, max(0.0, (value - a.low) / (a.high - a.low)))

    rounded = {a.name: round_rating(predicted[a.name], a) for a in known}
    changed = {name for name, rating in asked.items() if rating != neutral.get(name)}
    return {
        "id": answer.conversation.id, "prompt": answer.prompt, "requested": dict(asked), "predicted": dict(predicted),
        "rounded": rounded,
        "exact": {a.name: rounded[a.name] == round_rating(asked[a.name], a) for a in known if a.name in asked},
        "neutral": dict(asked) == dict(neutral),
        "goal": {a.name: part(asked[a.name], a) if a.name in changed else None for a in known},
        "output": {a.name: part(predicted[a.name], a) for a in known},
        **text_measures(answer.text, grade), "cut": answer.cut,
    }  # fmt: skip


def _check(o: argparse.Namespace) -> None:
    """Raises ConfigError: options that do not go together."""
    for holds, message in (
        (o.input or o.model or o.server, "neither answers nor a model; cure: --input, --model or --server"),
        (not (o.input and (o.grid or o.server)), "--input has its answers; cure: leave --grid and --server out"),
        (o.limit >= 1 and o.batch_size >= 1, "--limit or --batch-size below 1; cure: at least 1"),
    ):
        if not holds:
            raise ConfigError(message)


def _neutral(o: argparse.Namespace, answers: Sequence[SteeredAnswer], schema: Schema) -> Mapping[str, float]:
    """The request that steering is measured from. Raises ConfigError, as `parse_attributes`."""
    if not o.input:
        return answers[0].requested  # the grid begins with it
    from steerjax.inference.steering import label_of, parse_attributes

    given = parse_attributes(o.attributes, schema) if o.attributes else {}
    return label_of(given, neutral_request(answers, schema))


def _rated(answers: Sequence[SteeredAnswer], scorer, skip: bool) -> list[SteeredAnswer]:
    """The answers with the reward model's ratings in place of any that they had."""
    from steerjax.inference.scorer import predicted_ratings

    turns = [len(answer.conversation.turns) - 1 if answer.text else None for answer in answers]
    found = predicted_ratings(scorer, [answer.conversation for answer in answers], turns, skip=skip)
    for entry in found:
        if isinstance(entry, Skipped):
            print(f"no prediction for {entry.file}:{entry.line}: {entry.reason}")
    rated = [ratings if isinstance(ratings, dict) else {} for ratings in found]
    return [replace(answer, predicted=ratings) for answer, ratings in zip(answers, rated, strict=True)]
