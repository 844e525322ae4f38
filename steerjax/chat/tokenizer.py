"""Tokenizers: `tokenizer.json` files, and SentencePiece `.model` files as the same thing.

`encode` and `decode` are inverses except where a tokenizer's own normalisation loses text. SentencePiece stores a space
as U+2581, so a U+2581 that stands in the text comes back as a space.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from os import PathLike
from pathlib import Path
from typing import Annotated, Any

import pydantic.dataclasses

from steerjax.chat.sentencepiece import convert
from steerjax.chat.templates import Template
from steerjax.errors import ModelError
from steerjax.typed import read_json

EMBEDDED = Path(__file__).with_name("embedded.model")  # made by scripts/train_tokenizer.py
WORD_JOINER = "\u2060"  # zero-width, breaks no line, and NFKC keeps it
HIDE = "\udc00"  # half a surrogate, which no text contains; see `Tokenizer.encode`

_GIVE = "\n  cure: give 'embedded', a SentencePiece .model file, a tokenizer.json, or a downloaded model's folder"
_AGAIN = "download it again"
_Token = Annotated[str, pydantic.BeforeValidator(lambda said: said.get("content") if isinstance(said, dict) else said)]


@lru_cache(maxsize=256)
def any_of(strings: frozenset[str]) -> re.Pattern[str]:
    """Matches each of `strings`, of which there is at least one; the longest first."""
    return re.compile("(" + "|".join(map(re.escape, sorted(strings, key=len, reverse=True))) + ")")


def broken(string: str, mark: str = WORD_JOINER) -> str:
    """`string` as a text may contain it: with `mark` after its first character, or where there is no room, U+FFFD."""
    return string[0] + mark + string[1:] if mark and len(string) > 1 else "\ufffd"


@dataclass(frozen=True, eq=False, kw_only=True)
class Tokenizer:
    """Text to token ids and back."""

    backend: Any  # a `tokenizers.Tokenizer`, to which the strings of `told` are ordinary text
    vocab_size: int  # ids are below it
    special_strings: frozenset[str]  # those that become a special token wherever they stand in text
    # Special tokens that `HIDE` keeps a text from becoming. Those that are not among `special_strings` (SentencePiece's
    # control pieces) it becomes only where a template has them.
    told: frozenset[str]
    restarts: frozenset[str]  # special tokens after which text is encoded as a fresh text
    head: tuple[int, ...]  # tokens of the "\n" that is put before a continuation; () where it needs none
    opening: tuple[int, ...] = ()  # what the files say stands before every text of no template: BOS, or nothing
    files: tuple[Path, ...]  # what a copy needs; the first is the one that was loaded
    content: bytes | None = None  # tokenizer.json in place of the first, where `with_special_tokens` has added some
    hash: str  # hexadecimal sha256 of what defines the ids
    bos_id: int | None = None
    eos_id: int | None = None
    pad_id: int | None = None

    def encode(self, text: str, *, continuation: bool = False, controls: frozenset[str] = frozenset()) -> list[int]:
        """Token ids of `text`, without BOS and EOS.

        Special strings in it become their ids; those of `told` with `HIDE` inside become ordinary text. `controls` are
        the template's control strings. No dummy prefix is put before a `continuation` of other text.

        Raises ModelError where the tokenizer joins "\\n" to what follows, so that a continuation cannot be encoded.
        """
        cuts = self.told & (self.special_strings | controls)
        ids, head = [], self.head if continuation else ()
        for index, part in enumerate(any_of(cuts).split(text) if cuts else [text]):
            if index % 2:
                ids.append(self.token_id(part))
                head = () if self.restarts else self.head
            elif plain := part.replace(HIDE, ""):
                # As `encode`, without finding each token's place in the text, and without the interpreter's lock.
                given = ["\n" + plain if head else plain]
                try:
                    (encoding,) = self.backend.encode_batch_fast(given, add_special_tokens=False)
                except Exception as error:  # the library raises nothing narrower
                    cure = "a tokenizer with an unknown token, or with all bytes"
                    raise ModelError(f"the tokenizer cannot encode {plain[:40]!r} ({error})\n  cure: {cure}") from None
                found = encoding.ids
                if tuple(found[: len(head)]) != head:
                    raise ModelError(
                        f"the tokenizer joins a newline to the text after it, {plain[:40]!r}, so text cannot be "
                        "continued\n  cure: use a tokenizer that adds no prefix to text, or that keeps a newline apart"
                    )
                ids += found[len(head) :]
        return ids

    def decode(self, ids: Sequence[int], *, continuation: bool = False) -> str:
        """Text of `ids`, special tokens included; `continuation` keeps the leading space that a fresh text loses.

        An id that is no token's spells nothing: an embedding may have more rows than its tokenizer has tokens.
        """
        head, restarts = self.head if continuation else (), set(map(self.token_id, self.restarts))
        runs = [[*head]]  # each a text of its own
        for index in map(int, ids):
            runs[-1].append(index)
            if index in restarts:
                runs.append([])
        text = "".join(self.backend.decode(run, skip_special_tokens=False) for run in runs)
        return text[1:] if head else text

    def token_id(self, string: str) -> int | None:
        return self.backend.token_to_id(string)

    def normalized(self, text: str) -> str:
        """`text` as the tokenizer's model sees it."""
        if self._plain_normalizer is None:
            return self.backend.normalizer.normalize_str(text)
        for kind, string, to in self._plain_normalizer:
            text = text.replace(string, to) if kind == "Replace" else text and to + text
        return text

    @cached_property
    def unknown(self) -> str | None:
        """What decodes a character that has no token."""
        model = self._state["model"]
        return model["vocab"][model["unk_id"]][0] if model.get("unk_id") is not None else model.get("unk_token")

    @cached_property
    def _state(self) -> dict[str, Any]:
        """What tokenizer.json would hold."""
        return json.loads(self.backend.to_str())

    @cached_property
    def transparent(self) -> bool:
        """Whether the tokens of a text surely spell its normalised form, and are control tokens only where that has a
        control string: byte-level BPE, and SentencePiece's as `convert` writes it. Other tokenizers drop characters,
        spell bytes, or compare tokens as they are normalised.
        """
        state = self._state
        model, before, after = state["model"], state["pre_tokenizer"], state["decoder"]
        steps = before.get("pretokenizers", [before]) if before else []
        if model["type"] != "BPE" or self._plain_normalizer is None or any(
            model.get(key) for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix")
        ) or any(step.get("behavior") == "Removed" for step in steps):  # fmt: skip
            return False
        kinds = {step["type"] for step in steps}
        if kinds and kinds <= {"ByteLevel", "Split", "Digits"} and "ByteLevel" in kinds:
            return bool(after) and after["type"] == "ByteLevel" and self._has_all_bytes
        spelt = any(re.fullmatch("<0x..>", "".join(pair)) for pair in model["merges"])  # a byte, by text
        return kinds <= {"Metaspace"} and bool(model.get("unk_token")) and not (spelt or model.get("ignore_merges"))

    @cached_property
    def _has_all_bytes(self) -> bool:
        """A byte that has no token is dropped."""
        from tokenizers import pre_tokenizers

        return self._state["model"]["vocab"].keys() >= set(pre_tokenizers.ByteLevel.alphabet())

    @cached_property
    def _plain_normalizer(self) -> list[tuple[str, str, str]] | None:
        """The normalizer as steps of `str`, twenty times as fast; None where it does more than replace and prepend."""
        if self.backend.normalizer is None:
            return []
        state = json.loads(self.backend.normalizer.__getstate__())
        steps = [(one["type"], one.get("pattern", {}).get("String", ""), one.get("content", one.get("prepend")))
                 for one in state.get("normalizers", [state])]  # fmt: skip
        plain = all(kind == "Prepend" or (kind == "Replace" and string) for kind, string, _ in steps)
        return steps if plain else None


def missing_markers(tokenizer: Tokenizer, template: Template) -> tuple[str, ...]:
    """The template's control strings that are no token of their own, so that the model spells them in pieces."""
    strings = template.control_strings
    found = {s for s in strings if tokenizer.token_id(s) in tokenizer.encode(f"a{s}b", controls=strings)}
    return tuple(sorted(strings - found))


def load_tokenizer(source: str | PathLike) -> Tokenizer:
    """The tokenizer of "embedded" (the packaged one), a `.model` or `tokenizer.json` file, or a folder with either.

    A folder's `tokenizer.json` goes before its `tokenizer.model`. Of the files beside, `tokenizer_config.json`,
    `special_tokens_map.json` and, for a `.model`, `added_tokens.json` are read.

    Raises ModelError: no file, a broken one or one that is not read, or files beside that contradict it.
    """
    import tokenizers

    path = EMBEDDED if str(source) == "embedded" else Path(source)
    if not os.path.exists(path):
        raise ModelError(f"no tokenizer at '{path}'{_GIVE}")
    if path.is_dir():
        found = [*path.glob("tokenizer.json"), *path.glob("tokenizer.model")][:1] or [*path.glob("*.model")]
        if len(found) != 1:
            raise ModelError(f"'{path}' has no tokenizer.json and {len(found)} .model files, not one{_GIVE}")
        path = found[0]
    names = ("special_tokens_map.json", "tokenizer_config.json", "added_tokens.json")
    special_map, config, more = map(path.with_name, names)
    files = [file for file in (special_map, config, more) if file.is_file()]
    sides = {file: read_json(_SideFile, file, ModelError, _AGAIN) for file in files if file != more}
    if path.suffix == ".model":
        side = sides.get(config, _SideFile())
        added = {string: index for index, string in side.added_tokens_decoder.items()}
        added |= read_json(dict[str, int], more, ModelError, _AGAIN) if more in files else {}
        known = convert(path, added, side.legacy)
    elif path.suffix == ".json":
        try:
            backend = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises nothing narrower
            raise ModelError(f"'{path}' is no tokenizer.json ({error})\n  cure: {_AGAIN}") from None
        known = {"backend": backend, "hash": hashlib.sha256(path.read_bytes()).hexdigest()}
    else:
        raise ModelError(f"'{path}' is no tokenizer that is read (a pickle could run code){_GIVE}")
    for file, side in sides.items():  # what the second says goes before the first
        for key, string in (("bos_id", side.bos_token), ("eos_id", side.eos_token), ("pad_id", side.pad_token)):
            if string is not None:
                known[key] = known["backend"].token_to_id(string)
                if known[key] is None:
                    raise ModelError(f"'{file}': the {key[:3]}_token '{string}' is no token\n  cure: correct it")
    if path.suffix == ".model" and any(side.add_bos_token for side in sides.values()):
        known["opening"] = (known["bos_id"],)
    try:
        facts = _facts(known["backend"])
    except Exception as error:  # no vocabulary, or none for a letter or a line's end
        raise ModelError(f"'{path}' cannot encode a text ({error})\n  cure: {_AGAIN}") from None
    return Tokenizer(**facts | known, files=(path, *files))


def _facts(backend: Any) -> dict[str, Any]:
    """What a `Tokenizer` says of its backend, which from here on takes the strings of `told` for ordinary text."""
    special = [token for token in backend.get_added_tokens_decoder().values() if token.special]
    strings = frozenset(token.content for token in special)
    # A token that takes white space around it along cannot be cut out of a text.
    greedy = any(token.lstrip or token.rstrip or token.single_word for token in special)
    backend.encode_special_tokens = False
    texts = ("\n", "a", "\na", min(strings, default="") + "a")
    newline, letter, both, after = (backend.encode(text, add_special_tokens=False).ids for text in texts)
    head = () if both[len(newline) :] == letter else tuple(newline)
    opened = backend.encode("a").ids
    backend.encode_special_tokens = not greedy
    return {
        "vocab_size": max(backend.get_vocab().values()) + 1,
        "special_strings": strings,
        "told": frozenset() if greedy else strings,
        "restarts": strings if head and after[1:] == letter else frozenset(),
        "head": head,
        "opening": tuple(opened[: opened.index(letter[0])] if letter[0] in opened else ()),
    }


def with_special_tokens(tokenizer: Tokenizer, strings: Sequence[str]) -> Tokenizer:
    """The tokenizer in which each of `strings` is a special token; those that are no token get ids of their own.

    Raises ModelError: a SentencePiece model, whose file takes none, or a tokenizer.json that would give an id twice.
    """
    import tokenizers

    new = [string for string in strings if string not in tokenizer.special_strings]
    if not new:
        return tokenizer
    file, cure = tokenizer.files[0], "config.chat.labels 'numbers' or 'words'"
    if file.suffix == ".model":
        cure += ", or a tokenizer.json, which AutoTokenizer.from_pretrained(folder).save_pretrained(folder) writes"
        raise ModelError(f"'{file}' is a SentencePiece model, to which no token can be added\n  cure: {cure}")
    said, free = json.loads(tokenizer.content or file.read_bytes()), itertools.count(tokenizer.vocab_size)
    added = {token["content"]: token for token in said.get("added_tokens", ())}
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False) | {"special": True}
    for string in new:
        known = tokenizer.token_id(string)
        added[string] = {"id": next(free) if known is None else known, "content": string, **flags}
    content = json.dumps(said | {"added_tokens": [*added.values()]}, indent=2, ensure_ascii=False).encode()
    backend = tokenizers.Tokenizer.from_str(content.decode())
    if any(backend.token_to_id(string) != added[string]["id"] for string in new):  # the library counts tokens
        said = f"'{file}' leaves ids out, so that '{new[0]}' cannot get the id after its last"
        raise ModelError(f"{said}\n  cure: {cure}, or a tokenizer.json without gaps")
    known = {"backend": backend, "content": content, "hash": hashlib.sha256(content).hexdigest()}
    return replace(tokenizer, **_facts(backend), **known)


def copy_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Writes the tokenizer's files into `folder`, under the names by which `load_tokenizer(folder)` finds them."""
    first, *beside = tokenizer.files
    if tokenizer.content is None:
        shutil.copyfile(first, folder / f"tokenizer{first.suffix}")
    else:
        (folder / "tokenizer.json").write_bytes(tokenizer.content)
    for file in beside:
        shutil.copyfile(file, folder / file.name)


@pydantic.dataclasses.dataclass(frozen=True)
class _SideFile:
    """What is read of tokenizer_config.json and special_tokens_map.json."""

    bos_token: _Token | None = None
    eos_token: _Token | None = None
    pad_token: _Token | None = None
    added_tokens_decoder: dict[int, _Token] = field(default_factory=dict)
    legacy: bool | None = None
    add_bos_token: bool | None = None
