"""steerjax NAME [...]: trains, rates, steers and exports. `steerjax NAME --help` says how."""

import importlib
import sys

import steerjax
from steerjax.signals import ends_at_once

COMMANDS = {
    "train": "a reward model or a chat model from a recipe; resumes",
    "prepare": "raw data to the conversation format",
    "annotate": "adds predicted ratings to conversations",
    "generate": "answers steered by ratings",
    "collect": "answers to a Label Studio project, its export to rated rows",
    "play": "a page to steer on, in the browser",
    "evaluate": "measures a model",
    "export": "writes a Hugging Face folder",
    "merge": "averages or extrapolates models",
    "plan": "compiles a recipe's step for a machine that is not here: does it fit?",
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
