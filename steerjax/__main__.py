"""steerjax NAME [OPTIONS]: reward models and chat models steered by ratings. `steerjax NAME --help` has the options."""

import importlib
import sys

import steerjax
from steerjax.signals import ends_at_once

COMMANDS = {
    "train": "trains a reward model or a chat model from a recipe; resumes",
    "prepare": "turns raw data into the conversation format",
    "annotate": "adds a reward model's ratings to conversations",
    "generate": "writes answers, steered by ratings",
    "iterate": "trains a chat model on its own answers, weighed by a reward model; resumes",
    "collect": "has people rate answers, in Label Studio",
    "play": "opens a page in the browser to steer a chat model on",
    "evaluate": "measures a model: benchmarks, people's ratings, steerability",
    "export": "writes a Hugging Face folder",
    "merge": "averages models, or extrapolates from one to another",
    "plan": "says whether a recipe fits a machine that is not here",
}


def main() -> None:
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in COMMANDS:
        sys.argv = [f"steerjax {name}", *sys.argv[2:]]
        with ends_at_once():
            importlib.import_module(f"steerjax.{name}").main()
    elif name == "--version":
        print(f"steerjax {steerjax.__version__}")
    elif name in ("--help", "-h"):
        print(__doc__, *(f"  {command:10}{words}" for command, words in COMMANDS.items()), sep="\n")
    else:
        print(f"error: there is no command '{name}'\n  cure: one of {', '.join(COMMANDS)}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
