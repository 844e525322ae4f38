"""Adds a reward model's ratings to the assistant's turns of conversations.

python -m steerjax.annotate --model DIR --input FILE --output FILE.jsonl [--turns last] [--part I/N]

The output has the input's rows in order, in the conversation format (docs/formats.md). A turn that is rated gets
`predicted_ratings` and `predicted_label`, in place of any that it had; all else stays. An interrupted job goes on where
it was, run again. Turns that do not fit a row are listed in OUTPUT.skipped.jsonl, and have no prediction.

With --part 2/8, for one of eight processes or hosts, the rows go to OUTPUT.part-2-of-8.jsonl. Whoever finishes last
joins the parts: OUTPUT is then what one process would have written.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from steerjax.command import add_scoring_options, open_scorer
from steerjax.errors import ConfigError, DataError, reported_errors

if TYPE_CHECKING:
    from steerjax.inference.scorer import Scorer


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m steerjax.annotate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", required=True, metavar="DIR", help="a run's folder, checkpoints/STEP, a Hugging Face folder, or "
        "a hub id")  # fmt: skip
    add("--input", required=True, metavar="FILE", help="conversations in any format: a file, embedded:... or hub:...")
    add("--output", required=True, metavar="FILE", type=Path, help="a .jsonl file")
    add("--turns", choices=("all", "last"), default="all", help="which of the assistant's turns; default all")
    add("--part", default="1/1", metavar="I/N", help="only the I-th of N parts, from 1")
    add("--chunk-rows", type=int, default=0, metavar="N",
        help="input rows that are packed together, and lost when interrupted; default 128 times --rows")  # fmt: skip
    add_scoring_options(parser)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse_arguments(arguments)
    try:
        with reported_errors():
            annotate(options)
    except KeyboardInterrupt:
        sys.exit("interrupted; the same command goes on from here")


def annotate(options: argparse.Namespace) -> None:
    """Annotates the input, or this process's part of it; joins the parts if this was the last.

    Raises:
        SteerjaxError: options, rows or a model that do not fit.
    """
    from steerjax.data.readers import iter_rows
    from steerjax.inference import annotation

    number, parts = parse_part(options.part)
    if options.chunk_rows < 0:
        raise ConfigError(f"--chunk-rows {options.chunk_rows}; cure: at least 1, or 0 for the default")
    rows = sum(1 for _ in iter_rows(options.input))
    if not rows:
        raise DataError("no row in it", file=options.input, cure="check that this is the file you meant")
    scorer = open_scorer(options.model, options)
    job = annotation.Job(
        options.input, options.format, rows, options.chunk_rows or 128 * scorer.rows,
        last_turn_only=options.turns == "last", skip=options.on_bad_row == "skip",
    )  # fmt: skip
    settings = job_settings(options, scorer, job.chunk_rows)
    output = annotation.part_path(options.output, number, parts)
    annotation.run(job, scorer, job.part(number, parts), output, settings | {"part": f"{number}/{parts}"})
    if parts > 1:
        annotation.join_parts(options.output, parts, settings)


def parse_part(text: str) -> tuple[int, int]:
    """`2/8` as (2, 8).

    Raises:
        ConfigError: anything else.
    """
    number, _, parts = text.partition("/")
    if not (number.isdigit() and parts.isdigit() and 1 <= int(number) <= int(parts)):
        raise ConfigError(f"--part {text}; cure: I/N with I from 1 to N, e.g. 2/8")
    return int(number), int(parts)


def job_settings(options: argparse.Namespace, scorer: Scorer, size: int) -> dict:
    """All that the output depends on."""
    from steerjax.data.loading import file_hashes
    from steerjax.inference.annotation import model_digest

    o = options
    return {
        "command": "annotate", "source": o.input, "input": file_hashes([o.input])[o.input],
        "model": model_digest(scorer.description.path), "attributes": list(scorer.schema.names), "turns": o.turns,
        "format": o.format, "on_bad_row": o.on_bad_row, "control_strings": o.control_strings, "template": o.template,
        "dtype": o.dtype, "row_length": scorer.row_length, "rows": scorer.rows, "chunk_rows": size,
    }  # fmt: skip


if __name__ == "__main__":
    main()
