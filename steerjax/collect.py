"""Collects ratings with Label Studio.

steerjax collect tasks --input PROMPTS --model DIR [--model DIR] [--server URL] --output DIR [-- OPTIONS OF generate]
steerjax collect tasks --answers FILE [--answers FILE] --output DIR
steerjax collect ratings --key DIR/key.json --export FILE --output DIR

`tasks` writes what to import into Label Studio, labelling_config.xml and tasks.json, which do not say which model an
answer is from, and key.json, which does: keep it from the raters. `ratings` reads the project's JSON export and writes
rows to train on, ratings.jsonl, and a report on how far the raters agree. docs/collecting.md is the whole walk.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from steerjax.command import KEY, resumable_command
from steerjax.errors import ConfigError
from steerjax.locks import only_writer
from steerjax.schema import SCHEMAS, Schema, make_schema


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    given = list(sys.argv[1:] if arguments is None else arguments)
    given, rest = (given[: given.index("--")], given[given.index("--") + 1 :]) if "--" in given else (given, [])
    form = {"formatter_class": argparse.RawDescriptionHelpFormatter}
    parser = argparse.ArgumentParser(prog="steerjax collect", description=__doc__, allow_abbrev=False, **form)
    commands = parser.add_subparsers(dest="what", required=True, metavar="tasks|ratings")
    add = commands.add_parser("tasks", help="answers -> a Label Studio project").add_argument
    add("--input", metavar="FILE", help="prompts, which models answer: a file, hub:... or embedded:...")
    add("--model", action="append", default=[], metavar="DIR", help="one that answers; repeatable")
    add("--server", action="append", default=[], metavar="URL", help=f"the same; repeatable; {KEY}")
    add("--samples", type=int, default=1, metavar="N", help="answers of each to a prompt; default 1")
    add("--answers", action="append", default=[], metavar="FILE", help="answers that are there already; repeatable")
    add("--schema", choices=SCHEMAS, help="what is rated; default: what the first model says, else helpsteer")
    add("--attribute", action="append", nargs="+", default=[], metavar=("NAME", "LOW HIGH MEANING"),
        help="one of your own, in place of the schema's; MEANING, which raters see, may be left out")  # fmt: skip
    add("--seed", type=int, default=0, help="of the order, and of sampling")
    add("--format", default="auto", metavar="NAME", help="of the rows (docs/formats.md); default: told from their keys")
    add("--on-bad-row", choices=("error", "skip"), default="error", help="skip lists them in a skipped.jsonl")
    add("--output", required=True, type=Path, metavar="DIR")
    add = commands.add_parser("ratings", help="Label Studio's export -> rows and a report").add_argument
    add("--key", required=True, type=Path, metavar="FILE", help="the key.json of the tasks")
    add("--export", required=True, action="append", metavar="FILE", help="Label Studio's JSON; repeatable")
    add("--helpsteer2", action="store_true", help="--least-raters 3 --agreeing 3 --max-spread 2")
    add("--least-raters", type=int, metavar="N", help="drop answers with fewer")
    add("--agreeing", type=int, metavar="N", help="of an answer keep the N raters that agree most")
    add("--max-spread", type=float, metavar="X", help="drop answers whose kept ratings are further apart")
    add("--by", metavar="NAME", help="the attribute that decides so; default helpfulness, else the first")
    add("--on-bad-row", choices=("error", "skip"), default="error", help="skip lists tasks in a skipped.jsonl")
    add("--output", required=True, type=Path, metavar="DIR", help="files there are replaced")
    options = parser.parse_args(given)
    options.rest = rest
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse_arguments(arguments)
    with resumable_command(), only_writer(options.output):
        {"tasks": tasks, "ratings": ratings}[options.what](options)


def tasks(o: argparse.Namespace) -> None:
    """Has models answer, each into a file of its own, and writes the project."""
    from steerjax.collection.tasks import CONFIG, KEY, TASKS, make_key, read_answers, write_project
    from steerjax.data.loading import Skipped, write_skipped

    for holds, message in (
        (o.answers or o.model or o.server, "no answers; cure: --input with --model or --server, or --answers"),
        (bool(o.input) == bool(o.model or o.server), "--input goes with --model or --server; cure: all, or --answers"),
        (o.model or o.server or not o.rest, "options after -- are for models that answer; cure: --model, or none"),
    ):  # fmt: skip
        if not holds:
            raise ConfigError(message)
    schema = schema_of(o)
    skipped: list[Skipped] = []
    answers = []
    for file, name in [*answered(o), *((file, "") for file in o.answers)]:
        answers += read_answers(file, schema, skipped, name=name, format=o.format, on_bad_row=o.on_bad_row)
    key = make_key(answers, schema, o.seed)
    write_project(o.output, key)
    if skipped:
        write_skipped(o.output / "skipped.jsonl", skipped)
    sources = len({answer.source["source"] for answer in answers})
    print(f"project {key.project}: {len(answers)} answers of {sources} sources, {len(key.tasks)} tasks"
          + (f", {len(answers) - len(key.tasks)} equal to another" if len(answers) > len(key.tasks) else "")
          + (f", {len(skipped)} rows skipped, listed in {o.output / 'skipped.jsonl'}" if skipped else ""))  # fmt: skip
    print(f"import into Label Studio: {o.output / CONFIG}, {o.output / TASKS}")
    print(f"keep from the raters: {o.output / KEY}")


def answered(o: argparse.Namespace) -> list[tuple[str, str]]:
    """(file of answers, source) of each model and server; what an earlier run has answered is not asked again."""
    from steerjax import generate

    files = []
    for flag, names in (("--model", o.model), ("--server", o.server)):
        for number, name in enumerate(names):
            file = str(o.output / "answers" / f"{flag[2:]}{number}.jsonl")
            given = ["--input", o.input, "--output", file, "--samples", str(o.samples), "--seed", str(o.seed)]
            given += ["--format", o.format, "--on-bad-row", o.on_bad_row]
            print(f"{name} answers")
            generate.main([flag, name, *given, *o.rest])
            files.append((file, name))
    return files


def schema_of(o: argparse.Namespace) -> Schema:
    """Raises ConfigError: an attribute that is none."""
    try:
        own = [(name, float(low), float(high), *words) for name, low, high, *words in o.attribute]
    except ValueError:
        cure = 'NAME LOW HIGH, e.g. clarity 1 5 "how easily it is understood"'
        raise ConfigError(f"--attribute {' '.join(o.attribute[-1])}: no name with its range; cure: {cure}") from None
    if not own and not o.schema and o.model:
        from steerjax import generate
        from steerjax.command import describe_model

        if known := describe_model(o.model[0], generate.parse_arguments(["--model", o.model[0], *o.rest])).schema:
            return known
    return make_schema(o.schema or "helpsteer", own)


def ratings(o: argparse.Namespace) -> None:
    """Reads exports, chooses, and writes rows and report."""
    from steerjax.collection.agreement import Rule
    from steerjax.collection.export import read_exports
    from steerjax.collection.report import ROWS, report
    from steerjax.collection.tasks import read_key
    from steerjax.evaluation.suite import write_result
    from steerjax.report.plots import require_plots

    require_plots()
    key = read_key(o.key)
    names = key.schema.names
    by = o.by or ("helpfulness" if "helpfulness" in names else names[0])
    least, agreeing, spread = (3, 3, 2.0) if o.helpsteer2 else (1, None, None)
    rule = Rule(
        key.schema[by].name,
        least if o.least_raters is None else o.least_raters,
        agreeing if o.agreeing is None else o.agreeing,
        spread if o.max_spread is None else o.max_spread,
    )
    result = report(o.output, key, read_exports(o.export, key, on_bad_row=o.on_bad_row), rule)
    given = {name: value for name, value in vars(o).items() if name not in ("what", "rest")}
    write_result(o.output, "collect", "Ratings that were collected, and how far raters agree", given, result)
    print(result.text, *(f"{name}: {value}" for name, value in result.summary.items()), sep="\n")
    print(f"rows: {o.output / ROWS}\nreport with a plot: {o.output / 'report.html'}")


if __name__ == "__main__":
    main()
