"""Sources -> a list of conversations, with what was skipped; splits that never share a prompt."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from steerjax.attributes import AttributeSchema
from steerjax.data.conversation import Conversation
from steerjax.data.readers import hub_dataset, read_conversations, source_path
from steerjax.errors import ConfigError, DataError

Split = tuple[list[Conversation], list[Conversation]]


@dataclass(frozen=True)
class Skipped:
    """A row that was left out: the source, its line (from 1), and why."""

    file: str
    line: int
    reason: str


def load_conversations(
    sources: Sequence[str],
    schema: AttributeSchema,
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
    _check_option("on_bad_row", on_bad_row, ("error", "skip"))
    _check_option("on_duplicate", on_duplicate, ("error", "keep", "skip"))
    if not sources:
        raise DataError("no source of data", cure="name at least one file, e.g. embedded:helpsteer")
    conversations: list[Conversation] = []
    skipped: list[Skipped] = []
    first_of: dict[str, Conversation] = {}
    for source in sources:
        usable = 0
        for line, row in read_conversations(source, schema, format):
            if isinstance(row, DataError):
                if on_bad_row == "error":
                    raise _stopping(row)
                skipped.append(Skipped(source, line, _reason(row)))
                continue
            usable += 1
            first = first_of.setdefault(_row_digest(row), row)
            if first is row or on_duplicate == "keep":
                conversations.append(row)
            elif on_duplicate == "skip":
                skipped.append(Skipped(source, line, f"duplicate of {first.file}:{first.line}"))
            else:
                raise _duplicate(row, first)
        if not usable:
            raise _without_rows(source, [entry for entry in skipped if entry.file == source])
    return conversations, skipped


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
    if not 0 < fraction < 1:
        raise ConfigError(f"validation fraction {fraction} is not between 0 and 1; for none, do not split")
    ordered = _ordered_keys(conversations, seed)
    return _parts(conversations, ordered[: max(1, round(fraction * len(ordered)))])


def kfold_by_prompt(conversations: Sequence[Conversation], folds: int, fold: int, seed: int) -> Split:
    """(train, validation) of fold `fold` (from 0) of `folds`; each prompt is in the validation part of exactly one.

    Raises:
        ConfigError: fold or folds out of range. DataError: fewer prompts than folds.
    """
    if folds < 2 or not 0 <= fold < folds:
        raise ConfigError(f"fold {fold} of {folds}: take at least 2 folds, and a fold from 0 to folds - 1")
    return _parts(conversations, _ordered_keys(conversations, seed)[fold::folds])


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


def _ordered_keys(conversations: Sequence[Conversation], seed: int) -> list[str]:
    """The prompts' keys, shuffled by a hash keyed with the seed."""
    return sorted({prompt_key(c) for c in conversations}, key=lambda key: _digest([seed, key]))


def _parts(conversations: Sequence[Conversation], validation_keys: Sequence[str]) -> Split:
    chosen = frozenset(validation_keys)
    train, validation = [], []
    for conversation in conversations:
        (validation if prompt_key(conversation) in chosen else train).append(conversation)
    if not train or not validation:
        prompts = len({prompt_key(c) for c in conversations})
        part = "validation" if train else "training"
        raise DataError(f"no prompt is left for {part}: there are {prompts}", cure="add data or change the split")
    return train, validation


def _digest(value: list) -> str:
    return hashlib.blake2b(json.dumps(value).encode(), digest_size=16).hexdigest()


def _row_digest(conversation: Conversation) -> str:
    turns = [(turn.role, turn.content, sorted((turn.ratings or {}).items())) for turn in conversation.turns]
    return _digest([conversation.system, turns])


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


def _duplicate(row: Conversation, first: Conversation) -> DataError:
    return DataError(
        f"the same row as {first.file}:{first.line}",
        file=row.file,
        line=row.line,
        cure="remove it; or set on_duplicate='keep' (a response that was sampled and rated twice) or 'skip'",
    )


def _without_rows(source: str, skipped: Sequence[Skipped]) -> DataError:
    if not skipped:
        return DataError("no row in it", file=source, cure="check that this is the file you meant")
    first = skipped[0]
    message = f"no usable row: {len(skipped)} skipped, the first at line {first.line}: {first.reason}"
    return DataError(message, file=source, cure="repair the rows or name another format")
