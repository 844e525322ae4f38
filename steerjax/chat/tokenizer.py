"""One small interface over SentencePiece `.model` files and Hugging Face `tokenizer.json` files.

`encode` and `decode` are inverses except where a tokenizer's own normalisation loses text. SentencePiece stores a space
as U+2581, so a U+2581 that stands in the text comes back as a space, whatever the model.
"""

from __future__ import annotations

import hashlib
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from os import PathLike
from pathlib import Path
from typing import Annotated, Any

import pydantic
from pydantic import BeforeValidator

from steerjax.chat.templates import Template
from steerjax.errors import ModelError
from steerjax.typed import read_json

EMBEDDED = Path(__file__).with_name("embedded.model")  # made by scripts/train_tokenizer.py
SPACE = "\u2581"  # SentencePiece's space
WORD_JOINER = "\u2060"  # zero-width, breaks no line, and NFKC keeps it
HIDE = "\udc00"  # half a surrogate, which no text contains; see `Tokenizer.encode`

_CONFIG, _MAP, _ADDED = "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"
_GIVE = "\n  cure: give 'embedded', a SentencePiece .model file, a tokenizer.json, or a downloaded model's folder"
_AGAIN = "download it again"
_CONVERT = (
    "\n  cure: AutoTokenizer.from_pretrained(folder).save_pretrained(folder) of transformers makes a tokenizer.json"
)


@lru_cache(maxsize=256)
def any_of(strings: frozenset[str]) -> re.Pattern[str]:
    """Matches each of `strings`, of which there is at least one; the longest first."""
    return re.compile("(" + "|".join(map(re.escape, sorted(strings, key=len, reverse=True))) + ")")


def broken(string: str, mark: str = WORD_JOINER) -> str:
    """`string` as a text may contain it: with `mark` after its first character."""
    return string[0] + mark + string[1:] if len(string) > 1 else "\ufffd"


@dataclass(frozen=True, eq=False, kw_only=True)
class Tokenizer(ABC):
    """Text to token ids and back.

    Attributes:
        vocab_size: ids are below it.
        special_strings: strings that become a special token wherever they stand in text.
        told: strings that `HIDE` keeps from becoming a token.
        head: the tokens of a "\\n" put before a continuation; () where text has the same tokens first and later.
        files: what a copy needs; the first is the one that was loaded.
        hash: hexadecimal sha256 of what defines the ids.
        bos_id, eos_id, pad_id: None where the tokenizer has none.
    """

    vocab_size: int
    special_strings: frozenset[str]
    told: frozenset[str]
    head: tuple[int, ...]
    files: tuple[Path, ...]
    hash: str
    bos_id: int | None = None
    eos_id: int | None = None
    pad_id: int | None = None

    def encode(self, text: str, *, continuation: bool = False, controls: frozenset[str] = frozenset()) -> list[int]:
        """Token ids of `text`; BOS and EOS are never added.

        Args:
            text: special strings in it become their ids, those of `told` with `HIDE` inside become ordinary text.
            continuation: the text goes on after other text, so no dummy prefix is put before it.
            controls: control strings of the template. Those that text never becomes by itself (SentencePiece's `<s>`)
                become their ids too.

        Raises:
            ModelError: the tokenizer joins "\\n" to what follows, so that a continuation cannot be encoded.
        """
        hidden, fresh = HIDE in text, not continuation or not self.head
        cuts, ids = self._cuts(hidden, controls), []
        for index, part in enumerate(any_of(cuts).split(text) if cuts else [text]):
            if index % 2:
                ids.append(self.token_id(part))
                fresh = not self.head or self.restarts_after(part)
            elif plain := part.replace(HIDE, ""):
                ids += self._plain(plain, hidden) if fresh else self._after_newline(plain, hidden)
        return ids

    def _after_newline(self, text: str, hidden: bool) -> list[int]:
        ids = self._plain("\n" + text, hidden)
        if tuple(ids[: len(self.head)]) != self.head:
            raise ModelError(
                f"the tokenizer joins a newline to the text after it, {text[:40]!r}, so text cannot be continued\n"
                "  cure: use a tokenizer that adds no prefix to text, or that keeps a newline apart"
            )
        return ids[len(self.head) :]

    def decode(self, ids: Sequence[int], *, continuation: bool = False) -> str:
        """Text of `ids`, special tokens included; `continuation` keeps the leading space that a fresh text loses.

        An id that is no token's spells nothing: an embedding may have more rows than its tokenizer has tokens.
        """
        head = self.head if continuation else ()
        text = self._decode([*head, *map(int, ids)])
        return text[1:] if head else text

    @abstractmethod
    def token_id(self, string: str) -> int | None:
        """The id of the token spelt `string`, None if it is no token."""

    @abstractmethod
    def spelling(self, index: int) -> str:
        """The inverse of `token_id`."""

    @abstractmethod
    def restarts_after(self, string: str) -> bool:
        """Whether text right after the special token `string` is encoded as a fresh text."""

    @abstractmethod
    def normalized(self, text: str) -> str:
        """`text` as the tokenizer's model sees it."""

    @abstractmethod
    def _cuts(self, hidden: bool, controls: frozenset[str]) -> frozenset[str]:
        """The strings that `encode` cuts out of the text and replaces by their ids."""

    @abstractmethod
    def _plain(self, text: str, hidden: bool) -> list[int]:
        """Token ids of a fresh text; `hidden`: special strings are ordinary text."""

    @abstractmethod
    def _decode(self, ids: list[int]) -> str: ...


def _head(encode: Callable[[str], list[int]]) -> tuple[int, ...]:
    newline = encode("\n")
    return () if encode("\na")[len(newline) :] == encode("a") else tuple(newline)


@dataclass(frozen=True, eq=False, kw_only=True)
class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece model.

    Attributes:
        added: the tokens after the model's pieces, from the files beside it.
        controls: what text never becomes: control pieces and added tokens. A fresh text begins after each, as in Meta's
            code and in Hugging Face's with `legacy`.
        defined: user-defined pieces, which always become one token; spaces as spaces.
    """

    processor: Any
    added: Mapping[str, int]
    controls: Mapping[str, int]
    defined: frozenset[str]

    def token_id(self, string: str) -> int | None:
        piece = string.replace(" ", SPACE)
        index = self.processor.piece_to_id(piece)
        return index if self.processor.id_to_piece(index) == piece else self.added.get(string)

    def spelling(self, index: int) -> str:
        added = {index: string for string, index in self.added.items()}
        return added.get(index) or self.processor.id_to_piece(index).replace(SPACE, " ")

    def restarts_after(self, string: str) -> bool:
        return string in self.controls

    def normalized(self, text: str) -> str:
        return self.processor.normalize(text).replace(SPACE, " ")

    def _cuts(self, hidden: bool, controls: frozenset[str]) -> frozenset[str]:
        return frozenset(controls & self.controls.keys())

    def _plain(self, text: str, hidden: bool) -> list[int]:
        return self.processor.encode(text)

    def _decode(self, ids: list[int]) -> str:
        spelling = {index: string for string, index in self.controls.items()}
        text, pending = "", []
        for index in ids:
            if index in spelling:
                text, pending = text + self.processor.decode(pending) + spelling[index], []
            elif index < self.processor.vocab_size():
                pending.append(index)
        return text + self.processor.decode(pending)


@dataclass(frozen=True, eq=False, kw_only=True)
class HuggingFaceTokenizer(Tokenizer):
    """A `tokenizer.json`."""

    backend: Any

    def token_id(self, string: str) -> int | None:
        return self.backend.token_to_id(string)

    def spelling(self, index: int) -> str:
        return self.backend.id_to_token(index)

    def restarts_after(self, string: str) -> bool:
        if not self.head or string not in self.special_strings:
            return False
        return self._plain(string + "a", False)[len(self._plain(string, False)) :] == self._plain("a", False)

    def normalized(self, text: str) -> str:
        normalizer = self.backend.normalizer
        return normalizer.normalize_str(text) if normalizer else text

    @cached_property
    def _literal(self) -> Any:
        """The backend, to which special tokens in a text are ordinary text."""
        backend = type(self.backend).from_str(self.backend.to_str())
        backend.encode_special_tokens = True
        return backend

    def _cuts(self, hidden: bool, controls: frozenset[str]) -> frozenset[str]:
        return self.told if hidden else frozenset()

    def _plain(self, text: str, hidden: bool) -> list[int]:
        return (self._literal if hidden else self.backend).encode(text, add_special_tokens=False).ids

    def _decode(self, ids: list[int]) -> str:
        return self.backend.decode(ids, skip_special_tokens=False)


def missing_markers(tokenizer: Tokenizer, template: Template) -> tuple[str, ...]:
    """The template's control strings that are no token of their own, so that the model spells them in pieces."""
    strings = template.control_strings
    found = {s for s in strings if tokenizer.token_id(s) in tokenizer.encode(f"a{s}b", controls=strings)}
    return tuple(sorted(strings - found))


def load_tokenizer(source: str | PathLike) -> Tokenizer:
    """The tokenizer of "embedded" (the packaged one), a `.model` or `tokenizer.json` file, or a folder with either.

    A folder's `tokenizer.json` goes before its `tokenizer.model`. Of the files beside, `tokenizer_config.json`,
    `special_tokens_map.json` and, for a `.model`, `added_tokens.json` are read.

    Raises:
        ModelError: nothing there, no tokenizer in the folder, a broken file, or a format that is not read.
    """
    path = EMBEDDED if str(source) == "embedded" else Path(source)
    if not path.exists():
        raise ModelError(f"no tokenizer at '{path}'{_GIVE}")
    path = _file_in(path) if path.is_dir() else path
    if path.suffix not in _LOADERS:
        raise ModelError(f"'{path}' is no tokenizer that is read (a pickle could run code){_GIVE}")
    tokenizer = _LOADERS[path.suffix](path)
    return replace(tokenizer, **_named_ids(path, tokenizer))


def copy_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Writes the tokenizer's files into `folder`, under the names by which `load_tokenizer(folder)` finds them."""
    first, *beside = tokenizer.files
    (folder / f"tokenizer{first.suffix}").write_bytes(first.read_bytes())
    for file in beside:
        (folder / file.name).write_bytes(file.read_bytes())


def _file_in(folder: Path) -> Path:
    named = [folder / name for name in ("tokenizer.json", "tokenizer.model") if (folder / name).is_file()]
    found = named[:1] or sorted(folder.glob("*.model"))
    if not found:
        raise ModelError(f"the folder '{folder}' has neither tokenizer.json nor a SentencePiece .model file{_GIVE}")
    if len(found) > 1:
        names = ", ".join(file.name for file in found)
        raise ModelError(f"the folder '{folder}' has several .model files: {names}\n  cure: name one of them")
    return found[0]


def _load_sentencepiece(path: Path) -> SentencePieceTokenizer:
    import sentencepiece

    try:
        model = path.read_bytes()
        processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        size = processor.vocab_size()
        if not size:
            raise RuntimeError("empty")
    except (RuntimeError, OSError) as error:
        raise ModelError(
            f"'{path}' is no SentencePiece model ({error})\n"
            "  cure: download it again; Llama 3's original tokenizer.model is tiktoken text: use its tokenizer.json"
        ) from None
    defined, added = _user_defined_pieces(model), _added_tokens(path, processor)
    controls = {processor.id_to_piece(i): i for i in range(size) if processor.is_control(i)} | added
    own = {"bos_id": processor.bos_id(), "eos_id": processor.eos_id(), "pad_id": processor.pad_id()}
    return SentencePieceTokenizer(
        processor=processor,
        vocab_size=max([size - 1, *added.values()]) + 1,
        # One-character pieces (digits, in some models) only shape the tokens of ordinary text.
        special_strings=frozenset(piece for piece in defined if len(piece) > 1 and piece.strip()),
        told=frozenset(controls),
        head=_head(processor.encode),
        **{key: index for key, index in own.items() if index >= 0},
        files=_files(path, _ADDED, _MAP, _CONFIG),
        hash=hashlib.sha256(model + (json.dumps(added, sort_keys=True).encode() if added else b"")).hexdigest(),
        added=added,
        controls=controls,
        defined=defined,
    )


def _added_tokens(path: Path, processor: Any) -> dict[str, int]:
    """Tokens that the files beside a .model put after its pieces, as Hugging Face's slow tokenizers read them.

    Raises:
        ModelError: an id that is another token's, or a way to split texts that is not ours.
    """
    config = _side_file(path.with_name(_CONFIG))
    added = {string: index for index, string in config.added_tokens_decoder.items()}
    if (file := path.with_name(_ADDED)).is_file():
        added |= read_json(dict[str, int], file, ModelError, _AGAIN)
    size, ids = processor.vocab_size(), list(added.values())
    for string, index in added.items():
        taken = 0 <= index < size and processor.id_to_piece(index) != string.replace(" ", SPACE)
        if index < 0 or taken or ids.count(index) > 1:
            raise ModelError(f"'{path.parent}': id {index} of the added token '{string}' is another's{_CONVERT}")
    after = {string: index for string, index in added.items() if index >= size}
    if after and config.legacy is False:
        raise ModelError(f"'{path.parent}' adds tokens and is not \"legacy\", which is not implemented{_CONVERT}")
    return after


def read_message(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """(field number, value) of a protocol buffer message; numbers of fixed size come as bytes."""
    at = 0

    def varint() -> int:
        nonlocal at
        value, shift = 0, 0
        while data[at] & 0x80:
            value, shift, at = value | (data[at] & 0x7F) << shift, shift + 7, at + 1
        at += 1
        return value | data[at - 1] << shift

    while at < len(data):
        number, kind = divmod(varint(), 8)
        value = varint() if kind in (0, 2) else {1: 8, 5: 4}[kind]
        if kind:
            value, at = data[at : at + value], at + value
        yield number, value


def _user_defined_pieces(model: bytes) -> frozenset[str]:
    """Strings that always become one piece, spaces as spaces.

    Read from the file because the Python API does not tell them from normal pieces, and sentencepiece's protobuf module
    refuses every protobuf but the newest. Source: sentencepiece_model.proto, `ModelProto.pieces` = 1 with `piece` = 1
    and `type` = 3, where USER_DEFINED = 4.
    """
    pieces = (dict(read_message(value)) for number, value in read_message(model) if number == 1)
    return frozenset(piece[1].decode("utf-8").replace(SPACE, " ") for piece in pieces if piece.get(3) == 4)


def _load_huggingface(path: Path) -> HuggingFaceTokenizer:
    import tokenizers

    try:
        backend = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing narrower
        raise ModelError(f"'{path}' is no tokenizer.json ({error})\n  cure: {_AGAIN}") from None
    special = [token for token in backend.get_added_tokens_decoder().values() if token.special]
    # A token that takes white space around it along cannot be cut out of a text.
    plain = not any(token.lstrip or token.rstrip or token.single_word for token in special)
    return HuggingFaceTokenizer(
        vocab_size=max(backend.get_vocab(with_added_tokens=True).values()) + 1,
        special_strings=frozenset(token.content for token in special),
        told=frozenset(token.content for token in special if plain and len(token.content) > 1),
        head=_head(lambda text: backend.encode(text, add_special_tokens=False).ids),
        files=_files(path, _MAP, _CONFIG),
        hash=hashlib.sha256(path.read_bytes()).hexdigest(),
        backend=backend,
    )


_LOADERS = {".model": _load_sentencepiece, ".json": _load_huggingface}


_Spelling = Annotated[str, BeforeValidator(lambda token: token.get("content") if isinstance(token, dict) else token)]


@pydantic.dataclasses.dataclass(frozen=True, config=pydantic.ConfigDict(extra="ignore", strict=True))
class _SideFile:
    """What is read of tokenizer_config.json and special_tokens_map.json."""

    bos_token: _Spelling | None = None
    eos_token: _Spelling | None = None
    pad_token: _Spelling | None = None
    added_tokens_decoder: dict[int, _Spelling] = field(default_factory=dict)
    legacy: bool | None = None


def _side_file(path: Path) -> _SideFile:
    return read_json(_SideFile, path, ModelError, _AGAIN) if path.is_file() else _SideFile()


def _files(path: Path, *beside: str) -> tuple[Path, ...]:
    return path, *(file for file in map(path.with_name, beside) if file.is_file())


def _named_ids(path: Path, tokenizer: Tokenizer) -> dict[str, int]:
    """`bos_id` and the like as the files beside name them; tokenizer_config.json goes first. Raises ModelError."""
    ids = {}
    for file in (path.with_name(_MAP), path.with_name(_CONFIG)):
        side = _side_file(file)
        for key, string in (("bos", side.bos_token), ("eos", side.eos_token), ("pad", side.pad_token)):
            if string is not None and (index := tokenizer.token_id(string)) is None:
                raise ModelError(f"'{file}': {key}_token '{string}' is no token of '{path.name}'\n  cure: correct it")
            ids |= {f"{key}_id": index} if string is not None else {}
    return ids
