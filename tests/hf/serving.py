"""What a stock server does with an exported folder's tokenizer, and conversations to try it on."""

import json
import os
from dataclasses import replace

import pytest

from steerjax.chat.labels import label_tokens
from steerjax.chat.render import Renderer
from steerjax.chat.templates import TEMPLATES
from steerjax.chat.tokenizer import load_tokenizer, with_special_tokens
from steerjax.data.conversation import Conversation, Turn
from steerjax.hf.chat_template import chat_template
from steerjax.hf.tokenizer_files import special_strings, write_tokenizer
from steerjax.schema import HELPSTEER
from tests import needs_shared

LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)


def tokenizer_of(name, folder, texts):
    """embedded; mistral and smollm2, the real ones, where they are; llama3, one of its kind trained on `texts`."""
    if name == "smollm2":
        return load_tokenizer(os.environ.get("STEERJAX_SMOLLM2") or pytest.skip("STEERJAX_SMOLLM2 names no folder"))
    if name == "mistral":
        return load_tokenizer(needs_shared("data/tokenizers/mistral_v1.model"))
    return llama3_like(folder, texts) if name == "llama3" else load_tokenizer(name)


def llama3_like(folder, texts):
    """A byte-level BPE as Llama 3's: its splitting, its special tokens, and a post-processor that adds BOS."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(LLAMA3_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    special = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=2000,
        special_tokens=[AddedToken(string, special=True, normalized=False) for string in special],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    bos = processors.TemplateProcessing(single=f"{special[0]} $A", special_tokens=[(special[0], 0)])
    backend.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), bos])
    folder.mkdir(parents=True, exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "LlamaTokenizerFast",
        "bos_token": special[0],
        "eos_token": {"content": special[4]},
        "model_max_length": 512,
        "add_bos_token": True,
        "clean_up_tokenization_spaces": True,
        "chat_template": "the base model's",
        "auto_map": {"AutoTokenizer": ["code.py", None]},
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return load_tokenizer(folder)


def with_labels(tokenizer, labels):
    """The tokenizer of a model that writes its label lines so."""
    return with_special_tokens(tokenizer, label_tokens(HELPSTEER, labels))


def export(folder, tokenizer, name, kind="chat", labels="numbers", **options):
    """The folder with a tokenizer's files, as transformers loads it."""
    import transformers

    template = replace(TEMPLATES[name], labels=labels)
    forbidden = special_strings(tokenizer, template)
    text = chat_template(template, HELPSTEER, kind=kind, special_strings=forbidden, **options)
    folder.mkdir(parents=True, exist_ok=True)
    write_tokenizer(folder, tokenizer, template, text)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    return transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)


def renderer(tokenizer, name, labels="numbers", **options):
    return Renderer(tokenizer, replace(TEMPLATES[name], labels=labels), HELPSTEER, **options)


def talk(*texts, system=None):
    """user, assistant, user, ..."""
    return Conversation(tuple(Turn(("user", "assistant")[i % 2], text) for i, text in enumerate(texts)), system)


def as_messages(conversation, labels=None):
    """What a client sends."""
    messages = [] if conversation.system is None else [{"role": "system", "content": conversation.system}]
    for index, turn in enumerate(conversation.turns):
        label = labels[index] if labels else None
        messages.append({"role": turn.role, "content": turn.content} | ({"attributes": label} if label else {}))
    return messages


def conversations(rows):
    """Real rows as one, two and three turns and a half; a system text given, empty and absent."""
    systems = (None, "Be kind.", "", " Two\n\nlines. ")
    for index, row in enumerate(rows):
        other = rows[(7 * index + 3) % len(rows)]
        texts = [row["prompt"], row["response"], other["prompt"], other["response"]]
        yield talk(*texts[: 1 + index % 4], system=systems[index % len(systems)])
