"""Tokenizers of every kind that the renderer meets. Those that are not at hand are trained on the packaged sample."""

import gzip
import importlib.util
import json
import os
import re
from pathlib import Path

import pytest
from chat_helpers import control_strings, small_llama_spm

from steerjax.chat.templates import TEMPLATES
from steerjax.chat.tokenizer import load_tokenizer
from tests import SHARED

GPT2_SPLIT = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)


@pytest.fixture(scope="session")
def sample_rows(repository):
    with gzip.open(repository / "steerjax/data/samples/helpsteer.jsonl.gz", "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


@pytest.fixture(scope="session")
def train_tokenizer(repository):
    """scripts/train_tokenizer.py as a module."""
    spec = importlib.util.spec_from_file_location("train_tokenizer", repository / "scripts/train_tokenizer.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _byte_level(folder: Path, texts, split: str, specials: list[str]):
    """A byte-level BPE folder as SmolLM2's and Llama 3's are."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(split), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=3000,
        special_tokens=[AddedToken(string, special=True, normalized=False) for string in specials],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    return load_tokenizer(folder)


@pytest.fixture(scope="session")
def texts(sample_rows):
    return [text for row in sample_rows for text in (row["prompt"], row["response"])]


@pytest.fixture(scope="session")
def gpt2_like(texts, tmp_path_factory):
    """GPT-2's splitting; the control strings of every template are special tokens."""
    return _byte_level(tmp_path_factory.mktemp("gpt2"), texts, GPT2_SPLIT, control_strings(*TEMPLATES))


@pytest.fixture(scope="session")
def llama3_like(texts, tmp_path_factory):
    """Llama 3's splitting, which joins punctuation to the newlines after it; only its own special tokens."""
    specials = sorted(TEMPLATES["llama3"].control_strings - {"<|attributes|>"})
    return _byte_level(tmp_path_factory.mktemp("llama3"), texts, LLAMA3_SPLIT, specials)


@pytest.fixture(scope="session")
def embedded():
    return load_tokenizer("embedded")


@pytest.fixture(scope="session")
def llama_spm(train_tokenizer, texts, tmp_path_factory):
    """A SentencePiece model with a dummy prefix and no control strings but <s> and </s>: Mistral's, or a small one."""
    path = SHARED / "data/tokenizers/mistral_v1.model"
    return load_tokenizer(path) if path.is_file() else small_llama_spm(train_tokenizer, texts, tmp_path_factory)


@pytest.fixture(scope="session")
def llama_hf(texts, tmp_path_factory):
    """A tokenizer.json that puts a dummy prefix before a text and again after each special token, as Llama 2's does."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
    specials = [AddedToken(string, special=True, normalized=False) for string in control_strings(*TEMPLATES)]
    trainer = trainers.BpeTrainer(
        vocab_size=3000, special_tokens=["<unk>", *specials], initial_alphabet=["\n"], show_progress=False
    )
    tokenizer.train_from_iterator((line for text in texts for line in text.split("\n")), trainer)
    folder = tmp_path_factory.mktemp("llama_hf")
    tokenizer.save(str(folder / "tokenizer.json"))
    return load_tokenizer(folder)


@pytest.fixture(scope="session")
def nfkc(texts, tmp_path_factory):
    """A tokenizer.json that turns full-width characters into ASCII and drops U+0001, as transformers converts many
    SentencePiece models; its markers are added tokens that are not special, as user-defined pieces become."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, trainers

    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    dropped = normalizers.Replace(Regex("[\u0001-\u0008]"), "")
    tokenizer.normalizer = normalizers.Sequence([dropped, normalizers.NFKC(), normalizers.Replace(" ", "\u2581")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    controls = ["<unk>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=3000,
        special_tokens=[*controls, *(f"<0x{byte:02X}>" for byte in range(256))],
        initial_alphabet=["\n"],
        max_token_length=12,
        show_progress=False,
    )
    words = (word for text in texts for word in re.findall(r"\s*\S+", text))
    tokenizer.train_from_iterator(words, trainer)
    content = json.loads(tokenizer.to_str())
    content["added_tokens"] = [token for token in content["added_tokens"] if token["content"] in controls]
    tokenizer = Tokenizer.from_str(json.dumps(content))
    markers = control_strings("extra_id", "chatml")
    tokenizer.add_tokens([AddedToken(string, special=False, normalized=True) for string in markers])
    folder = tmp_path_factory.mktemp("nfkc")
    tokenizer.save(str(folder / "tokenizer.json"))
    return load_tokenizer(folder)


@pytest.fixture(scope="session")
def smollm2(gpt2_like):
    """SmolLM2's tokenizer where STEERJAX_SMOLLM2 names its folder, else one of its kind."""
    folder = os.environ.get("STEERJAX_SMOLLM2")
    return load_tokenizer(folder) if folder else gpt2_like


@pytest.fixture(scope="session")
def tokenizers(embedded, gpt2_like, llama3_like, llama_spm):
    return {"embedded": embedded, "gpt2": gpt2_like, "llama3": llama3_like, "spm": llama_spm}
