"""Sources -> a list of conversations, with what was skipped; splits by prompt."""

from __future__ import annotations

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
    """What sources held.

    Attributes:
        conversations: in order.
        skipped: the rows that were left out.
        duplicates: rows that equal an earlier one, whether kept or skipped.
    """

    conversations: list[Conversation]
    skipped: list[Skipped]
    duplicates: int


def load_conversations(
    sources: Sequence[str],
    schema: Schema,
    *,
    format: str = "auto",
    on_bad_row: str = "error",
    on_duplicate: str = "keep",
) -> Loaded:
    """All conversations of the sources; the options are `DataConfig`'s.

    A duplicate has the same system, roles, contents and ratings as an earlier row. The same response with other
    ratings is rater noise, and no duplicate.

    Raises:
        DataError: a bad row, a duplicate, a source without a usable row. ConfigError: an unknown format.
    """
    skipped: list[Skipped] = []
    duplicates: list[Skipped] = []
    rows = usable_rows(
        sources, lambda source: read_conversations(source, schema, format), skipped, duplicates,
        on_bad_row=on_bad_row, on_duplicate=on_duplicate,
    )  # fmt: skip
    return Loaded(list(rows), skipped, len(duplicates))


def usable_rows(
    sources: Sequence[str],
    read: Callable[[str], Iterable[tuple[int, Any]]],
    skipped: list[Skipped],
    duplicates: list[Skipped] | None = None,
    *,
    on_bad_row: str,
    on_duplicate: str = "keep",
) -> Iterator[Any]:
    """The rows of all sources that can be used, one by one; `load_conversations` without the list.

    Args:
        read: source -> (line, row or DataError). A row has `content()`, what a duplicate shares.
        skipped: what is skipped is added to it.
        duplicates: duplicates are added to it, kept or not.

    Raises:
        DataError, ConfigError: as `load_conversations`.
    """
    if not sources:
        raise DataError("no source of data", cure="name at least one file, e.g. embedded:helpsteer")
    first_of: dict[str, str] = {}
    for source in sources:
        usable, before = 0, len(skipped)
        for line, row in read(source):
            if isinstance(row, DataError):
                if on_bad_row == "error":
                    cure = f"{row.cure}; or set on_bad_row='skip' to skip and list such rows"
                    raise DataError(row.message, file=row.file, line=row.line, field=row.field, cure=cure)
                reason = f"field '{row.field}': {row.message}" if row.field else row.message
                skipped.append(Skipped(source, line, reason))
                continue
            usable += 1
            digest = _digest(row.content())
            if first := first_of.get(digest):
                duplicate = Skipped(source, line, f"duplicate of {first}")
                if on_duplicate == "error":
                    cure = "remove it; or set on_duplicate='keep' (sampled and rated twice) or 'skip'"
                    raise DataError(f"the same row as {first}", file=source, line=line, cure=cure)
                if duplicates is not None:
                    duplicates.append(duplicate)
                if on_duplicate == "skip":
                    skipped.append(duplicate)
                    continue
            else:
                first_of[digest] = f"{source}:{line}"
            yield row
        if not usable:
            message, bad = "no row in it", skipped[before:]
            if bad:
                message = f"no usable row: {len(bad)} skipped, the first at line {bad[0].line}: {bad[0].reason}"
            cure = "repair the rows, name another format, or check that this is the file you meant"
            raise DataError(message, file=source, cure=cure)


def write_skipped(path: str | Path, skipped: Iterable[Skipped]) -> None:
    """Writes file, line and reason of each skipped row, one JSON object a line."""
    # Half a surrogate pair in a reason is written as JSON's own escape.
    with Path(path).open("w", encoding="utf-8", errors="backslashreplace", newline="\n") as file:
        file.writelines(json.dumps(asdict(entry), ensure_ascii=False) + "\n" for entry in skipped)


def file_hashes(sources: Sequence[str]) -> dict[str, str]:
    """SHA-256 (hex) of each source's bytes as stored; of a hub source the fingerprint that `datasets` gives it.

    Raises:
        DataError: no such file or dataset.
    """
    return {source: _file_hash(source) for source in sources}


def _file_hash(source: str) -> str:
    path = source_path(source)
    if path is None:
        return hub_dataset(source)._fingerprint  # datasets has no public name for it
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


# Splits


def prompt_key(conversation: Conversation) -> str:
    """Names the prompt: equal for equal first user turns, whatever their case, white space and system text.

    Neither later turns count nor an assistant's opening, so all branches of a thread have one key. 32 hex digits.
    """
    turns = conversation.turns
    prompt = next((turn for turn in turns if turn.role == "user"), turns[0])
    return _digest([" ".join(prompt.content.casefold().split())])


def split_by_prompt(conversations: Sequence[Conversation], fraction: float, seed: int) -> Split:
    """(train, validation), where validation has `round(fraction * prompts)` prompts, at least one.

    The choice follows from the prompts and the seed, not from the order of rows; in each part rows keep their order.
    Where all rows have one prompt, rows take the prompts' place; `shared_prompts` of the parts is 1 then, else 0.

    Raises:
        ConfigError: fraction outside (0, 1). DataError: a part would be empty.
    """
    if not 0 < fraction < 1:
        raise ConfigError(f"validation fraction {fraction} is not between 0 and 1; cure: e.g. 0.1, or do not split")
    keys = _split_keys(conversations)
    ordered = _ordered(keys, seed)
    return _parts(conversations, keys, ordered[: max(1, round(fraction * len(ordered)))])


def kfold_by_prompt(conversations: Sequence[Conversation], folds: int, fold: int, seed: int) -> Split:
    """(train, validation) of fold `fold` (from 0) of `folds`; each prompt is in the validation part of exactly one.

    Where all rows have one prompt, as `split_by_prompt`.

    Raises:
        ConfigError: fold or folds out of range. DataError: fewer prompts than folds.
    """
    if folds < 2 or not 0 <= fold < folds:
        raise ConfigError(f"fold {fold} of {folds}; cure: at least 2 folds, and a fold from 0 to folds - 1")
    keys = _split_keys(conversations)
    return _parts(conversations, keys, _ordered(keys, seed)[fold::folds])


def shared_prompts(train: Iterable[Conversation], validation: Iterable[Conversation]) -> int:
    """How many prompts (`prompt_key`) are in both parts."""
    return len({prompt_key(c) for c in train} & {prompt_key(c) for c in validation})


def _split_keys(conversations: Sequence[Conversation]) -> list[str]:
    """Of each conversation what a split keeps together: its prompt, or, where all have one prompt (a thousand essays
    on one task), its content, so that equal rows are on one side all the same."""
    prompts = [prompt_key(conversation) for conversation in conversations]
    return prompts if len(set(prompts)) > 1 else [_digest(conversation.content()) for conversation in conversations]


def _ordered(keys: Iterable[str], seed: int) -> list[str]:
    """The keys, each once, shuffled by a hash keyed with the seed."""
    return sorted(set(keys), key=lambda key: _digest([seed, key]))


def _parts(conversations: Sequence[Conversation], keys: Sequence[str], held_out: Iterable[str]) -> Split:
    train, validation, held_out = [], [], set(held_out)
    for conversation, key in zip(conversations, keys, strict=True):
        (validation if key in held_out else train).append(conversation)
    if not train or not validation:
        message = f"nothing is left for {'validation' if train else 'training'}: there are {len(set(keys))} prompts"
        raise DataError(message, cure="add data, change the split, or name validation files")
    return train, validation


def _digest(value: list) -> str:
    return hashlib.blake2b(json.dumps(value).encode(), digest_size=16).hexdigest()
