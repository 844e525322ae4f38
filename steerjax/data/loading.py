"""Sources -> a list of conversations, with what was skipped; splits by prompt."""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from steerjax.data.conversation import Conversation
from steerjax.data.readers import hub_dataset, read_conversations, source_path
from steerjax.errors import ConfigError, DataError
from steerjax.schema import Schema

Split = tuple[list[Conversation], list[Conversation]]


@dataclass(frozen=True)
class Skipped:
    """A row that was left out: the source, its line (from 1), and why."""

    file: str
    line: int
    reason: str


@dataclass(frozen=True)
class Loaded:
    """What sources held: conversations in order, rows left out, how many rows equal an earlier one (kept or not)."""

    conversations: list[Conversation]
    skipped: list[Skipped]
    duplicates: int


def load_conversations(
    sources: Sequence[str], schema: Schema, *, format: str = "auto", on_bad_row: str = "error",
    on_duplicate: str = "keep",
) -> Loaded:  # fmt: skip
    """All conversations of the sources; the options are `DataConfig`'s.

    A duplicate equals an earlier row in system, roles, contents and ratings; with other ratings it is rater noise.

    Raises:
        DataError: a bad row, a duplicate, a source without a usable row. ConfigError: an unknown format.
    """
    skipped: list[Skipped] = []
    duplicates: list[Skipped] = []
    read = lambda source: read_conversations(source, schema, format)  # noqa: E731
    rows = usable_rows(sources, read, skipped, duplicates, on_bad_row=on_bad_row, on_duplicate=on_duplicate)
    return Loaded(list(rows), skipped, len(duplicates))


def usable_rows(
    sources: Sequence[str], read: Callable[[str], Iterable[tuple[int, Any]]], skipped: list[Skipped],
    duplicates: list[Skipped] | None = None, *, on_bad_row: str, on_duplicate: str = "keep",
) -> Iterator[Any]:  # fmt: skip
    """The rows of all sources that can be used, one by one; `load_conversations` without the list.

    Args:
        read: source -> (line, row or DataError). A row has `content()`, what a duplicate shares.
        skipped, duplicates: are added to; duplicates whether kept or not.
    """
    first_of: dict[str, str] = {}
    for source in sources:
        usable, before = 0, len(skipped)
        for line, row in read(source):
            if isinstance(row, DataError):
                if on_bad_row == "error":
                    raise row.but(cure=f"{row.cure}; or set on_bad_row='skip' to skip and list such rows")
                skipped.append(Skipped(source, line, row.reason))
                continue
            usable += 1
            if first := first_of.get(digest := _digest(row.content())):
                if on_duplicate == "error":
                    cure = "remove it; or set on_duplicate='keep' (sampled and rated twice) or 'skip'"
                    raise DataError(f"the same row as {first}", file=source, line=line, cure=cure)
                for entries in (duplicates, skipped if on_duplicate == "skip" else None):
                    if entries is not None:
                        entries.append(Skipped(source, line, f"duplicate of {first}"))
                if on_duplicate == "skip":
                    continue
            first_of.setdefault(digest, f"{source}:{line}")
            yield row
        if not usable:
            bad = skipped[before:]
            what = f"usable row: {len(bad)} skipped, the first at line {bad[0].line}: {bad[0].reason}" if bad else "row"
            cure = "repair the rows, name another format, or check that this is the file you meant"
            raise DataError(f"no {what}", file=source, cure=cure)


def write_skipped(path: str | Path, skipped: Iterable[Skipped]) -> None:
    """One JSON object a line."""
    lines = "".join(json.dumps(asdict(entry), ensure_ascii=False) + "\n" for entry in skipped)
    Path(path).write_bytes(lines.encode("utf-8", "backslashreplace"))  # half a surrogate pair as JSON's own escape


def file_hashes(sources: Sequence[str]) -> dict[str, str]:
    """SHA-256 (hex) of each source's bytes as stored; of a hub source the fingerprint that `datasets` gives it."""
    paths = {source: source_path(source) for source in sources}
    return {
        source: hashlib.sha256(path.read_bytes()).hexdigest() if path else hub_dataset(source)._fingerprint
        for source, path in paths.items()
    }


def prompt_key(conversation: Conversation) -> str:
    """Names the prompt: the first user turn, whatever its case and white space, so a tree's threads have one key."""
    turns = conversation.turns
    prompt = next((turn for turn in turns if turn.role == "user"), turns[0])
    return _digest([" ".join(prompt.content.casefold().split())])


def split_by_prompt(conversations: Sequence[Conversation], fraction: float, seed: int) -> Split:
    """(train, validation), where validation has `round(fraction * prompts)` prompts, at least one.

    The choice follows from the prompts and the seed, not from the order of rows, which each part keeps. Where all rows
    have one prompt, rows take the prompts' place; `shared_prompts` of the parts is 1 then, else 0.

    Raises:
        ConfigError: fraction outside (0, 1). DataError: a part would be empty.
    """
    if not 0 < fraction < 1:
        raise ConfigError(f"validation fraction {fraction} is not between 0 and 1; cure: e.g. 0.1, or do not split")
    return _split(conversations, seed, lambda keys: keys[: max(1, round(fraction * len(keys)))])


def kfold_by_prompt(conversations: Sequence[Conversation], folds: int, fold: int, seed: int) -> Split:
    """(train, validation) of fold `fold` (from 0) of `folds`; each prompt is held out in exactly one.

    Raises:
        ConfigError: fold or folds out of range. DataError: fewer prompts than folds.
    """
    if folds < 2 or not 0 <= fold < folds:
        raise ConfigError(f"fold {fold} of {folds}; cure: at least 2 folds, and a fold from 0 to folds - 1")
    return _split(conversations, seed, lambda keys: keys[fold::folds])


def shared_prompts(train: Iterable[Conversation], validation: Iterable[Conversation]) -> int:
    """How many prompts (`prompt_key`) are in both parts."""
    return len({prompt_key(c) for c in train} & {prompt_key(c) for c in validation})


def _split(conversations: Sequence[Conversation], seed: int, choose: Callable[[list[str]], list[str]]) -> Split:
    """`choose` takes the held out of all keys, which are shuffled by a hash keyed with the seed."""
    keys = [prompt_key(conversation) for conversation in conversations]
    if len(set(keys)) == 1:  # a thousand essays on one task: by content, so that equal rows are on one side
        keys = [_digest(conversation.content()) for conversation in conversations]
    held_out = set(choose(sorted(set(keys), key=lambda key: _digest([seed, key]))))
    train, validation = ([c for c, k in zip(conversations, keys, strict=True) if (k in held_out) == held]
                         for held in (False, True))  # fmt: skip
    if not train or not validation:
        message = f"nothing is left for {'validation' if train else 'training'}: there are {len(set(keys))} prompts"
        raise DataError(message, cure="add data, change the split, or name validation files")
    return train, validation


def _digest(value: list) -> str:
    return hashlib.blake2b(json.dumps(value).encode(), digest_size=16).hexdigest()
