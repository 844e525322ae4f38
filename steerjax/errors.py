"""The errors a user meets. Each message says what is wrong, where, and what cures it."""

import contextlib
import errno
import os
import sys
from collections.abc import Iterator


class SteerjaxError(Exception):
    """Base class: commands print the message without a traceback and exit with status 2."""


class ConfigError(SteerjaxError):
    """A key of the experiment has a wrong name, type or value."""


class DataError(SteerjaxError):
    """A row of a data file cannot be used: `field` of the row at `line` of `file` (both where known; from 1)."""

    def __init__(self, message: str, field: str = "", cure: str = "", *, file: str = "", line: int = 0):
        self.message, self.file, self.line, self.field, self.cure = message, file, line, field, cure
        where = f"{file}:{line}" if file and line else file or (f"line {line}" if line else "")
        super().__init__((f"{where}: " if where else "") + self.reason + (f"\n  cure: {cure}" if cure else ""))

    @property
    def reason(self) -> str:
        """What is wrong, without its place and cure, as lists of skipped rows say it."""
        return f"field '{self.field}': {self.message}" if self.field else self.message

    def but(self, **changes) -> "DataError":
        """The same error with other arguments."""
        return DataError(**(vars(self) | changes))

    def at(self, file: str, line: int = 0) -> "DataError":
        """The same error with its place filled in, for code that knows the row but not the file."""
        return self.but(file=file, line=line)


class ModelError(SteerjaxError):
    """A model folder, tokenizer or architecture field that we do not read or implement."""


class CheckpointError(SteerjaxError):
    """A run's folder or checkpoint does not fit what was asked."""


class LockedError(SteerjaxError):
    """Another process writes what this one would."""


class WriteError(SteerjaxError):
    """The machine refuses what is written: no space, no right, too many files, a file where a folder belongs."""


class TrainingError(SteerjaxError):
    """Training cannot go on, e.g. gradients stay non-finite."""


_CURES = {  # of what the machine refuses
    errno.ENOSPC: "free some space, and start again",
    errno.EDQUOT: "free some space of your quota, and start again",
    errno.EROFS: "a place that can be written",
    errno.EACCES: "a place that you may write, or its owner gives you the right to",
    errno.EPERM: "a place that you may write, or its owner gives you the right to",
    errno.ENOTDIR: "move the file away that lies where a folder belongs, or name another place",
    errno.EEXIST: "move the file away that lies where a folder belongs, or name another place",
    errno.EISDIR: "move the folder away that lies where a file belongs, or name another place",
    errno.EMFILE: "a higher limit of open files, `ulimit -n 4096`",
    errno.ENFILE: "fewer programs at a time, as the machine's limit of open files is reached",
    errno.EFBIG: "a higher limit of a file's size, `ulimit -f unlimited`, or another file system",
    errno.EIO: "look into the machine's log (dmesg); the disk or the network behind it fails",
    errno.ESTALE: "mount it again; the server has replaced what was open",
    errno.ENOMEM: "more memory, or fewer programs at a time",
    errno.ENAMETOOLONG: "a shorter name",
    errno.ELOOP: "a link that does not lead to itself",
}
# Errors also recognised by their text alone: libraries quote them without the number.
_TOLD = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EMFILE, errno.ENFILE, errno.EFBIG, errno.EIO, errno.ESTALE)


def machine_refusal(error: BaseException) -> tuple[str, str] | None:
    """(reason, cure) where the machine is at fault, not the program: of an OSError, or of what quotes one."""
    number = error.errno if isinstance(error, OSError) else None
    if number is None:
        number = next((number for number in _TOLD if os.strerror(number).lower() in str(error).lower()), None)
    return (os.strerror(number), _CURES[number]) if number in _CURES else None


@contextlib.contextmanager
def machine_errors() -> Iterator[None]:
    """Raises WriteError, one sentence, in place of what the machine refused to the block."""
    try:
        yield
    except SteerjaxError:
        raise
    except Exception as error:
        if (said := machine_refusal(error)) is None:
            raise
        name = getattr(error, "filename", None)
        where = f"'{os.fsdecode(name)}': " if isinstance(name, str | bytes | os.PathLike) else ""
        raise WriteError(f"{where}{said[0]}\n  cure: {said[1]}") from error


@contextlib.contextmanager
def reported_errors() -> Iterator[None]:
    """A SteerjaxError, or what the machine refuses, is printed without a traceback, and the exit status is 2."""
    for stream in (sys.stdout, sys.stderr):  # a path may be no UTF-8
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    try:
        with machine_errors():
            yield
            print(end="", flush=True)  # else it would fail when Python has ended
    except SteerjaxError as error:
        print(f"error: {error}", file=sys.stderr)
        try:
            print(end="", flush=True)
        except OSError:
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115
        sys.exit(2)
