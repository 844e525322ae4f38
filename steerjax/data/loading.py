"""Sources -> conversations, with what was skipped; splits by prompt."""

import functools
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from steerjax.data.conversation import Conversation
from steerjax.data.readers import hub_dataset, read_conversations, source_path
from steerjax.errors import ConfigError, DataError
from steerjax.files import write_text
from steerjax.schema import Schema

Read = Callable[[str], Iterable[tuple[int, Any]]]  # source -> (line, row or DataError)


@dataclass(frozen=True)
class Skipped:
    """A row that was left out: the source, its line (from 1), and why."""

    file: str
    line: int
    reason: str


@dataclass(frozen=True)
class Loaded:
    """What sources held: conversations in order, rows left out, how many rows equal an earlier one (kept or not), and
    keys with numbers that nothing read (`formats.unread_numbers`)."""

    conversations: list[Conversation]
    skipped: list[Skipped]
    duplicates: int
    unread: tuple[str, ...] = ()


def load_conversations(
    sources: Sequence[str], schema: Schema, *, format: str = "auto", read: Read | None = None, **options: str
) -> Loaded:
    """All conversations of the sources, as `read` or else `read_conversations` gives them; options and errors are those
    of `usable_rows`."""
    skipped: list[Skipped] = []
    duplicates: list[Skipped] = []
    unread: dict[str, None] = {}
    read = read or functools.partial(read_conversations, schema=schema, format=format, unread=unread)
    rows = list(usable_rows(sources, read, skipped, duplicates, **options))
    return Loaded(rows, skipped, len(duplicates), tuple(unread))


def usable_rows(
    sources: Sequence[str], read: Read, skipped: list[Skipped], duplicates: list[Skipped] | None = None, *,
    on_bad_row: str = "error", on_duplicate: str = "keep",
) -> Iterator[Any]:  # fmt: skip
    """The rows of all sources that can be used, one by one; the options are `DataConfig`'s.

    Adds to `skipped`, and to `duplicates`, kept or not, rows whose `content()` equals an earlier one's; with other
    ratings it is rater noise. Raises DataError: a bad row, a source without a usable row.
    """
    first_of: dict[str, str] = {}
    duplicates = [] if duplicates is None else duplicates
    for source in sources:
        usable, before = 0, len(skipped)
        for line, row in read(source):
            if isinstance(row, DataError):
                if on_bad_row == "error":
                    raise row.but(cure=f"{row.cure}; or set on_bad_row='skip' to skip and list such rows")
                skipped.append(Skipped(source, line, row.reason))
                continue
            usable += 1
            digest = _digest(row.content())
            if first := first_of.get(digest):
                duplicates.append(Skipped(source, line, f"duplicate of {first}"))
                if on_duplicate == "skip":
                    skipped.append(duplicates[-1])
                    continue
            first_of.setdefault(digest, f"{source}:{line}")
            yield row
        if not usable:
            bad = skipped[before:]
            what = f"usable row: {len(bad)} skipped, the first at line {bad[0].line}: {bad[0].reason}" if bad else "row"
            cure = "repair the rows, or name another format or file"
            raise DataError(f"no {what}", file=source, cure=cure)


def write_skipped(path: str | Path, skipped: Iterable[Skipped]) -> None:
    """One JSON object a line."""
    lines = "".join(json.dumps(asdict(entry), ensure_ascii=False) + "\n" for entry in skipped)
    write_text(path, lines, errors="backslashreplace")  # half a surrogate pair as JSON's own escape


def file_hashes(sources: Sequence[str]) -> dict[str, str]:
    """SHA-256 (hex) of each source's bytes as stored; of a hub source the fingerprint that `datasets` gives it."""
    paths = {source: source_path(source) for source in sources}
    return {source: _file_hash(path) if path else hub_dataset(source)._fingerprint for source, path in paths.items()}


def _file_hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def prompt_key(conversation: Conversation) -> str:
    """Names the prompt: the first user turn, whatever its case and white space, so a tree's threads have one key."""
    turns = conversation.turns
    prompt = next((turn for turn in turns if turn.role == "user"), turns[0])
    return _prompt_digest(prompt.content)


@functools.lru_cache(maxsize=1024)  # the rows of a prompt mostly stand together
def _prompt_digest(text: str) -> str:
    return _digest([" ".join(text.casefold().split())])


def shared_prompts(train: Iterable[Conversation], validation: Iterable[Conversation]) -> int:
    """How many prompts (`prompt_key`) are in both parts."""
    return len({prompt_key(c) for c in train} & {prompt_key(c) for c in validation})


def shuffled_keys(conversations: Sequence[Conversation], seed: int) -> tuple[list[str], list[str]]:
    """Each conversation's key, equal where they stay on one side, and the keys shuffled by a hash with the seed.

    Keys are the prompts', or where all rows have one (a thousand essays on one task) their contents'.
    """
    keys = [prompt_key(conversation) for conversation in conversations]
    if len(set(keys)) == 1:
        keys = [_digest(conversation.content()) for conversation in conversations]
    return keys, sorted(set(keys), key=lambda key: _digest([seed, key]))


def split_by_prompt(
    conversations: Sequence[Conversation], fraction: float, seed: int
) -> tuple[list[Conversation], list[Conversation]]:
    """(train, validation), where validation has `round(fraction * prompts)` prompts, at least one.

    The choice follows from the prompts and the seed, not from the order of rows, which each part keeps. Where all rows
    have one prompt, rows take the prompts' place; `shared_prompts` of the parts is 1 then, else 0.

    Raises ConfigError: fraction outside (0, 1). DataError: a part would be empty.
    """
    if not 0 < fraction < 1:
        raise ConfigError(f"validation fraction {fraction} is not between 0 and 1; cure: e.g. 0.1, or do not split")
    keys, shuffled = shuffled_keys(conversations, seed)
    held_out = set(shuffled[: max(1, round(fraction * len(shuffled)))])
    if len(held_out) == len(shuffled):
        what = f"nothing is left for training: there are {len(shuffled)} prompts"
        raise DataError(what, cure="add data, change the split, or name validation files")
    rows = list(zip(conversations, keys, strict=True))
    return [c for c, key in rows if key not in held_out], [c for c, key in rows if key in held_out]


def _digest(value: list) -> str:
    return hashlib.blake2b(json.dumps(value).encode(), digest_size=16).hexdigest()
