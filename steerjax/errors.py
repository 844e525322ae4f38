"""The errors a user meets. Each message says what is wrong, where, and what cures it."""

import contextlib
import sys


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


@contextlib.contextmanager
def reported_errors():
    """A SteerjaxError is printed without a traceback, and the exit status is 2."""
    try:
        yield
    except SteerjaxError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
