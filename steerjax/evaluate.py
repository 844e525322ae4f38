"""Measures a model.

steerjax evaluate --suite attributes --model DIR --data FILE [--train-data FILE] --output DIR
steerjax evaluate --suite NAME --help
steerjax evaluate --compare DIR DIR ... --output DIR

The output holds results.json (every figure with its number of rows and 95% interval), report.html, report.md, plots
and, where a suite has rows, rows.jsonl. An interrupted suite goes on where it was, run again. --compare puts outputs of
one suite side by side, with paired differences to the first.
"""

import argparse
import importlib
from collections.abc import Sequence
from pathlib import Path

from steerjax.command import resumable_command
from steerjax.errors import ConfigError
from steerjax.evaluation import SUITES


def main(arguments: Sequence[str] | None = None) -> None:
    with resumable_command():
        chosen = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        chosen.add_argument("--suite")
        chosen.add_argument("--compare", nargs="+")
        known = chosen.parse_known_args(arguments)[0]
        name = known.suite
        if name not in (None, *SUITES):
            raise ConfigError(f"--suite {name}: there is no such suite; cure: one of {', '.join(SUITES)}")
        suite = importlib.import_module(f"steerjax.evaluation.{name}") if name else None
        parser = argparse.ArgumentParser(
            prog="steerjax evaluate", description=suite.__doc__ if suite else __doc__,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )  # fmt: skip
        parser.add_argument("--output", required=True, type=Path, metavar="DIR", help="folder of the results")
        if known.compare:
            from steerjax.evaluation.compare import compare

            parser.add_argument("--compare", required=True, nargs="+", type=Path, metavar="DIR")
            options = parser.parse_args(arguments)
            compare(options.compare, options.output)
            return
        parser.add_argument("--suite", required=True, metavar="NAME", help=f"one of: {', '.join(SUITES)}")
        if suite is None:
            parser.add_argument("--compare", nargs="+", metavar="DIR", help="outputs of one suite, in place of --suite")
            parser.parse_args(arguments)
        from steerjax.evaluation.suite import write_result
        from steerjax.report.plots import require_plots

        suite.add_options(parser)
        options = parser.parse_args(arguments)
        require_plots()
        result = suite.run(options)
        if result is None:  # it was only to say what it would do
            return
        write_result(options.output, name, SUITES[name], vars(options), result)
        print(f"{result.text}\n\nreport with plots: {options.output / 'report.html'}")


if __name__ == "__main__":
    main()
