"""The tokenizer's files of an exported model: what stock servers need to make the renderer's tokens.

`tokenizer.json` alone decides the ids, and adds no BOS or EOS: the chat template writes them where they belong.
"""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

from steerjax.chat.templates import Template
from steerjax.chat.tokenizer import (
    SPACE,
    HuggingFaceTokenizer,
    SentencePieceTokenizer,
    Tokenizer,
    missing_markers,
    read_message,
)
from steerjax.errors import ModelError

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
    bos, eos, pad = (
        None if index is None else tokenizer.spelling(index)
        for index in (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id)
    )
    end = template.end.strip()
    found = {"bos_token": bos, "eos_token": eos if end in missing_markers(tokenizer, template) else end}
    if isinstance(tokenizer, SentencePieceTokenizer) and found["bos_token"] not in template.control_strings:
        del found["bos_token"]
    others = sorted(tokenizer.special_strings, key=lambda string: tokenizer.token_id(string) or 0)
    if isinstance(tokenizer, SentencePieceTokenizer):
        others.insert(0, tokenizer.processor.id_to_piece(tokenizer.processor.unk_id()))
    padding = [pad, eos, *others]
    taken = template.control_strings | {found.get("bos_token")}
    found["pad_token"] = next((string for string in padding if string is not None and string not in taken), None)
    return {key: string for key, string in found.items() if string is not None}


def stop_tokens(tokenizer: Tokenizer, template: Template) -> list[int]:
    """Ids that end an answer, ascending: every control string or special token, as in `inference.stopping`."""
    controls = template.control_strings.difference(missing_markers(tokenizer, template))
    ids = {tokenizer.token_id(string) for string in controls | tokenizer.special_strings}
    return sorted(index for index in ids | {tokenizer.eos_id, tokenizer.bos_id} if index is not None)


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


def _convert(tokenizer: SentencePieceTokenizer, named: frozenset[str]) -> str:
    """A SentencePiece BPE model as the text of a tokenizer.json with the same ids.

    `named` are the tokens that text becomes. Other control pieces stay in the vocabulary, out of reach.
    Source: transformers, convert_slow_tokenizer.py; here scores decide the merges as SentencePiece's encoder does,
    and a fresh text begins after a control piece only.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

    processor, added = tokenizer.processor, tokenizer.added
    ids = range(processor.vocab_size())
    pieces = [processor.id_to_piece(index) for index in ids]
    defined = {piece.replace(" ", SPACE) for piece in tokenizer.defined}
    others = (processor.is_unknown, processor.is_control, processor.is_unused, processor.is_byte)
    others = {pieces[i] for i in ids if any(kind(i) for kind in others)} | defined
    normal = {piece: processor.get_score(i) for i, piece in enumerate(pieces) if piece not in others}
    prefix = _check(tokenizer)
    backend = Tokenizer(
        models.BPE(
            vocab={piece: index for index, piece in enumerate(pieces)} | added,
            merges=_merges(normal),
            unk_token=pieces[processor.unk_id()],
            fuse_unk=True,
            byte_fallback=any(map(processor.is_byte, ids)),
        )
    )
    before = [normalizers.Prepend(SPACE)] if prefix else []
    backend.normalizer = normalizers.Sequence([*before, normalizers.Replace(" ", SPACE)])
    strip = [decoders.Strip(" ", 1, 0)] if prefix else []
    backend.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    for piece in (*pieces, *added):
        if piece in named or piece in defined:
            special = piece in named or piece in tokenizer.special_strings
            backend.add_tokens([AddedToken(piece, special=special, normalized=False)])
    _compare(tokenizer, backend, [*normal, *defined])
    return backend.to_str(pretty=True)


def _compare(tokenizer: SentencePieceTokenizer, backend: Any, pieces: list[str]) -> None:
    """Every piece, in random order, 50 to a text: the ids must be equal. Raises ModelError."""
    texts = [piece.replace(SPACE, " ") for piece in sorted(pieces)]
    random.Random(0).shuffle(texts)
    for start in range(0, len(texts), 50):
        text = "".join(texts[start : start + 50])
        if backend.encode(text).ids != tokenizer.encode(text):
            raise ModelError(f"'{tokenizer.files[0]}' became a tokenizer.json with other ids for {text!r}{_CURE}")


def _check(tokenizer: SentencePieceTokenizer) -> bool:
    """Whether texts get a dummy prefix. Raises ModelError for what `_convert` does not express.

    The numbers are those of `ModelProto` in sentencepiece_model.proto.
    """
    model = dict(read_message(tokenizer.files[0].read_bytes()))
    trainer, normalizer = (dict(read_message(model.get(number, b""))) for number in (2, 3))
    prefix = bool(normalizer.get(3, 1))
    for found, what in (
        (trainer.get(3, 1) != 2, "is not of the type BPE"),
        (normalizer.get(2), "normalises text (a rule other than 'identity')"),
        (normalizer.get(4, 1), "removes extra white space"),
        (not normalizer.get(5, 1), "does not escape white space"),
        (trainer.get(24), "writes a space as a suffix"),
        (any(map(tokenizer.processor.is_unused, range(tokenizer.processor.vocab_size()))), "has unused pieces"),
        (prefix and tokenizer.defined, "has a dummy prefix and user-defined pieces"),
    ):
        if found:
            raise ModelError(f"'{tokenizer.files[0]}' cannot become a tokenizer.json with equal ids: it {what}{_CURE}")
    return prefix


def _merges(scores: dict[str, float]) -> list[tuple[str, str]]:
    """Every way to put a piece together of two, best score first, which is the order SentencePiece merges in."""
    pairs = [
        (piece[:cut], piece[cut:])
        for piece in scores
        for cut in range(1, len(piece))
        if piece[:cut] in scores and piece[cut:] in scores
    ]
    return sorted(pairs, key=lambda pair: -scores[pair[0] + pair[1]])
