"""The flags of commands that take a recipe: `--config FILE --config.KEY=VALUE`."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from absl import app, flags, logging
from ml_collections import config_flags

from steerjax.errors import ConfigError, reported_errors
from steerjax.signals import ends_at_once, outlive_readers

if TYPE_CHECKING:  # JAX comes with it, which --help does without
    from steerjax.training.config import Experiment

# What `reference.reference_text` says; `python -m steerjax.reference` writes it.
REFERENCE = Path(__file__).with_name("reference.txt")


def run_experiment(main: Callable[[Experiment], None], usage: str, required: Sequence[str]) -> None:
    """Parses `--config` and the flags that are defined (`required` must be given), calls `main(experiment)`.

    `usage` is what --help shows. A SteerjaxError is printed without a traceback; the exit status is then 2.
    """
    config = config_flags.DEFINE_config_file(
        "config", None, "A recipe: a Python file with get_config(), or the name of one that comes with steerjax."
    )
    if {"--help", "-h", "-help", "--helpfull"} & set(sys.argv[1:]):
        _print_help(usage)
        return
    sys.modules["__main__"].__doc__ = usage  # where absl looks for it

    def run(_) -> None:
        from steerjax.config import resolve

        logging.set_verbosity(logging.WARNING)  # absl opens the tap for every library that logs
        with reported_errors():
            for name in ("config", *required):
                if not flags.FLAGS[name].present:
                    raise ConfigError(f"--{name} is not given; cure: {usage.splitlines()[0]}")
            main(resolve(_recipe(config)))

    outlive_readers()
    with ends_at_once():
        app.run(run, flags_parser=_parse_flags)


def _print_help(usage: str) -> None:
    """Flags, recipes and every key of the config."""
    foreign = ("absl", "ml_collections", "etils", "orbax")
    modules = flags.FLAGS.flags_by_module_dict().items()
    own = [flag for name, found in modules if not name.startswith(foreign) for flag in found if flag.help]
    print(usage.strip(), "", *(f"  --{flag.name}: {flag.help}" for flag in own), sep="\n")
    print(f"\nRecipes that come with steerjax: {', '.join(recipes())}.\n\n{REFERENCE.read_text()}", end="")


def recipes() -> dict[str, Path]:
    """The recipes that come with the package, by name: of an installed package or of a checkout."""
    package = Path(__file__).parent
    folders = [folder for folder in (package / "recipes", package.parent / "configs") if folder.is_dir()]
    return {file.stem: file for folder in folders for file in sorted(folder.glob("*.py"))}


def find_recipe(name: str) -> str:
    """The path of a recipe: a file, or by its name (`rm`, `configs/rm.py`) one that comes with the package.

    Raises ConfigError: neither.
    """
    path = Path(name)
    if path.is_file():
        return name
    known = recipes()
    if path.stem in known and str(path.parent) in (".", "configs") and path.suffix in ("", ".py"):
        return str(known[path.stem])
    raise ConfigError(f"--config {name}: no such recipe; cure: a file with get_config(), or one of {', '.join(known)}")


def _parse_flags(arguments: list[str]) -> list[str]:
    """absl's parser, with recipes by name; what it and ml_collections refuse is an error like any other."""
    with reported_errors():
        try:
            return flags.FLAGS(_with_recipe(arguments))
        except (flags.Error, AttributeError, LookupError, TypeError, ValueError) as error:
            said = _of_recipe(str(error)) or " ".join(str(error).replace("\\n", " ").split()).removeprefix("flag ")
            if isinstance(error, AttributeError | KeyError):
                said = _unknown_key(said, arguments)
            cure = "steerjax train --help lists flags and keys, with their types"
            raise ConfigError(f"{said}\n  cure: {cure}") from None
        except SyntaxError as error:
            raise ConfigError(f"--config: {error}; cure: a Python file with get_config()") from None
        except OSError as error:
            raise ConfigError(f"--config: {error}") from None


def _of_recipe(said: str) -> str:
    """What ml_collections says of a recipe that fails, without the traceback's text: where, and why."""
    places = re.findall(r'File "(.+?)", line (\d+)', said)
    if "parsing config file" not in said or not places:
        return ""
    return f"--config: {':'.join(places[-1])}: {said.strip().splitlines()[-1]}"


def _unknown_key(said: str, arguments: list[str]) -> str:
    """What ml_collections says of a key, with the flag that has it."""
    name, *near = re.findall(r"\w+", said)
    flag = next((one for one in arguments if name in one.partition("=")[0].split(".")), None)
    if flag is None:
        return f"flags of the config: {said}"
    return f"{flag}: there is no key '{name}'" + (f", did you mean {near[3]}?" if near[:1] == ["Did"] else "")


def _with_recipe(arguments: list[str]) -> list[str]:
    """`--config NAME` and `--config=NAME` with the recipe's path."""
    found = list(arguments)
    for place, argument in enumerate(arguments):
        flag, equals, value = argument.partition("=")
        if flag in ("--config", "-config") and equals:
            found[place] = f"{flag}={find_recipe(value)}"
        elif flag in ("--config", "-config") and place + 1 < len(arguments):
            found[place + 1] = find_recipe(arguments[place + 1])
    return found


def _recipe(config: flags.FlagHolder) -> dict:
    """The recipe with the flags' changes. Raises ConfigError: there is no such file."""
    try:
        return config.value.to_dict()
    except OSError as error:  # says what failed before it, whose last line says why
        why = str(error.__cause__ or error).splitlines()[-1].strip()
        raise ConfigError(f"--config: {why}; cure: a recipe's name, e.g. rm, or its path") from error
    except AttributeError as error:
        said = f"--config: get_config() returns {config.value!r:.80}, and a recipe is a ConfigDict"
        raise ConfigError(f"{said}; cure: steerjax.config.default_config(), changed") from error


def local_folder(path: str) -> Path:
    """The folder of a run.

    Raises ConfigError: a remote path, which not all of a run's files can be written to; or a name that is not text, or
    has a backslash, which tensorstore takes for a slash.
    """
    if "://" in path:
        raise ConfigError(f"--workdir {path}: a remote path; cure: a local or mounted folder, copied when it is done")
    folder = Path(path).absolute()
    whole = os.path.realpath(folder)  # where a link leads
    if "\\" in whole or (not whole.isprintable() and any(0xD800 <= ord(letter) < 0xE000 for letter in whole)):
        raise ConfigError(f"--workdir {whole!r}: checkpoints take no backslash and only UTF-8; cure: another name")
    return folder


def use_compile_cache(workdir: Path) -> None:
    """Compiled steps are kept in the workdir (or where JAX_COMPILATION_CACHE_DIR says), so a resume starts fast."""
    import jax

    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        jax.config.update("jax_compilation_cache_dir", str(workdir / "compile_cache"))
