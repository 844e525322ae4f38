"""steerjax NAME [...]: trains, rates, steers and exports. `steerjax NAME --help` says how."""

from __future__ import annotations

import importlib
import sys

COMMANDS = {
    "train": "a reward model or a chat model from a recipe; resumes",
    "prepare": "raw data to the conversation format",
    "annotate": "adds predicted ratings to conversations",
    "generate": "answers steered by ratings",
    "evaluate": "measures a model",
    "export": "writes a Hugging Face folder",
    "plan": "compiles a recipe's step for a machine that is not here: does it fit?",
}


def main() -> None:
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in COMMANDS:
        sys.argv = [f"steerjax {name}", *sys.argv[2:]]
        importlib.import_module(f"steerjax.{name}").main()
        return
    if name == "--version":
        from steerjax import __version__

        print(f"steerjax {__version__}")
        return
    lines = [__doc__.strip(), "", *(f"  {command:10}{words}" for command, words in COMMANDS.items())]
    if name in ("--help", "-h"):
        print("\n".join(lines))
        return
    print(f"error: there is no command '{name}'\n  cure: one of {', '.join(COMMANDS)}", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    main()
