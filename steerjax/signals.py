"""Ctrl-C and SIGTERM. What a command would lose decides: nothing, then it ends at once; steps, then it saves first."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import sys
import threading
from collections.abc import Iterator

INTERRUPTED = 128 + signal.SIGINT  # the exit status that shells give it


@contextlib.contextmanager
def ends_at_once() -> Iterator[None]:
    """While the block runs, Ctrl-C ends the process as SIGTERM does: at any point of an import or a compilation, and
    without a traceback. A caller's own handler stays, and so does an ignored Ctrl-C (`command &` in a script)."""
    with _handled(signal.SIG_DFL, only=signal.default_int_handler):
        yield


@contextlib.contextmanager
def raises_interrupt() -> Iterator[None]:
    """Within `ends_at_once`: Ctrl-C is KeyboardInterrupt, for a block that has something to close."""
    with _handled(signal.default_int_handler, only=signal.SIG_DFL):
        yield


@contextlib.contextmanager
def cleans_up() -> Iterator[None]:
    """Within `ends_at_once`: Ctrl-C lets a block clean up (its `finally`s run), then does what it would have done."""
    try:
        with raises_interrupt():
            yield
    except KeyboardInterrupt:
        signal.raise_signal(signal.SIGINT)
        raise


@contextlib.contextmanager
def _handled(handler, only) -> Iterator[None]:
    change = threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGINT) == only
    if change:
        signal.signal(signal.SIGINT, handler)
    try:
        yield
    finally:
        if change and signal.getsignal(signal.SIGINT) == handler:
            signal.signal(signal.SIGINT, only)


@contextlib.contextmanager
def stop_on_signals() -> Iterator[threading.Event]:
    """An event that SIGTERM (a preempted machine sends one some 30 seconds ahead) and Ctrl-C set while the block runs.

    A second Ctrl-C does what Ctrl-C did before the block; where it ended the process, it does so even while Python
    waits for a compilation.
    """
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event
        return

    def stop(number, _) -> None:
        event.set()
        if not watched:
            signal.signal(signal.SIGINT, before[signal.SIGINT])

    def watch() -> None:  # Python calls `stop` only when the main thread is back from what it waits for
        interrupts = 0
        while number := os.read(read, 1):
            interrupts += number[0] == signal.SIGINT
            if interrupts > 1:
                os._exit(INTERRUPTED)

    heeded = [signal.SIGTERM, *([signal.SIGINT] if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN else [])]
    before = {signal.SIGINT: signal.getsignal(signal.SIGINT)}
    before |= {number: signal.signal(number, stop) for number in heeded}
    read, write = os.pipe()
    os.set_blocking(write, False)
    watched = before[signal.SIGINT] == signal.SIG_DFL
    thread = threading.Thread(target=watch, daemon=True)
    if watched:
        woken = signal.set_wakeup_fd(write, warn_on_full_buffer=False)
        thread.start()
    try:
        yield event
    finally:
        for number in heeded:
            signal.signal(number, before[number])
        if watched:
            signal.set_wakeup_fd(woken)
        os.close(write)
        if watched:
            thread.join()
        os.close(read)


def outlive_readers() -> None:
    """What is printed to a pipe whose reader is gone is lost, no more: in `train | tee log` Ctrl-C ends tee as well."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        with contextlib.suppress(AttributeError, OSError):  # replaced by a caller, or closed
            stream.flush()
            raw = _Outliving(stream.fileno(), "w", closefd=False)
            options = {k: getattr(stream, k) for k in ("encoding", "errors", "line_buffering", "write_through")}
            setattr(sys, name, io.TextIOWrapper(raw if stream.write_through else io.BufferedWriter(raw), **options))


class _Outliving(io.FileIO):
    def write(self, data) -> int:
        try:
            return super().write(data)
        except BrokenPipeError:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.fileno())
            os.close(nowhere)
            return len(data)
