"""The tokenizer's files of an exported model: what stock servers need to make the renderer's tokens.

`tokenizer.json` alone decides the ids, and adds no BOS or EOS: the chat template writes them where they belong.
"""

from __future__ import annotations

import json
import random
import shutil
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from steerjax.chat.templates import Template
from steerjax.chat.tokenizer import HuggingFaceTokenizer, SentencePieceTokenizer, Tokenizer, _fields
from steerjax.errors import ModelError

_SPACE = "\u2581"  # SentencePiece's space
_KEPT = ("model_max_length", "padding_side", "truncation_side")  # of a source's tokenizer_config.json
_ADDING = ("TemplateProcessing", "BertProcessing", "RobertaProcessing")  # post-processors that add tokens
_CURE = "\n  cure: convert it yourself, and train and export with that tokenizer.json"


def special_tokens(tokenizer: Tokenizer, template: Template) -> dict[str, str]:
    """`bos_token`, `eos_token` and `pad_token` of an export, those there are; `tokenizer.token_id` gives their ids.

    * `eos_token`, where a server stops, is the template's end where that is one token, else the tokenizer's own.
    * `pad_token` is an existing token that the template never writes: transformers reads a reward before the first
      padding token, so a reward that is read at `<|im_end|>` must not be padded with it.
    * `bos_token` of a SentencePiece model is named only if the template writes it, as a server takes the text of a
      named token (`<s>`, struck-through text in HTML) for the token.
    """
    end = template.end.strip()
    found = {
        "bos_token": _spelling(tokenizer, tokenizer.bos_id),
        "eos_token": end if _one_token(tokenizer, end) else _spelling(tokenizer, tokenizer.eos_id),
    }
    if isinstance(tokenizer, SentencePieceTokenizer) and found["bos_token"] not in template.control_strings:
        del found["bos_token"]
    others = sorted(tokenizer.special_strings, key=lambda string: tokenizer.token_id(string) or 0)
    if isinstance(tokenizer, SentencePieceTokenizer):
        others.insert(0, tokenizer.processor.id_to_piece(tokenizer.processor.unk_id()))
    padding = [_spelling(tokenizer, tokenizer.pad_id), _spelling(tokenizer, tokenizer.eos_id), *others]
    taken = template.control_strings | {found.get("bos_token")}
    found["pad_token"] = next((string for string in padding if string is not None and string not in taken), None)
    return {key: string for key, string in found.items() if string is not None}


def stop_tokens(tokenizer: Tokenizer, template: Template) -> list[int]:
    """Ids that end an answer, ascending: every control string or special token, as in `decoding.stopping`."""
    controls = {string for string in template.control_strings if _one_token(tokenizer, string)}
    ids = {tokenizer.token_id(string) for string in controls | tokenizer.special_strings}
    return sorted(index for index in ids | {tokenizer.eos_id, tokenizer.bos_id} if index is not None)


def _one_token(tokenizer: Tokenizer, string: str) -> bool:
    return string in tokenizer.special_strings or tokenizer.restarts_after(string)


def special_strings(tokenizer: Tokenizer, template: Template) -> frozenset[str]:
    """Strings that become a token wherever they stand in a text, in the exported tokenizer: texts must lack them."""
    return tokenizer.special_strings | frozenset(special_tokens(tokenizer, template).values())


def write_tokenizer(folder: Path, tokenizer: Tokenizer, template: Template, chat_template: str) -> None:
    """Writes tokenizer.json, tokenizer_config.json, special_tokens_map.json and chat_template.jinja into `folder`.

    A SentencePiece model becomes a tokenizer.json with the same ids; the model itself is copied beside it.

    Raises:
        ModelError: a SentencePiece model of a kind that tokenizer.json cannot express exactly.
    """
    names = special_tokens(tokenizer, template)
    if isinstance(tokenizer, SentencePieceTokenizer):
        text = _convert(tokenizer, frozenset(template.control_strings & tokenizer.controls.keys()) | {*names.values()})
        shutil.copyfile(tokenizer.files[0], folder / "tokenizer.model")
        kept = {}
    else:
        assert isinstance(tokenizer, HuggingFaceTokenizer)
        text = _without_added_tokens(tokenizer)
        source = next((file for file in tokenizer.files if file.name == "tokenizer_config.json"), None)
        entries = json.loads(source.read_text(encoding="utf-8")) if source else {}
        kept = {key: entries[key] for key in _KEPT if key in entries}
    config = kept | {
        # The classes of single models (LlamaTokenizer) build a tokenizer of their own and add a BOS.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_input_names": ["input_ids", "attention_mask"],  # a Llama takes no token_type_ids
        "clean_up_tokenization_spaces": False,
        "add_bos_token": False,
        "add_eos_token": False,
        **names,
    }
    (folder / "tokenizer.json").write_text(text, encoding="utf-8", newline="")
    _write_json(folder / "tokenizer_config.json", config)
    _write_json(folder / "special_tokens_map.json", names)
    (folder / "chat_template.jinja").write_text(chat_template, encoding="utf-8", newline="")


def _write_json(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _spelling(tokenizer: Tokenizer, index: int | None) -> str | None:
    if index is None:
        return None
    if isinstance(tokenizer, SentencePieceTokenizer):
        return tokenizer.processor.id_to_piece(index).replace(_SPACE, " ")
    assert isinstance(tokenizer, HuggingFaceTokenizer)
    return tokenizer.backend.id_to_token(index)


def _without_added_tokens(tokenizer: HuggingFaceTokenizer) -> str:
    """The source's tokenizer.json; post-processors that add BOS or EOS are left out."""
    text = tokenizer.files[0].read_text(encoding="utf-8")
    if tokenizer.backend.encode("a").ids == tokenizer.backend.encode("a", add_special_tokens=False).ids:
        return text
    content = json.loads(text)
    processor = content["post_processor"]
    kept = [entry for entry in processor.get("processors", [processor]) if entry["type"] not in _ADDING]
    content["post_processor"] = {"type": "Sequence", "processors": kept} if kept else None
    return json.dumps(content, indent=2, ensure_ascii=False)


@dataclass(frozen=True)
class _Piece:
    """`kind` as in sentencepiece_model.proto."""

    text: str
    score: float
    kind: int


_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = range(1, 7)


def _pieces(model: bytes) -> tuple[list[_Piece], dict[int, Any], dict[int, Any]]:
    """Pieces by id, and the trainer's and the normaliser's fields, of `ModelProto`."""
    pieces, trainer, normalizer = [], {}, {}
    for number, value in _fields(model):
        if number == 1:
            piece = dict(_fields(value))
            (score,) = struct.unpack("<f", piece.get(2, bytes(4)))
            pieces.append(_Piece(piece[1].decode("utf-8"), score, piece.get(3, _NORMAL)))
        elif number == 2:
            trainer = dict(_fields(value))
        elif number == 3:
            normalizer = dict(_fields(value))
    return pieces, trainer, normalizer


def _convert(tokenizer: SentencePieceTokenizer, named: frozenset[str]) -> str:
    """A SentencePiece BPE model as the text of a tokenizer.json with the same ids.

    `named` are the tokens that text becomes. Other control pieces stay in the vocabulary, out of reach.
    Source: transformers, convert_slow_tokenizer.py; here scores decide the merges as SentencePiece's encoder does,
    and a fresh text begins after a control piece only.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

    path = tokenizer.files[0]
    pieces, trainer, normalizer = _pieces(path.read_bytes())
    prefix = bool(normalizer.get(3, 1))
    defined = [piece for piece in pieces if piece.kind == _USER_DEFINED]
    _check(path, trainer, normalizer, pieces, prefix and bool(defined))
    normal = {piece.text: piece.score for piece in pieces if piece.kind == _NORMAL}
    backend = Tokenizer(
        models.BPE(
            vocab={piece.text: index for index, piece in enumerate(pieces)},
            merges=_merges(normal),
            unk_token=next(piece.text for piece in pieces if piece.kind == _UNKNOWN),
            fuse_unk=True,
            byte_fallback=any(piece.kind == _BYTE for piece in pieces),
        )
    )
    before = [normalizers.Prepend(_SPACE)] if prefix else []
    backend.normalizer = normalizers.Sequence([*before, normalizers.Replace(" ", _SPACE)])
    strip = [decoders.Strip(" ", 1, 0)] if prefix else []
    backend.decoder = decoders.Sequence(
        [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    for piece in pieces:
        if piece.kind == _USER_DEFINED or piece.text in named:
            special = piece.text in named or piece.text in tokenizer.special_strings
            backend.add_tokens([AddedToken(piece.text, special=special, normalized=False)])
    _compare(tokenizer, backend, [piece for piece in pieces if piece.kind in (_NORMAL, _USER_DEFINED)])
    return backend.to_str(pretty=True)


def _compare(tokenizer: SentencePieceTokenizer, backend: Any, pieces: list[_Piece]) -> None:
    """Every piece, in random order, 50 to a text: the ids must be equal. Raises ModelError."""
    texts = [piece.text.replace(_SPACE, " ") for piece in pieces]
    random.Random(0).shuffle(texts)
    for start in range(0, len(texts), 50):
        text = "".join(texts[start : start + 50])
        if backend.encode(text).ids != tokenizer.encode(text):
            raise ModelError(f"'{tokenizer.files[0]}' became a tokenizer.json with other ids for {text!r}{_CURE}")


def _check(path: Path, trainer: dict, normalizer: dict, pieces: list[_Piece], prefix_and_defined: bool) -> None:
    """Raises ModelError for what `_convert` does not express."""
    for found, what in (
        (trainer.get(3, 1) != 2, "is not of the type BPE"),
        (normalizer.get(2), "normalises text (a rule other than 'identity')"),
        (normalizer.get(4, 1), "removes extra white space"),
        (not normalizer.get(5, 1), "does not escape white space"),
        (trainer.get(24), "writes a space as a suffix"),
        (any(piece.kind == _UNUSED for piece in pieces), "has unused pieces"),
        (prefix_and_defined, "has a dummy prefix and user-defined pieces"),
    ):
        if found:
            raise ModelError(f"'{path}' cannot become a tokenizer.json with equal ids: it {what}{_CURE}")


def _merges(scores: dict[str, float]) -> list[tuple[str, str]]:
    """Every way to put a piece together of two, best score first, which is the order SentencePiece merges in."""
    pairs = [
        (piece[:cut], piece[cut:])
        for piece in scores
        for cut in range(1, len(piece))
        if piece[:cut] in scores and piece[cut:] in scores
    ]
    return sorted(pairs, key=lambda pair: -scores[pair[0] + pair[1]])
