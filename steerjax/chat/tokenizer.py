"""One small interface over SentencePiece `.model` files and Hugging Face `tokenizer.json` files.

`encode` and `decode` are inverses except where a tokenizer's own normalisation loses text. SentencePiece stores a space
as U+2581, so a U+2581 that stands in the text comes back as a space, whatever the model.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

from steerjax.errors import ModelError

EMBEDDED = Path(__file__).with_name("embedded.model")  # made by scripts/train_tokenizer.py

_PICKLES = {".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt"}
_FOLDER_FILES = ("tokenizer.json", "tokenizer.model")
_SPACE = "\u2581"  # SentencePiece's space
_NEWLINE = "\n"


class Tokenizer(Protocol):
    """Text to token ids and back.

    Attributes:
        vocab_size: ids are below it.
        special_strings: strings that become a special token wherever they stand in text.
        bos_id, eos_id, pad_id: None where the tokenizer has none.
        files: what an export copies.
        hash: hexadecimal sha256 of the file that defines the ids (not of the configuration beside it).
    """

    vocab_size: int
    special_strings: frozenset[str]
    bos_id: int | None
    eos_id: int | None
    pad_id: int | None
    files: tuple[Path, ...]
    hash: str

    def encode(self, text: str, *, continuation: bool = False, controls: frozenset[str] = frozenset()) -> list[int]:
        """Token ids of `text`; BOS and EOS are never added.

        Args:
            text: special strings in it become their ids.
            continuation: the text goes on after other text, so no dummy prefix is put before it.
            controls: control strings of the template. Those that are SentencePiece control pieces (`<s>`, `</s>`),
                which text never becomes by itself, become their ids too, and a fresh text begins after each.

        Raises:
            ModelError: the tokenizer joins "\\n" to what follows, so that a continuation cannot be encoded.
        """

    def decode(self, ids: Sequence[int], *, continuation: bool = False) -> str:
        """Text of `ids`, special tokens included; `continuation` keeps the leading space that a fresh text loses."""

    def token_id(self, string: str) -> int | None:
        """The id of the token spelt `string`, None if it is no token."""

    def restarts_after(self, string: str) -> bool:
        """Whether text right after the special token `string` is encoded as a fresh text."""


@lru_cache(maxsize=256)
def _splitter(strings: frozenset[str]) -> re.Pattern[str]:
    return re.compile("(" + "|".join(map(re.escape, sorted(strings, key=len, reverse=True))) + ")")


def split_at(text: str, strings: frozenset[str]) -> list[str]:
    """`text` cut at every one of `strings`: plain text at even positions, the strings at odd ones."""
    return _splitter(strings).split(text) if strings else [text]


def _continuation_head(encode: Callable[[str], list[int]]) -> tuple[int, ...]:
    """The tokens of a "\\n" put before a continuation; () where text has the same tokens first and later."""
    newline = encode(_NEWLINE)
    return () if encode(_NEWLINE + "a")[len(newline) :] == encode("a") else tuple(newline)


def _encode_after(encode: Callable[[str], list[int]], head: tuple[int, ...], text: str) -> list[int]:
    """Token ids of `text` as it stands after a "\\n" whose tokens are `head`.

    Raises:
        ModelError: the tokens do not begin with `head`.
    """
    if not text:
        return []
    ids = encode(_NEWLINE + text)
    if tuple(ids[: len(head)]) != head:
        raise ModelError(
            f"the tokenizer joins a newline to the text {text[:40]!r} that follows it, so text cannot be continued\n"
            "  cure: use a tokenizer that adds no prefix to text, or that keeps a newline apart"
        )
    return ids[len(head) :]


@dataclass(frozen=True, eq=False)
class SentencePieceTokenizer:
    """A SentencePiece model; `controls` are its control pieces, `head` the tokens of `_continuation_head`."""

    processor: Any
    vocab_size: int
    special_strings: frozenset[str]
    controls: Mapping[str, int]
    head: tuple[int, ...]
    bos_id: int | None
    eos_id: int | None
    pad_id: int | None
    files: tuple[Path, ...]
    hash: str

    def encode(self, text: str, *, continuation: bool = False, controls: frozenset[str] = frozenset()) -> list[int]:
        ids: list[int] = []
        for index, part in enumerate(split_at(text, frozenset(controls & self.controls.keys()))):
            if index % 2:
                ids.append(self.controls[part])
            elif continuation and self.head and index == 0:
                ids += _encode_after(self.processor.encode, self.head, part)
            else:
                ids += self.processor.encode(part)
        return ids

    def decode(self, ids: Sequence[int], *, continuation: bool = False) -> str:
        spelling = {index: piece for piece, index in self.controls.items()}
        text, pending = "", list(self.head) if continuation else []
        for index in map(int, ids):
            if index in spelling:
                text, pending = text + self.processor.decode(pending) + spelling[index], []
            else:
                pending.append(index)
        text += self.processor.decode(pending)
        return text[len(_NEWLINE) :] if continuation and self.head else text

    def token_id(self, string: str) -> int | None:
        piece = string.replace(" ", _SPACE)
        index = self.processor.piece_to_id(piece)
        return index if self.processor.id_to_piece(index) == piece else None

    def restarts_after(self, string: str) -> bool:
        return string in self.controls


@dataclass(frozen=True, eq=False)
class HuggingFaceTokenizer:
    """A `tokenizer.json`; `head` as in `SentencePieceTokenizer`."""

    backend: Any
    vocab_size: int
    special_strings: frozenset[str]
    head: tuple[int, ...]
    bos_id: int | None
    eos_id: int | None
    pad_id: int | None
    files: tuple[Path, ...]
    hash: str

    def _plain(self, text: str) -> list[int]:
        return self.backend.encode(text, add_special_tokens=False).ids

    def encode(self, text: str, *, continuation: bool = False, controls: frozenset[str] = frozenset()) -> list[int]:
        if continuation and self.head:
            return _encode_after(self._plain, self.head, text)
        return self._plain(text)

    def decode(self, ids: Sequence[int], *, continuation: bool = False) -> str:
        head = list(self.head) if continuation else []
        text = self.backend.decode([*head, *map(int, ids)], skip_special_tokens=False)
        return text[len(_NEWLINE) :] if head else text

    def token_id(self, string: str) -> int | None:
        return self.backend.token_to_id(string)

    def restarts_after(self, string: str) -> bool:
        if not self.head or string not in self.special_strings:
            return False
        return self._plain(string + "a")[len(self._plain(string)) :] == self._plain("a")


def load_tokenizer(source: str | Path) -> Tokenizer:
    """The tokenizer of "embedded" (the packaged one), a `.model` or `tokenizer.json` file, or a folder with either.

    A folder's `tokenizer.json` goes before its `tokenizer.model`.

    Raises:
        ModelError: nothing there, no tokenizer in the folder, a broken file, or a format that is not read.
    """
    path = EMBEDDED if str(source) == "embedded" else Path(source)
    if not path.exists():
        raise ModelError(
            f"no tokenizer at '{path}'\n"
            "  cure: give 'embedded', a SentencePiece .model file, a tokenizer.json, or a downloaded model's folder"
        )
    if path.is_dir():
        path = _file_in(path)
    if path.suffix in _PICKLES:
        raise ModelError(
            f"'{path}' may hold a pickle, which can run code; only .model and tokenizer.json files are read\n"
            "  cure: give the SentencePiece .model file or the tokenizer.json of the model"
        )
    if path.suffix == ".model":
        return _load_sentencepiece(path)
    if path.suffix == ".json":
        return _load_huggingface(path)
    raise ModelError(
        f"'{path}' is no tokenizer that is read\n  cure: give a SentencePiece .model or a tokenizer.json file"
    )


def _file_in(folder: Path) -> Path:
    candidates = [folder / name for name in _FOLDER_FILES if (folder / name).is_file()] or sorted(
        folder.glob("*.model")
    )
    if not candidates:
        raise ModelError(
            f"the folder '{folder}' has neither tokenizer.json nor a SentencePiece .model file\n"
            "  cure: copy the tokenizer's files of the base model into it, or name a tokenizer of its own"
        )
    if candidates[0].name not in _FOLDER_FILES and len(candidates) > 1:
        names = ", ".join(candidate.name for candidate in candidates)
        raise ModelError(f"the folder '{folder}' has several .model files: {names}\n  cure: name one of them")
    return candidates[0]


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _load_sentencepiece(path: Path) -> SentencePieceTokenizer:
    import sentencepiece

    try:
        model = path.read_bytes()
        processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        size = processor.vocab_size()
    except (RuntimeError, OSError) as error:
        raise ModelError(
            f"'{path}' is no SentencePiece model ({error})\n"
            "  cure: download it again; Llama 3's original tokenizer.model is tiktoken text: use its tokenizer.json"
        ) from None
    if not size:
        raise ModelError(f"'{path}' is an empty SentencePiece model\n  cure: download it again")
    defined = _user_defined_pieces(model)

    def known(index: int) -> int | None:
        return index if index >= 0 else None

    return SentencePieceTokenizer(
        processor=processor,
        vocab_size=size,
        # One-character pieces (digits, in some models) only shape the tokens of ordinary text.
        special_strings=frozenset(piece for piece in defined if len(piece) > 1 and piece.strip()),
        controls={processor.id_to_piece(i): i for i in range(size) if processor.is_control(i)},
        head=_continuation_head(processor.encode),
        bos_id=known(processor.bos_id()),
        eos_id=known(processor.eos_id()),
        pad_id=known(processor.pad_id()),
        files=(path,),
        hash=_sha256(path),
    )


def _read_varint(data: bytes, at: int) -> tuple[int, int]:
    value, shift = 0, 0
    while data[at] & 0x80:
        value, shift, at = value | (data[at] & 0x7F) << shift, shift + 7, at + 1
    return value | data[at] << shift, at + 1


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """(field number, value) of a protocol buffer message; numbers of fixed size come as bytes."""
    at = 0
    while at < len(data):
        key, at = _read_varint(data, at)
        kind = key & 7
        if kind == 0:
            value, at = _read_varint(data, at)
        else:
            size, at = _read_varint(data, at) if kind == 2 else ({1: 8, 5: 4}[kind], at)
            value, at = data[at : at + size], at + size
        yield key >> 3, value


def _user_defined_pieces(model: bytes) -> set[str]:
    """Strings that always become one piece, spaces as spaces.

    Read from the file because the Python API does not tell them from normal pieces, and its protobuf module would make
    protobuf a dependency. Source: sentencepiece_model.proto, `ModelProto.pieces` = 1 with `piece` = 1 and `type` = 3,
    where USER_DEFINED = 4.
    """
    pieces = set()
    for number, value in _fields(model):
        if number == 1 and isinstance(value, bytes):
            piece = dict(_fields(value))
            if piece.get(3) == 4:
                pieces.add(piece[1].decode("utf-8").replace(_SPACE, " "))
    return pieces


def _load_huggingface(path: Path) -> HuggingFaceTokenizer:
    import tokenizers

    try:
        backend = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing narrower
        raise ModelError(f"'{path}' is no tokenizer.json ({error})\n  cure: download it again") from None
    names = _special_names(path.parent)

    def named(key: str) -> int | None:
        if key not in names:
            return None
        index = backend.token_to_id(names[key])
        if index is None:
            raise ModelError(
                f"{key} '{names[key]}' of '{path.parent}' is no token of '{path.name}'\n"
                "  cure: correct tokenizer_config.json or special_tokens_map.json"
            )
        return index

    def encode(text: str) -> list[int]:
        return backend.encode(text, add_special_tokens=False).ids

    return HuggingFaceTokenizer(
        backend=backend,
        vocab_size=max(backend.get_vocab(with_added_tokens=True).values()) + 1,
        special_strings=frozenset(t.content for t in backend.get_added_tokens_decoder().values() if t.special),
        head=_continuation_head(encode),
        bos_id=named("bos_token"),
        eos_id=named("eos_token"),
        pad_id=named("pad_token"),
        files=tuple(file for file in (path, *_beside(path.parent)) if file.is_file()),
        hash=_sha256(path),
    )


def _beside(folder: Path) -> tuple[Path, Path]:
    return folder / "special_tokens_map.json", folder / "tokenizer_config.json"


def _special_names(folder: Path) -> dict[str, str]:
    """`bos_token` and the like of the two files beside a tokenizer.json; tokenizer_config.json goes first.

    Raises:
        ModelError: a file that is no JSON object.
    """
    names: dict[str, str] = {}
    for file in _beside(folder):
        if not file.is_file():
            continue
        try:
            entries = json.loads(file.read_text(encoding="utf-8")).items()
        except (ValueError, AttributeError) as error:
            raise ModelError(f"'{file}' is no JSON object ({error})\n  cure: download it again") from None
        for key, value in entries:
            content = value.get("content") if isinstance(value, dict) else value
            if key in ("bos_token", "eos_token", "pad_token") and isinstance(content, str):
                names[key] = content
    return names
