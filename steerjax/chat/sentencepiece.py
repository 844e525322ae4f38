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

    Raises:
        ModelError: no SentencePiece model, an id that two tokens have, or what a `tokenizers.Tokenizer` cannot express
            exactly: its ids are compared with SentencePiece's for every piece and for runs of characters.
    """
    import sentencepiece
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

    def refuse(what: str) -> ModelError:
        return ModelError(f"'{path}' cannot become a tokenizer.json with equal ids: it {what}{_CURE}")

    try:
        data = path.read_bytes()
        processor = sentencepiece.SentencePieceProcessor(model_proto=data)
        processor.encode("")  # raises where the model is empty
    except (RuntimeError, OSError) as error:
        raise ModelError(f"'{path}' is no SentencePiece model ({error}){_AGAIN}") from None
    model = dict(_fields(data))  # numbers as in sentencepiece_model.proto
    trainer, normalizer = (dict(_fields(model.get(number, b""))) for number in (2, 3))
    found = [dict(_fields(value)) for number, value in _fields(data) if number == 1]
    pieces = [piece[1].decode() for piece in found]

    def of(kind: int) -> list[str]:
        return [name for name, piece in zip(pieces, found, strict=True) if piece.get(3, _NORMAL) == kind]

    # No text, whose spaces are U+2581 to the model, becomes a piece with a space.
    defined = [name for name in of(_DEFINED) if " " not in name]
    prefix = bool(normalizer.get(3, 1))
    for wrong, what in (
        (trainer.get(3, 1) != 2, "is not of the type BPE"),
        (normalizer.get(2), "normalises text (a rule other than 'identity')"),
        (normalizer.get(4, 1), "removes extra white space"),
        (not normalizer.get(5, 1), "does not escape white space"),
        (trainer.get(24), "writes a space as a suffix"),
        (of(_UNUSED), "has unused pieces"),
        (prefix and defined, "has a dummy prefix and user-defined pieces"),
    ):
        if wrong:
            raise refuse(what)

    for string, index in added.items():
        taken = 0 <= index < len(pieces) and pieces[index] != string.replace(" ", SPACE)
        if index < 0 or taken or [*added.values()].count(index) > 1:
            raise ModelError(f"'{path.parent}': id {index} of the added token '{string}' is another's{_CURE}")
    added = {string: index for string, index in added.items() if index >= len(pieces)}
    if added and legacy is False:
        raise ModelError(f"'{path.parent}' adds tokens and is not \"legacy\", which is not implemented{_CURE}")

    vocab = {name: index for index, name in enumerate(pieces)}
    normal = dict.fromkeys(of(_NORMAL))
    cuts = ((name[:cut], name[cut:]) for name in normal for cut in range(1, len(name)))
    merges = [pair for pair in cuts if pair[0] in normal and pair[1] in normal]
    merges.sort(key=lambda pair: -found[vocab["".join(pair)]][2])
    bpe = {"merges": merges, "unk_token": of(_UNKNOWN)[0], "fuse_unk": True, "byte_fallback": bool(of(_BYTE))}
    backend = Tokenizer(models.BPE(vocab=vocab | added, **bpe))
    before, strip = ([normalizers.Prepend(SPACE)], [decoders.Strip(" ", 1, 0)]) if prefix else ([], [])
    backend.normalizer = normalizers.Sequence([*before, normalizers.Replace(" ", SPACE)])
    joined = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*joined, *strip])
    backend.add_special_tokens([AddedToken(name, normalized=False) for name in (*of(_CONTROL), *added)])
    # A piece with spaces is found where they are U+2581.
    backend.add_tokens([AddedToken(name, normalized=SPACE in name) for name in defined])

    backend.encode_special_tokens = True  # as SentencePiece does
    names = sorted([*normal, *defined])
    random.Random(0).shuffle(names)
    runs = (character * count + "x" for character in " =\n" for count in range(64))
    for text in (*runs, *("".join(names[start : start + 50]) for start in range(0, len(names), 50))):
        text = text.replace(SPACE, " ")
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


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """(number, value) of a protocol buffer message's fields.

    By hand, as sentencepiece's own protobuf module refuses every protobuf but the newest.
    """
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
        if kind == 0:
            yield number, varint()
        elif kind == 5:
            yield number, struct.unpack_from("<f", data, at)[0]
            at += 4
        else:
            size = varint() if kind == 2 else 8
            yield number, data[at : at + size]
            at += size
