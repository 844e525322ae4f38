"""A tiny reward model and made-up conversations, for the tests of what scores."""

import json
from pathlib import Path

import numpy as np
import xxhash

from steerjax.data.conversation import Conversation, Turn
from steerjax.inference.job import beside
from tests.hf_folders import CLASSIFIER, TINY, random_tensors, write_folder

SENTENCE = "the model answers with care and says what it knows about rivers trees winds and very old stones"


def reward_folder(folder: Path, context: int = 2048, seed: int = 0, **changes) -> Path:
    """A Hugging Face folder whose predictions lie between about -1 and 1."""
    config = TINY | CLASSIFIER | {"max_position_embeddings": context, "num_hidden_layers": 2} | changes
    tensors = random_tensors(config, seed)
    for name, tensor in tensors.items():
        tensors[name] = np.ones_like(tensor) if "norm" in name else 0.2 * tensor
    return write_folder(folder, config, tensors)


def chat_folder(folder: Path, context: int = 1024, seed: int = 0, **changes) -> Path:
    """A Hugging Face folder of a causal language model whose tokens are not equally likely."""
    config = TINY | {"max_position_embeddings": context, "num_hidden_layers": 2} | changes
    tensors = random_tensors(config, seed)
    for name, tensor in tensors.items():
        tensors[name] = np.ones_like(tensor) if "norm" in name else 0.3 * tensor
    return write_folder(folder, config, tensors)


def some_conversations(count: int, seed: int = 0, longest: int = 60) -> list[Conversation]:
    """Of one to three exchanges of up to `longest` words a turn; every third row answers the prompt before it."""
    random = np.random.default_rng(seed)
    conversations: list[Conversation] = []

    def text() -> str:
        return " ".join(random.choice(SENTENCE.split(), random.integers(1, longest)))

    for line in range(1, count + 1):
        if line % 3 == 0:
            turns = [*conversations[-1].turns[:-1], Turn("assistant", text())]
        else:
            turns = [Turn(role, text()) for _ in range(random.integers(1, 4)) for role in ("user", "assistant")]
        conversations.append(Conversation(tuple(turns), id=f"row {line}", file="rows.jsonl", line=line))
    return conversations


def write_rows(path: Path, rows) -> Path:
    """Conversations or plain objects, one a line."""
    values = [row.to_json() if isinstance(row, Conversation) else row for row in rows]
    path.write_text("".join(json.dumps(value, ensure_ascii=False) + "\n" for value in values), encoding="utf-8")
    return path


def read_rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def killed(output: Path, content: bytes) -> None:
    """Leaves a finished output as a kill does that came when this was written; its whole lines are recorded."""
    whole, settings = content[: content.rfind(b"\n") + 1], beside(output, "settings.json")
    said = json.loads(settings.read_text())
    said["written"]["rows"] = [len(whole), xxhash.xxh3_128_hexdigest(whole)]
    settings.write_text(json.dumps(said))
    output.unlink()
    beside(output, "partial").write_bytes(content)
