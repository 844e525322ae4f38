"""Processes whose Ctrl-C is as a terminal's, whatever the test's own is: what runs in the background ignores it."""

import sys

_EXEC = "import os, signal, sys; signal.signal(signal.SIGINT, signal.{}); os.execvp(sys.argv[1], sys.argv[1:])"


def with_ctrl_c(command: list[str], *, ignored: bool = False) -> list[str]:
    """The command that starts `command` so. (A `preexec_fn` can hang where the test's process has threads.)"""
    return [sys.executable, "-I", "-S", "-c", _EXEC.format("SIG_IGN" if ignored else "SIG_DFL"), *command]
