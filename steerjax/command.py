"""What the command modules share: flags, errors without tracebacks, the compile cache."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

from absl import app, flags, logging
from ml_collections import config_flags

from steerjax.config import Experiment, resolve
from steerjax.errors import SteerjaxError


def run_command(main: Callable[[Experiment, Path], None], usage: str) -> None:
    """Parses `--config FILE --config.KEY=VALUE --workdir DIR`, calls `main(experiment, workdir)`, reports errors.

    A SteerjaxError is printed without a traceback; the exit status is then 2.
    """
    config = config_flags.DEFINE_config_file("config", None, "A recipe: a Python file with get_config().")
    workdir = flags.DEFINE_string("workdir", None, "Folder of the run. Run again with the same folder, it resumes.")
    flags.mark_flags_as_required(["config", "workdir"])
    sys.modules["__main__"].__doc__ = usage  # what absl shows for --help

    def run(_) -> None:
        logging.set_verbosity(logging.WARNING)  # absl opens the tap for every library that logs
        try:
            folder = Path(workdir.value).absolute()
            experiment = resolve(config.value.to_dict())
            use_compile_cache(folder)
            main(experiment, folder)
        except SteerjaxError as error:
            sys.exit(f"error: {error}")

    app.run(run, flags_parser=_parse_flags)


def _parse_flags(arguments: list[str]) -> list[str]:
    """absl's parser; a key that the config lacks is an error like any other (ml_collections raises AttributeError)."""
    try:
        return app.parse_flags_with_usage(arguments)
    except (AttributeError, KeyError, TypeError) as error:
        sys.exit(f"error: flags of the config: {error}\n  cure: the keys are in steerjax/config.py")
    except OSError as error:
        sys.exit(f"error: --config: {error}")


def use_compile_cache(workdir: Path) -> None:
    """Compiled steps are kept in the workdir (or where JAX_COMPILATION_CACHE_DIR says), so a resume starts fast."""
    import jax

    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        jax.config.update("jax_compilation_cache_dir", str(workdir / "compile_cache"))
