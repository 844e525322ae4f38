"""Sources -> a list of conversations, with what was skipped; splits that never share a prompt."""

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


def load_conversations(
    sources: Sequence[str],
    schema: Schema,
    *,
    format: str = "auto",
    on_bad_row: str = "error",
    on_duplicate: str = "error",
) -> tuple[list[Conversation], list[Skipped]]:
    """All conversations of the sources in order, and the rows that were skipped.

    A duplicate has the same system, roles, contents and ratings as an earlier row. The same response with other
    ratings is rater noise, and no duplicate.

    Args:
        sources: files, `embedded:NAME` or `hub:ID[:SPLIT]` (`readers.iter_rows`).
        format: "auto" or a key of `readers.FORMATS`.
        on_bad_row: "error" stops at the first bad row, "skip" lists them all.
        on_duplicate: "error", "keep" or "skip".

    Raises:
        DataError: a bad row, a duplicate, a source without a usable row. ConfigError: an unknown option.
    """
    skipped: list[Skipped] = []
    rows = usable_rows(
        sources, lambda source: read_conversations(source, schema, format), skipped,
        on_bad_row=on_bad_row, on_duplicate=on_duplicate,
    )  # fmt: skip
    return list(rows), skipped


def usable_rows(
    sources: Sequence[str],
    read: Callable[[str], Iterable[tuple[int, Any]]],
    skipped: list[Skipped],
    *,
    on_bad_row: str,
    on_duplicate: str,
) -> Iterator[Any]:
    """The rows of all sources that can be used, one by one; `load_conversations` without the list.

    Args:
        read: source -> (line, row or DataError). A row has `content()`, what a duplicate shares.
        skipped: what is skipped is added to it.

    Raises:
        DataError, ConfigError: as `load_conversations`.
    """
    _check_option("on_bad_row", on_bad_row, ("error", "skip"))
    _check_option("on_duplicate", on_duplicate, ("error", "keep", "skip"))
    if not sources:
        raise DataError("no source of data", cure="name at least one file, e.g. embedded:helpsteer")
    first_of: dict[str, tuple[str, int]] = {}
    for source in sources:
        usable = 0
        for line, row in read(source):
            if isinstance(row, DataError):
                if on_bad_row == "error":
                    raise _stopping(row)
                skipped.append(Skipped(source, line, _reason(row)))
                continue
            usable += 1
            if on_duplicate == "keep":
                yield row
                continue
            digest = _digest(row.content())
            if digest not in first_of:
                first_of[digest] = (source, line)
                yield row
            elif on_duplicate == "skip":
                skipped.append(Skipped(source, line, "duplicate of {}:{}".format(*first_of[digest])))
            else:
                raise _duplicate(source, line, first_of[digest])
        if not usable:
            raise _without_rows(source, [entry for entry in skipped if entry.file == source])


def write_skipped(path: str | Path, skipped: Iterable[Skipped]) -> None:
    """Writes file, line and reason of each skipped row, one JSON object a line."""
    lines = (json.dumps(asdict(entry), ensure_ascii=False) + "\n" for entry in skipped)
    Path(path).write_text("".join(lines), encoding="utf-8")


def file_hashes(sources: Sequence[str]) -> dict[str, str]:
    """SHA-256 (hex) of each source's bytes as stored; of a hub source the fingerprint that `datasets` gives it.

    Raises:
        DataError: no such file or dataset.
    """
    return {source: _file_hash(source) for source in sources}


def prompt_key(conversation: Conversation) -> str:
    """Names the prompt: equal for equal first user turns, whatever their case, white space and system text.

    Later turns do not count, so all branches of a thread have one key. 32 hex digits.
    """
    return _digest([" ".join(conversation.turns[0].content.casefold().split())])


def split_by_prompt(conversations: Sequence[Conversation], fraction: float, seed: int) -> Split:
    """(train, validation), where validation has `round(fraction * prompts)` prompts, at least one.

    The choice follows from the prompts and the seed, not from the order of rows; in each part rows keep their order.

    Raises:
        ConfigError: fraction outside (0, 1). DataError: a part would be empty.
    """
    keys = [prompt_key(conversation) for conversation in conversations]
    return _parts(conversations, keys, held_out_prompts(keys, fraction, seed))


def held_out_prompts(keys: Iterable[str], fraction: float, seed: int) -> frozenset[str]:
    """The keys (`prompt_key`) that `split_by_prompt` puts into validation.

    Raises:
        ConfigError: fraction outside (0, 1).
    """
    if not 0 < fraction < 1:
        raise ConfigError(f"validation fraction {fraction} is not between 0 and 1; for none, do not split")
    ordered = _ordered_keys(keys, seed)
    return frozenset(ordered[: max(1, round(fraction * len(ordered)))])


def kfold_by_prompt(conversations: Sequence[Conversation], folds: int, fold: int, seed: int) -> Split:
    """(train, validation) of fold `fold` (from 0) of `folds`; each prompt is in the validation part of exactly one.

    Raises:
        ConfigError: fold or folds out of range. DataError: fewer prompts than folds.
    """
    if folds < 2 or not 0 <= fold < folds:
        raise ConfigError(f"fold {fold} of {folds}: take at least 2 folds, and a fold from 0 to folds - 1")
    keys = [prompt_key(conversation) for conversation in conversations]
    return _parts(conversations, keys, frozenset(_ordered_keys(keys, seed)[fold::folds]))


def check_disjoint(train: Sequence[Conversation], validation: Sequence[Conversation]) -> None:
    """Raises DataError, with both places, if a prompt is in both parts."""
    trained = {prompt_key(conversation): conversation for conversation in train}
    for conversation in validation:
        other = trained.get(prompt_key(conversation))
        if other is not None:
            raise DataError(
                f"validation has the prompt of the training row {other.file}:{other.line}",
                file=conversation.file,
                line=conversation.line,
                cure="remove one of the rows, or let the run split one source by prompt",
            )


def _ordered_keys(keys: Iterable[str], seed: int) -> list[str]:
    """The prompts' keys, shuffled by a hash keyed with the seed."""
    return sorted(set(keys), key=lambda key: _digest([seed, key]))


def _parts(conversations: Sequence[Conversation], keys: Sequence[str], held_out: frozenset[str]) -> Split:
    train, validation = [], []
    for conversation, key in zip(conversations, keys, strict=True):
        (validation if key in held_out else train).append(conversation)
    if not train or not validation:
        prompts = len(set(keys))
        part = "validation" if train else "training"
        raise DataError(f"no prompt is left for {part}: there are {prompts}", cure="add data or change the split")
    return train, validation


def _digest(value: list) -> str:
    return hashlib.blake2b(json.dumps(value).encode(), digest_size=16).hexdigest()


def _file_hash(source: str) -> str:
    path = source_path(source)
    if path is None:
        return hub_dataset(source)._fingerprint  # datasets has no public name for it
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def _check_option(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ConfigError(f"{name}: unknown value '{value}'; use one of: {', '.join(allowed)}")


def _reason(error: DataError) -> str:
    return f"field '{error.field}': {error.message}" if error.field else error.message


def _stopping(error: DataError) -> DataError:
    cure = f"{error.cure}; or set on_bad_row='skip' to skip and list such rows"
    return DataError(error.message, file=error.file, line=error.line, field=error.field, cure=cure)


def _duplicate(source: str, line: int, first: tuple[str, int]) -> DataError:
    return DataError(
        "the same row as {}:{}".format(*first),
        file=source,
        line=line,
        cure="remove it; or set on_duplicate='keep' (a response that was sampled and rated twice) or 'skip'",
    )


def _without_rows(source: str, skipped: Sequence[Skipped]) -> DataError:
    if not skipped:
        return DataError("no row in it", file=source, cure="check that this is the file you meant")
    first = skipped[0]
    message = f"no usable row: {len(skipped)} skipped, the first at line {first.line}: {first.reason}"
    return DataError(message, file=source, cure="repair the rows or name another format")
