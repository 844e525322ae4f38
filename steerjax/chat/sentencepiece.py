"""A SentencePiece BPE model as a `tokenizers.Tokenizer` with the same ids.

Source: transformers, convert_slow_tokenizer.py; but scores decide the merges, as in SentencePiece's own encoder.
"""

from __future__ import annotations

import hashlib
import json
import random
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from steerjax.errors import ModelError

SPACE = "\u2581"  # SentencePiece's space
_NORMAL, _UNKNOWN, _CONTROL, _DEFINED, _UNUSED, _BYTE = range(1, 7)  # sentencepiece_model.proto, SentencePiece.Type
_CURE = "\n  cure: AutoTokenizer.from_pretrained(folder).save_pretrained(folder) of transformers makes a tokenizer.json"
_AGAIN = "\n  cure: download it again; of Llama 3, whose tokenizer.model is tiktoken text, take the tokenizer.json"


def convert(path: Path, added: Mapping[str, int], legacy: bool | None) -> dict[str, Any]:
    """The model at `path`, and the tokens that the files beside add after its pieces, as fields of a `Tokenizer`.

    Control pieces and added tokens are special tokens, user-defined pieces added tokens that are not special. Those of
    one character or of white space only shape the tokens of ordinary text; the others are the special strings.

    Raises ModelError: no SentencePiece model, an id that two tokens have, or ids that a `tokenizers.Tokenizer` cannot
    have: they are compared with SentencePiece's for every piece and for runs of characters.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

    def refuse(what: str) -> ModelError:
        return ModelError(f"'{path}' cannot become a tokenizer.json with equal ids: it {what}{_CURE}")

    data, processor = _opened(path)
    model = [*_fields(data)]  # numbers as in sentencepiece_model.proto
    normalizer = dict(_fields(dict(model).get(3, b"")))
    fields = (dict(_fields(value)) for number, value in model if number == 1)
    pieces = [(piece[1].decode(), piece.get(2, 0.0), piece.get(3, _NORMAL)) for piece in fields]

    def of(*kinds: int) -> dict[str, float]:
        return {name: score for name, score, kind in pieces if kind in kinds}

    if normalizer.get(2):
        raise refuse("normalises text (a rule other than 'identity')")
    names = dict(enumerate(name for name, _, _ in pieces))
    for string, index in added.items():
        if index < 0 or names.setdefault(index, string) not in (string, string.replace(" ", SPACE)):
            raise refuse(f"has another token with the id {index} of the added '{string}'")
    added = {string: index for string, index in added.items() if index >= len(pieces)}
    if added and legacy is False:
        raise refuse('has added tokens and is not "legacy"')

    normal = of(_NORMAL)
    cuts = ((name[:cut], name[cut:]) for name in normal for cut in range(1, len(name)))
    merges = [pair for pair in cuts if pair[0] in normal and pair[1] in normal]
    merges.sort(key=lambda pair: -normal["".join(pair)])
    vocab = {name: index for index, name in names.items()}
    bpe = {"merges": merges, "unk_token": next(iter(of(_UNKNOWN))), "fuse_unk": True, "byte_fallback": bool(of(_BYTE))}
    backend = Tokenizer(models.BPE(vocab=vocab, **bpe))
    prefix = normalizer.get(3, 1)
    before, strip = ([normalizers.Prepend(SPACE)], [decoders.Strip(" ", 1, 0)]) if prefix else ([], [])
    backend.normalizer = normalizers.Sequence([*before, normalizers.Replace(" ", SPACE)])
    joined = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*joined, *strip])
    backend.add_special_tokens([AddedToken(name, normalized=False) for name in (*of(_CONTROL), *added)])
    defined = [name for name in of(_DEFINED) if " " not in name]  # no text, whose spaces are U+2581, becomes another
    backend.add_tokens([AddedToken(name, normalized=SPACE in name) for name in defined])

    backend.encode_special_tokens = True  # as SentencePiece does
    for text in _compared(sorted(of(_NORMAL, _DEFINED, _UNUSED))):
        if backend.encode(text).ids != processor.encode(text):
            raise refuse(f"has other ids for {text!r}")
    strings = (name.replace(SPACE, " ") for name in defined if len(name) > 1)
    own = {"bos_id": processor.bos_id(), "eos_id": processor.eos_id(), "pad_id": processor.pad_id()}
    return {
        "backend": backend,
        "special_strings": frozenset(string for string in strings if not string.isspace()),
        "hash": hashlib.sha256(data + (json.dumps(added, sort_keys=True).encode() if added else b"")).hexdigest(),
        **{key: index for key, index in own.items() if index >= 0},
    }


def _opened(path: Path) -> tuple[bytes, Any]:
    """The file and its `SentencePieceProcessor`."""
    import sentencepiece

    try:
        data = path.read_bytes()
        processor = sentencepiece.SentencePieceProcessor(model_proto=data)
        processor.encode("")  # raises where the model is empty
    except (RuntimeError, OSError) as error:
        raise ModelError(f"'{path}' is no SentencePiece model ({error}){_AGAIN}") from None
    return data, processor


def _compared(pieces: list[str]) -> Iterator[str]:
    """Texts that hold every piece, and runs of characters."""
    random.Random(0).shuffle(pieces)
    runs = [character * count for character in " =\n" for count in range(64)]
    for text in runs + ["".join(pieces[start : start + 50]) for start in range(0, len(pieces), 50)]:
        yield text.replace(SPACE, " ") + "x"


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """(number, value) of a protocol buffer message's fields; sentencepiece's module refuses every protobuf but one."""
    at = 0

    def varint() -> int:
        nonlocal at
        byte, at = data[at], at + 1
        return byte & 0x7F | (varint() << 7 if byte & 0x80 else 0)

    while at < len(data):
        number, kind = divmod(varint(), 8)
        if kind == 0:
            yield number, varint()
        elif kind == 5:
            yield number, struct.unpack_from("<f", data, at)[0]
            at += 4
        else:
            size = varint() if kind == 2 else 8
            yield number, data[at : at + size]
            at += size
