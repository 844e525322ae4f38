"""Ctrl-C and SIGTERM, which mean the same. What a command would lose decides: nothing, then it ends at once; something,
then it saves or cleans up first. A second signal leaves at once. Exit statuses: docs/reliability.md."""

from __future__ import annotations

import atexit
import contextlib
import io
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator

INTERRUPTED = 128 + signal.SIGINT  # the exit status that shells give it
SIGNALS = (signal.SIGINT, signal.SIGTERM)
# A second SIGTERM within this many seconds is the same request: `timeout` and schedulers signal a process and its
# group.
_SAME = 1.0


class Interrupted(KeyboardInterrupt):
    """A command was asked to end; `status` is the exit status that shells give such an end."""

    def __init__(self, number: int = signal.SIGINT):
        self.number, self.status = number, 128 + number
        super().__init__(signal.Signals(number).name)


@contextlib.contextmanager
def ends_at_once() -> Iterator[None]:
    """While the block runs, Ctrl-C ends the process as SIGTERM does: at any point of an import or a compilation, and
    without a traceback. A caller's own handler stays, and so does an ignored Ctrl-C (`command &` in a script)."""
    change = _main_thread() and signal.getsignal(signal.SIGINT) == signal.default_int_handler
    if change:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    finally:
        if change and signal.getsignal(signal.SIGINT) == signal.SIG_DFL:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            atexit.register(signal.signal, signal.SIGINT, signal.SIG_DFL)  # else jax's own clean-up is a traceback


@contextlib.contextmanager
def raises_interrupt() -> Iterator[None]:
    """Within `ends_at_once`: either signal raises Interrupted, for a block that has something to close."""

    def stop(number, _):
        raise Interrupted(number)

    with _heeded(stop):
        yield


@contextlib.contextmanager
def cleans_up() -> Iterator[None]:
    """Within `ends_at_once`: a signal lets a block clean up (its `finally`s run), then does what it would have done."""
    change = _ends_at_once()
    try:
        with raises_interrupt():
            yield
    except Interrupted as stop:
        if change:
            signal.raise_signal(stop.number)
        raise


@contextlib.contextmanager
def stop_on_signals() -> Iterator[threading.Event]:
    """An event that SIGTERM (a preempted machine sends one some 30 seconds ahead) and Ctrl-C set while the block runs.

    In a program of one's own a second Ctrl-C does what Ctrl-C did before the block.
    """
    event = threading.Event()
    if not _main_thread():
        yield event
    elif _ends_at_once():
        with _heeded(lambda *_: event.set()):
            yield event
    else:
        known = {number: signal.getsignal(number) for number in SIGNALS}
        before = {number: handler for number, handler in known.items() if handler not in (signal.SIG_IGN, None)}

        def stop(*_) -> None:
            event.set()
            signal.signal(signal.SIGINT, known[signal.SIGINT])

        try:
            for number in before:
                signal.signal(number, stop)
            yield event
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def _main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


def _ends_at_once() -> bool:
    """Whether a signal would end the process here, so that a handler may take its place."""
    return _main_thread() and all(
        signal.getsignal(number) in (signal.SIG_DFL, *([signal.SIG_IGN] if number == signal.SIGINT else []))
        for number in SIGNALS
    )


@contextlib.contextmanager
def _heeded(handler: Callable) -> Iterator[None]:
    """Where signals would end the process the first goes to the handler; a second ends it, though Python be busy."""
    if not _ends_at_once():
        yield
        return

    def watch() -> None:  # Python calls a handler only when the main thread is back from what it waits for
        first = None
        while number := os.read(read, 1):
            if first is None:
                first = number, time.monotonic()
            elif number[0] == signal.SIGINT or first[0] != number or time.monotonic() - first[1] > _SAME:
                os._exit(128 + number[0])

    heeded = [number for number in SIGNALS if signal.getsignal(number) == signal.SIG_DFL]
    read, write = os.pipe()
    os.set_blocking(write, False)
    thread = threading.Thread(target=watch, daemon=True)
    called = []

    def once(number, frame) -> None:
        if not called:
            called.append(number)
            handler(number, frame)

    woken = signal.set_wakeup_fd(write, warn_on_full_buffer=False)
    thread.start()
    try:
        for number in heeded:
            signal.signal(number, once)
        yield
    finally:
        for number in heeded:
            signal.signal(number, signal.SIG_DFL)
        signal.set_wakeup_fd(woken)
        os.close(write)
        thread.join()
        os.close(read)


def outlive_readers() -> None:
    """What is printed to a pipe whose reader is gone is lost, no more: in `train | tee log` Ctrl-C ends tee as well. So
    is what a full disk does not take of a log."""
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
        except OSError:  # the disk of a log is full
            return len(data)
