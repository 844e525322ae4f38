"""What the command modules share: flags, errors without tracebacks, the compile cache."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from absl import app, flags, logging
from ml_collections import config_flags

from steerjax.config import Experiment, parse_mesh, resolve
from steerjax.errors import reported_errors

if TYPE_CHECKING:
    from steerjax.inference.scorer import Scorer


def run_command(main: Callable[[Experiment, Path], None], usage: str) -> None:
    """Parses `--config FILE --config.KEY=VALUE --workdir DIR`, calls `main(experiment, workdir)`, reports errors."""
    workdir = flags.DEFINE_string("workdir", None, "Folder of the run. Run again with the same folder, it resumes.")

    def run(experiment: Experiment) -> None:
        folder = Path(workdir.value).absolute()
        use_compile_cache(folder)
        main(experiment, folder)

    run_experiment(run, usage, required=("workdir",))


def run_experiment(main: Callable[[Experiment], None], usage: str, required: Sequence[str]) -> None:
    """Parses `--config FILE --config.KEY=VALUE` and the flags that are defined, calls `main(experiment)`.

    A SteerjaxError is printed without a traceback; the exit status is then 2.

    Args:
        usage: what --help shows.
        required: names of flags that must be given.
    """
    config = config_flags.DEFINE_config_file("config", None, "A recipe: a Python file with get_config().")
    flags.mark_flags_as_required(["config", *required])
    sys.modules["__main__"].__doc__ = usage  # what absl shows for --help

    def run(_) -> None:
        logging.set_verbosity(logging.WARNING)  # absl opens the tap for every library that logs
        with reported_errors():
            main(resolve(config.value.to_dict()))

    app.run(run, flags_parser=_parse_flags)


def _parse_flags(arguments: list[str]) -> list[str]:
    """absl's parser; a key that the config lacks is an error like any other (ml_collections raises AttributeError)."""
    try:
        return app.parse_flags_with_usage(arguments)
    except (AttributeError, KeyError, TypeError) as error:
        message = f"flags of the config: {error}\n  cure: the keys are in steerjax/config.py"
    except OSError as error:
        message = f"--config: {error}"
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


def use_compile_cache(workdir: Path) -> None:
    """Compiled steps are kept in the workdir (or where JAX_COMPILATION_CACHE_DIR says), so a resume starts fast."""
    import jax

    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        jax.config.update("jax_compilation_cache_dir", str(workdir / "compile_cache"))


def add_scoring_options(parser: argparse.ArgumentParser) -> None:
    """The options of commands that score conversations with a reward model; for `open_scorer`."""
    add = parser.add_argument
    add("--format", default="auto", metavar="NAME", help="of the rows (docs/formats.md); default: told from their keys")
    add("--on-bad-row", choices=("error", "skip"), default="error", help="skip lists them in a .skipped.jsonl")
    add("--control-strings", choices=("refuse", "escape"), default="refuse",
        help="what to do with a text that contains a control string of the template")  # fmt: skip
    add("--row-length", type=int, default=0, metavar="N",
        help="tokens; a longer conversation is listed, not cut; default: the model's context, up to 4096")  # fmt: skip
    add("--rows", type=int, default=0, metavar="N", help="packed rows a step; default 1 on a CPU, 8 a device elsewhere")
    add("--template", help="of a Hugging Face folder that does not name it: extra_id, chatml, llama3 or llama2")
    add("--dtype", default="auto", choices=("auto", "float32", "bfloat16"), help="of the computation")
    add("--mesh", default="", metavar="AXIS=N,...", help="e.g. fsdp=2,tensor=4; default all devices on data")


def open_scorer(model: str, options: argparse.Namespace) -> Scorer:
    """A reward model, ready to score.

    Raises:
        SteerjaxError: no such model, or options that do not fit it.
    """
    from steerjax.bundle.opening import open_model
    from steerjax.inference.scorer import Scorer

    o = options
    opened = open_model(model, parse_mesh(o.mesh), template=o.template, dtype=o.dtype)
    return Scorer(opened, row_length=o.row_length, rows=o.rows, control_strings=o.control_strings)
