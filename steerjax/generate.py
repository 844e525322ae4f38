"""Answers steered by ratings.

steerjax generate --model DIR --prompt TEXT --attributes helpfulness=4,verbosity=1
steerjax generate --model DIR --prompt TEXT --sweep verbosity=0..4
steerjax generate --model DIR --input FILE --output FILE.jsonl [--samples N]

Attributes and their ranges are the model's; those that are not named have its default ratings. A file's rows are
conversations that end with a user turn (docs/formats.md), or {"prompt": ...}. An interrupted job goes on where it was,
run again. With --server URL an OpenAI-compatible server that serves an exported model answers instead.

Bootstrapping (step 4 of SteerLM, docs/steerlm.md): --combinations FILE asks for a combination of ratings that FILE has
at top quality, drawn anew for each row, and samples with top-k 50.
"""

import argparse
import sys
from collections.abc import Sequence

from steerjax.command import KEY, MODEL, add_model_options, add_row_options, resumable_command
from steerjax.errors import ConfigError
from steerjax.schema import SCHEMAS


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="steerjax generate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", metavar="DIR", help=MODEL)
    add("--prompt", metavar="TEXT", help="the prompt to answer; - reads it from standard input")
    add("--system", metavar="TEXT", help="system text of conversations that have none")
    add("--input", metavar="FILE", help="rows: a file, hub:... or embedded:...")
    add("--output", metavar="FILE", help=".jsonl; a row for each setting and sample, with what was asked for")
    add(
        "--attributes",
        default="",
        metavar="NAME=N,...",
        help="what to ask for; NAME=none leaves one out, none alone all",
    )
    add(
        "--sweep", action="append", default=[], metavar="NAME[=LOW..HIGH]", help="an answer for each rating; repeatable"
    )
    add("--samples", type=int, default=1, metavar="N", help="answers to each prompt and setting")
    add("--temperature", type=float, metavar="T", help="0 is greedy, the default; 1 with --samples, --top-k, --top-p")
    add("--top-k", type=int, metavar="K", help="draw from the K most likely tokens")
    add("--top-p", type=float, default=1.0, metavar="P", help="draw from the most likely tokens that add up to P")
    add("--seed", type=int, default=0, help="the same seed gives the same text, whatever the batch")
    add("--max-new-tokens", type=int, default=512, metavar="N", help="an answer is cut there; default 512")
    add("--batch-size", type=int, default=8, metavar="N", help="answers at a time, or requests to a server; default 8")
    add("--combinations", metavar="FILE", help="bootstrapping: rated conversations whose best ratings are asked for")
    add("--quality", metavar="NAME", help="what is best there; default quality, helpfulness or the first attribute")
    add("--replace-answer", action="store_true", help="drop answers that rows end with; each prompt is answered once")
    add("--schema", choices=SCHEMAS, help="attributes of a model that does not name them")
    add("--server", metavar="URL", help=f"e.g. http://localhost:8000, and --model the folder it serves; {KEY}")
    add("--server-model", metavar="NAME", help="which of the server's models; default: the only one")
    add_row_options(parser)
    add_model_options(parser)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse_arguments(arguments)
    with resumable_command():
        check_options(options)
        from steerjax.inference.session import Session

        session = Session(options)
        if options.prompt is None:
            session.answer_file()
        else:
            session.answer_prompt(sys.stdin.read() if options.prompt == "-" else options.prompt)


def check_options(o: argparse.Namespace) -> None:
    """Raises ConfigError: options that do not go together."""
    for holds, message in (
        (o.model or o.server, "neither --model nor --server; cure: one of them"),
        ((o.prompt is None) != (o.input is None), "either --prompt or --input; cure: one of them"),
        ((o.input is None) == (o.output is None), "--input and --output go together; cure: both, or --prompt"),
        (not (o.combinations and (o.attributes or o.sweep or o.prompt is not None)),
         "--combinations says what is asked for, row by row; cure: --input, without --attributes and --sweep"),
        (o.samples >= 1 and o.batch_size >= 1, "--samples or --batch-size below 1; cure: at least 1"),
        (o.samples == 1 or o.temperature != 0, "--samples with --temperature 0: all would be equal; cure: one of them"),
    ):  # fmt: skip
        if not holds:
            raise ConfigError(message)


if __name__ == "__main__":
    main()
