"""Trains the packaged tokenizer, steerjax/chat/embedded.model, on the packaged HelpSteer sample.

The result depends on nothing but the sample and the version of sentencepiece: one thread, fixed order, no sampling. BPE
because Llama's is (Hugging Face converts it without loss), and because it needs fewer tokens than unigram on text that
it has not seen (5% on HelpSteer2 and OpenAssistant).

    python scripts/train_tokenizer.py [--output FILE]
"""

from __future__ import annotations

import argparse
import gzip
import io
import json
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SAMPLE = ROOT / "steerjax" / "data" / "samples" / "helpsteer.jsonl.gz"
OUTPUT = ROOT / "steerjax" / "chat" / "embedded.model"
VOCAB_SIZE = 4096
SYMBOLS = ("\n", "<extra_id_0>", "<extra_id_1>", "<extra_id_2>", "<|im_start|>", "<|im_end|>", "<|attributes|>")


def sample_texts(path: Path) -> list[str]:
    """Prompts and responses in the file's order, each text once. `path`: JSONL, with or without gzip."""
    with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    return list(dict.fromkeys(text for row in rows for text in (row["prompt"], row["response"])))


def train(texts: Iterable[str], vocab_size: int = VOCAB_SIZE, **options: object) -> bytes:
    """A SentencePiece model in bytes. `options` go over the ones below (tests train models with other settings)."""
    import sentencepiece

    settings: dict = {
        "model_type": "bpe",
        "vocab_size": vocab_size,
        # Text comes back as it was: nothing is normalised, and no space is added or taken away.
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "add_dummy_prefix": False,
        "byte_fallback": True,
        "character_coverage": 1.0,
        "allow_whitespace_only_pieces": True,
        "split_digits": True,
        "user_defined_symbols": list(SYMBOLS),
        "pad_id": 0,
        "unk_id": 1,
        "bos_id": 2,
        "eos_id": 3,
        "num_threads": 1,
        "shuffle_input_sentence": False,
        "max_sentence_length": 1 << 20,  # longer lines would be left out
        "minloglevel": 1,
    }
    model = io.BytesIO()
    lines = (line for text in texts for line in text.split("\n") if line)
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=lines, model_writer=model, **(settings | options))
    return model.getvalue()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--input", type=Path, default=SAMPLE, help="JSONL with prompt and response, .gz or plain")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    arguments = parser.parse_args()
    model = train(sample_texts(arguments.input))
    arguments.output.write_bytes(model)
    print(f"{arguments.output}: {len(model)} bytes")


if __name__ == "__main__":
    main()
