"""Commands in processes that are forked from one that has imported all: a start takes tenths of a second, not many.

`python -m tests.faults.forks` reads requests, a JSON object a line, and answers each with one.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

from tests.faults.moments import install


def _child(arguments: list[str], log: str, moments: list | None) -> None:
    """`steerjax ARGUMENTS` with both outputs in the log; `moments` is for `tests.faults.moments.install`."""
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(out, 1)
    os.dup2(out, 2)
    sys.argv = ["steerjax", *arguments]
    from steerjax.__main__ import main

    if moments:
        install(*moments)
    main()


def serve() -> None:
    import jax  # noqa: F401
    import matplotlib.pyplot  # noqa: F401

    import steerjax.report.page
    import steerjax.train
    import steerjax.training.train  # noqa: F401

    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            _, status = os.waitpid(request["wait"], 0)
            answer = os.waitstatus_to_exitcode(status)
        elif (answer := os.fork()) == 0:
            _child(**request)
            sys.exit(0)
        print(json.dumps(answer), flush=True)


class Forks:
    """Starts commands; `environment` is all that they have in common."""

    def __init__(self, environment: dict[str, str]):
        self._server = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.forks"], env=environment, text=True, bufsize=1,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip

    def _ask(self, request: dict) -> int:
        print(json.dumps(request), file=self._server.stdin, flush=True)
        return json.loads(self._server.stdout.readline())

    def start(self, arguments: list[str], log: Path, moments: list | None = None) -> int:
        """The number of a new process, which leads a group of its own."""
        return self._ask({"arguments": arguments, "log": str(log), "moments": moments})

    def wait(self, process: int) -> int:
        """Its exit status, minus the signal that ended it."""
        return self._ask({"wait": process})

    def close(self) -> None:
        self._server.stdin.close()
        self._server.wait()


if __name__ == "__main__":
    serve()
