"""The tokenizer's files of an exported model: what stock servers need to make the renderer's tokens.

`tokenizer.json` alone decides the ids, and adds no BOS or EOS: the chat template writes them where they belong.
"""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path

from steerjax.chat.labels import LABEL_TOKEN
from steerjax.chat.templates import Template
from steerjax.chat.tokenizer import Tokenizer, missing_markers
from steerjax.hf.look_alikes import sealed

_KEPT = ("model_max_length", "padding_side", "truncation_side")  # of a source's tokenizer_config.json


def special_tokens(tokenizer: Tokenizer, template: Template) -> dict[str, str]:
    """`bos_token`, `eos_token` and `pad_token` of an export, those there are; `tokenizer.token_id` gives their ids.

    `eos_token`, where a server stops, is the template's end where that is one token, else the tokenizer's own.
    `pad_token` is one that the template never writes, as transformers reads a reward before the first padding token.
    `bos_token` is named only where text or the template writes it, as a server takes `<s>` in a text for a named token.
    """
    bos, eos, pad = (
        None if index is None else tokenizer.backend.id_to_token(index)
        for index in (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id)
    )
    controls, end = template.control_strings, template.end.strip()
    bos = bos if bos in controls | tokenizer.special_strings else None
    unknown = getattr(tokenizer.backend.model, "unk_token", None)  # a Unigram has none
    others = sorted(tokenizer.special_strings, key=lambda string: tokenizer.token_id(string) or 0)
    others = [string for string in others if not LABEL_TOKEN.fullmatch(string)]
    free = (string for string in (pad, eos, unknown, *others) if string not in controls | {bos, None})
    stop = eos if end in missing_markers(tokenizer, template) else end
    found = {"bos_token": bos, "eos_token": stop, "pad_token": next(free, None)}
    return {key: string for key, string in found.items() if string is not None}


def stop_tokens(tokenizer: Tokenizer, template: Template) -> list[int]:
    """Ids that end an answer, ascending: every control string or special token, as in `inference.stopping`."""
    strings = tokenizer.special_strings | template.control_strings.difference(missing_markers(tokenizer, template))
    return sorted({*map(tokenizer.token_id, strings), tokenizer.eos_id, tokenizer.bos_id} - {None})


def special_strings(tokenizer: Tokenizer, template: Template) -> frozenset[str]:
    """Strings that become a token wherever they stand in a text, in the exported tokenizer: texts must lack them."""
    return tokenizer.special_strings | frozenset(special_tokens(tokenizer, template).values())


def write_tokenizer(folder: Path, tokenizer: Tokenizer, template: Template, chat_template: str) -> None:
    """Writes tokenizer.json, tokenizer_config.json, special_tokens_map.json and chat_template.jinja into `folder`.

    A SentencePiece model is copied beside its tokenizer.json, in which only those of its control pieces are in reach of
    text that the template writes or `special_tokens` names.

    Raises ModelError: a stock server would take control strings from texts that do not spell them.
    """
    source, names, entries = tokenizer.files[0], special_tokens(tokenizer, template), {}
    if source.suffix == ".model":
        shutil.copyfile(source, folder / "tokenizer.model")
        backend = copy.deepcopy(tokenizer.backend)
        backend.add_special_tokens([*names.values()])
        content, reached = json.loads(backend.to_str()), template.control_strings | {*names.values()}
        content["added_tokens"] = [
            token | {"special": token["content"] in reached | tokenizer.special_strings}
            for token in content["added_tokens"]
            if token["content"] in reached or not token["special"]
        ]
    else:
        content = json.loads(tokenizer.content or source.read_bytes())
        config = source.with_name("tokenizer_config.json")
        entries = json.loads(config.read_text(encoding="utf-8")) if config in tokenizer.files else {}
    if processor := content.get("post_processor"):  # all but ByteLevel's add tokens
        kept = [entry for entry in processor.get("processors", [processor]) if entry["type"] == "ByteLevel"]
        content["post_processor"] = {"type": "Sequence", "processors": kept} if kept else None
    content = sealed(content, tokenizer, template, template.control_strings | special_strings(tokenizer, template))
    config = {key: entries[key] for key in _KEPT if key in entries} | {
        # The classes of single models (LlamaTokenizer) build a tokenizer of their own and add a BOS.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_input_names": ["input_ids", "attention_mask"],  # a Llama takes no token_type_ids
        "clean_up_tokenization_spaces": False,
        "add_bos_token": False,
        "add_eos_token": False,
        **names,
    }
    for name, value in (("tokenizer", content), ("tokenizer_config", config), ("special_tokens_map", names)):
        text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
        (folder / f"{name}.json").write_text(text, encoding="utf-8", newline="")
    (folder / "chat_template.jinja").write_text(chat_template, encoding="utf-8", newline="")
