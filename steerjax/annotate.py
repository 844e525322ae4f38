"""Adds a reward model's ratings to the assistant's turns of conversations.

steerjax annotate --model DIR --input FILE --output FILE.jsonl [--turns last] [--part I/N]

The output has the input's rows in order, in the conversation format (docs/formats.md). A turn that is rated gets
`predicted_ratings` and `predicted_label`, in place of any that it had; all else stays. An interrupted job goes on where
it was, run again. Turns that do not fit a row are listed in OUTPUT.skipped.jsonl, and have no prediction.

With --part 2/8, for one of eight processes or hosts, the rows go to OUTPUT.part-2-of-8.jsonl. All parts one after the
other (`cat`) are what one process would have written.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from steerjax.command import MODEL, add_scoring_options, resumable_command
from steerjax.errors import ConfigError


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="steerjax annotate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", required=True, metavar="DIR", help=MODEL)
    add("--input", required=True, metavar="FILE", help="conversations in any format: a file, embedded:... or hub:...")
    add("--output", required=True, metavar="FILE", type=Path, help="a .jsonl file")
    add("--turns", choices=("all", "last"), default="all", help="which of the assistant's turns; default all")
    add("--part", default="1/1", metavar="I/N", help="only the I-th of N parts, from 1")
    size = "input rows that are packed together, and lost when interrupted; default 128 times --rows"
    add("--chunk-rows", type=int, default=0, metavar="N", help=size)
    add_scoring_options(parser)
    options = parser.parse_args(arguments)
    with resumable_command():
        number, parts = parse_part(options.part)
        if options.chunk_rows < 0:
            raise ConfigError(f"--chunk-rows {options.chunk_rows}; cure: at least 1, or 0 for the default")
        from steerjax.inference.annotation import annotate

        annotate(options, number, parts)


def parse_part(text: str) -> tuple[int, int]:
    """`2/8` as (2, 8). Raises ConfigError: anything else."""
    number, _, parts = text.partition("/")
    if not (number.isdecimal() and parts.isdecimal() and 1 <= int(number) <= int(parts)):
        raise ConfigError(f"--part {text}; cure: I/N with I from 1 to N, e.g. 2/8")
    return int(number), int(parts)


if __name__ == "__main__":
    main()
