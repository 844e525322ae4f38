"""Measures a model.

steerjax evaluate --suite attributes --model DIR --data FILE [--train-data FILE] --output DIR
steerjax evaluate --suite steerability --input ANSWERS.jsonl [--reward-model DIR] --output DIR

`--suite NAME --help` lists the options of a suite. The output holds metrics.json and the suite's plots and tables.
"""

import argparse
import importlib
from collections.abc import Sequence
from pathlib import Path

from steerjax.errors import ConfigError, reported_errors
from steerjax.report.records import write_json

SUITES = ("attributes", "steerability")  # modules of `evaluation`


def main(arguments: Sequence[str] | None = None) -> None:
    with reported_errors():
        chosen = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        chosen.add_argument("--suite")
        name = chosen.parse_known_args(arguments)[0].suite
        if name not in (None, *SUITES):
            raise ConfigError(f"--suite {name}: there is no such suite; cure: one of {', '.join(SUITES)}")
        suite = importlib.import_module(f"steerjax.evaluation.{name}") if name else None
        parser = argparse.ArgumentParser(
            prog="steerjax evaluate", description=suite.__doc__ if suite else __doc__,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )  # fmt: skip
        parser.add_argument("--suite", required=True, metavar="NAME", help=f"one of: {', '.join(SUITES)}")
        parser.add_argument("--output", required=True, type=Path, metavar="DIR", help="files there are replaced")
        if suite:
            suite.add_options(parser)
        options = parser.parse_args(arguments)
        metrics = suite.run(options)
        given = {key: str(value) if isinstance(value, Path) else value for key, value in vars(options).items()}
        write_json(options.output / "metrics.json", {"suite": name, "options": given, **metrics})


if __name__ == "__main__":
    main()
