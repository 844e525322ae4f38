"""Adds a reward model's ratings to the assistant's turns of conversations.

steerjax annotate --model DIR --input FILE --output FILE.jsonl [--turns last] [--part I/N]

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

from steerjax.command import add_scoring_options, open_scorer
from steerjax.errors import ConfigError, reported_errors


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="steerjax annotate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
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
    """Looks at all rows, then annotates them, or this process's part; joins the parts if this was the last.

    Raises:
        SteerjaxError: options, rows or a model that do not fit.
    """
    from steerjax.bundle import describe
    from steerjax.data.loading import file_hashes
    from steerjax.inference import annotation
    from steerjax.inference.scorer import model_schema, reading_schema

    o, (number, parts) = options, parse_part(options.part)
    if o.chunk_rows < 0:
        raise ConfigError(f"--chunk-rows {o.chunk_rows}; cure: at least 1, or 0 for the default")
    schema = reading_schema(model_schema(describe(o.model, template=o.template)))
    source = annotation.Source(o.input, o.format, schema, o.turns == "last", o.on_bad_row == "skip")
    rows = source.check()
    scorer = open_scorer(o.model, o)
    size = o.chunk_rows or 128 * scorer.rows
    settings = {
        "command": "annotate", "source": o.input, "input": file_hashes([o.input])[o.input],
        "model": annotation.model_digest(scorer.description.path), "attributes": scorer.schema.to_json(),
        "turns": o.turns, "format": o.format, "template": o.template, "dtype": o.dtype,
        "row_length": scorer.row_length, "rows": scorer.rows, "chunk_rows": size,
    }  # fmt: skip
    output, part = annotation.part_path(o.output, number, parts), annotation.part_rows(rows, size, number, parts)
    annotation.run(source, scorer, part, output, settings | {"part": f"{number}/{parts}"}, size)
    if parts > 1:
        annotation.join_parts(o.output, parts, settings)


def parse_part(text: str) -> tuple[int, int]:
    """`2/8` as (2, 8).

    Raises:
        ConfigError: anything else.
    """
    number, _, parts = text.partition("/")
    if not (number.isdecimal() and parts.isdecimal() and 1 <= int(number) <= int(parts)):
        raise ConfigError(f"--part {text}; cure: I/N with I from 1 to N, e.g. 2/8")
    return int(number), int(parts)


if __name__ == "__main__":
    main()
