"""Options that several commands share, each written once."""

import argparse
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from steerjax.errors import reported_errors
from steerjax.signals import INTERRUPTED, Interrupted, raises_interrupt

MODEL = "a run's folder, checkpoints/STEP, a Hugging Face folder, or a hub id"

KEY = "the key in OPENAI_API_KEY is sent there, if there is one, and not to where it redirects"


def add_model_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--template",
        help="chat template of a folder that does not name it: extra_id, chatml, llama3, llama2, source (its own)",
    )
    add(
        "--dtype",
        default="auto",
        choices=("auto", "float32", "bfloat16"),
        help="of the computation; auto: float32 on CPU, else bfloat16",
    )
    add(
        "--mesh",
        default="",
        metavar="AXIS=N,...",
        help="how devices are used, e.g. fsdp=2,tensor=4; default: each has a copy",
    )
    add_verify_option(parser)


def add_verify_option(parser: argparse.ArgumentParser) -> None:
    words = "do not compare a model's files with their checksums (opens faster, and damaged models too)"
    parser.add_argument("--no-verify", action="store_true", help=words)


def add_row_options(parser: argparse.ArgumentParser, formats: bool = True) -> None:
    """`formats`: rows may be in any of docs/formats.md."""
    add = parser.add_argument
    if formats:
        how = "layout of the rows (docs/formats.md); default: told from their keys"
        add("--format", default="auto", metavar="NAME", help=how)
    add("--on-bad-row", choices=("error", "skip"), default="error",
        help="error (default) stops; skip leaves them out and lists them in a skipped.jsonl")  # fmt: skip


def add_scoring_options(parser: argparse.ArgumentParser, formats: bool = True) -> None:
    """The options of commands that score conversations with a reward model; for `scorer.open_scorer`."""
    add_row_options(parser, formats)
    add_model_options(parser)
    add_packing_options(parser, "longer conversations are listed")


def add_packing_options(parser: argparse.ArgumentParser, longer: str) -> None:
    """Of packed rows; `longer` says what becomes of a text that no row holds."""
    add = parser.add_argument
    add(
        "--row-length",
        type=int,
        default=0,
        metavar="TOKENS",
        help=f"{longer}; default: the model's context, up to 4096",
    )
    add("--rows", type=int, default=0, metavar="N", help="packed rows a step; default 1 on a CPU, 8 a device elsewhere")


def describe_model(folder: str, options: argparse.Namespace):
    """The `Description` of a folder."""
    from steerjax.bundle import describe

    return describe(folder, template=options.template, verify=not options.no_verify)


def open_model(model, options: argparse.Namespace):
    """The `Bundle` of a folder, or of its `Description`, on the mesh of the options."""
    from steerjax.bundle import open_bundle
    from steerjax.parallel.mesh import parse_mesh

    how = {"template": options.template, "dtype": options.dtype, "verify": not options.no_verify}
    return open_bundle(model, parse_mesh(options.mesh), **how)


@contextmanager
def resumable_command() -> Iterator[None]:
    """Errors as `reported_errors` prints them; an interrupt has no traceback, and the status that shells give it."""
    try:
        with raises_interrupt(), reported_errors():
            yield
    except KeyboardInterrupt as stop:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        if not isinstance(stop, Interrupted):  # in a program of one's own
            sys.exit(INTERRUPTED)
        sys.stdout.flush()
        os._exit(stop.status)  # Python's own end may crash while a device is still at work
