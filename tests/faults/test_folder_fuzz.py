"""Model folders whose files are mutated: they open, or one sentence names the file; at once, without much memory."""

import json
import random
import re
import resource
import struct
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import tokenizers

from steerjax.bundle import describe
from steerjax.bundle.reader import open_reader
from steerjax.chat.tokenizer import load_tokenizer
from steerjax.errors import ModelError, SteerjaxError
from tests.faults.mutations import mutated_json
from tests.hf_folders import CLASSIFIER, LABELS, TINY, random_tensors, write_folder
from tests.refusals import refused

SECONDS, MIB = 10.0, 400  # of an opening; of all of them together, above what the first took
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPECIAL = ("<s>", "</s>", "<|im_start|>", "<|im_end|>")
SMALL = TINY | {"vocab_size": 300, "hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2,
                "num_key_value_heads": 1, "num_hidden_layers": 2, "bos_token_id": 0, "eos_token_id": 1,
                "rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                                 "original_max_position_embeddings": 128}}  # fmt: skip
ADAPTER = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 2, "lora_alpha": 4, "lora_dropout": 0.0, "bias": "none",
           "target_modules": ["q_proj"], "modules_to_save": None, "use_rslora": False}  # fmt: skip


def write_tokenizer(folder: Path) -> None:
    """Bytes, and the control strings of ChatML."""
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(
        {s: i for i, s in enumerate([*SPECIAL, *sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())])}, []
    ))  # fmt: skip
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.add_special_tokens([*SPECIAL])
    backend.save(str(folder / "tokenizer.json"))
    named = {"bos_token": "<s>", "eos_token": {"content": "</s>", "lstrip": False}, "pad_token": None}
    more = {"chat_template": CHATML, "added_tokens_decoder": {"0": {"content": "<s>"}}, "model_max_length": 10**30}
    (folder / "special_tokens_map.json").write_text(json.dumps(named))
    (folder / "tokenizer_config.json").write_text(json.dumps(named | more))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [1], "temperature": 0.7}))


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> list[Path]:
    """A reward model in two shards, a chat model, an adapter on it."""
    root = tmp_path_factory.mktemp("folders")
    reward = SMALL | CLASSIFIER
    reward_folder = write_folder(root / "reward", reward, random_tensors(reward), shards=2)
    attributes = [{"name": name, "low": 0.0, "high": 4.0, "meaning": "m"} for name in LABELS]
    said = {"kind": "reward", "template": "chatml", "attributes": attributes, "readout": "last",
            "system_prompt": None, "default_ratings": {"helpfulness": 4.0}, "provenance": {"base_model": "random"},
            "steerjax": "0"}  # fmt: skip
    (reward_folder / "steerjax.json").write_text(json.dumps(said))
    chat = write_folder(root / "chat", SMALL, random_tensors(SMALL))
    adapter = write_folder(root / "adapter", SMALL, {
        f"base_model.model.model.layers.{layer}.self_attn.q_proj.lora_{a}.weight": np.ones(shape, np.float32)
        for layer in range(2) for a, shape in (("A", (2, 8)), ("B", (8, 2)))
    })  # fmt: skip
    (adapter / "model.safetensors").rename(adapter / "adapter_model.safetensors")
    (adapter / "config.json").unlink()
    (adapter / "adapter_config.json").write_text(json.dumps(ADAPTER | {"base_model_name_or_path": str(chat)}))
    found = [reward_folder, chat, adapter]
    for folder in found:
        (folder / "tokenizer.model").unlink()
        write_tokenizer(folder)
    for folder in found[1:]:
        (folder / "steerjax.json").write_text(json.dumps({"kind": "chat", "template": "source"}))
    return found


def mutated_safetensors(content: bytes, draw: random.Random) -> bytes:
    """Its header mutated, or its length, or the file cut."""
    (length,), kind = struct.unpack("<Q", content[:8]), draw.random()
    if kind < 0.7:
        header = mutated_json(json.loads(content[8 : 8 + length]), draw)
        return struct.pack("<Q", len(header)) + header + content[8 + length :]
    if kind < 0.85:
        return content[: draw.randrange(len(content))]
    return struct.pack("<Q", draw.choice((0, 1, length - 1, length + 1, 10**8, 2**40, 2**63, 2**64 - 1))) + content[8:]


def opened(folder: Path) -> str:
    """What became of an opening: all but the arrays, and their names, shapes and types."""
    try:
        about = describe(folder)
        open_reader(about.path)
        about.tokenizer.decode(about.tokenizer.encode("Hello"))
    except SteerjaxError as error:
        said = str(error)
    else:
        return "opened"
    assert "cure: " in said
    return "refused"


@pytest.mark.parametrize(
    ("seed", "count"), [(0, 150), *(pytest.param(n, 2000, marks=pytest.mark.faults) for n in range(1, 6))]
)
def test_mutated_folders(folders, tried, seed, count):
    assert [opened(folder) for folder in folders] == ["opened"] * 3
    draw, found, before = random.Random(seed), Counter(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    files = [file for folder in folders for file in sorted(folder.iterdir())]
    for number in range(count):
        file = draw.choice(files)
        content, begun = file.read_bytes(), time.process_time()
        safetensors = file.suffix == ".safetensors"
        new = mutated_safetensors(content, draw) if safetensors else mutated_json(json.loads(content), draw)
        file.write_bytes(new)
        try:
            found[file.name, opened(file.parent)] += 1
        except BaseException as error:
            error.add_note(f"seed {seed}, number {number}, {file}: {new[:2000]!r}")
            raise
        finally:
            file.write_bytes(content)
        assert time.process_time() - begun < SECONDS, new[:2000]
    for (name, outcome), times in found.items():
        tried("model folder", f"{re.sub(r'-0.*2', '', name)}: {outcome}", times)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < MIB * 1024


@pytest.mark.parametrize(
    ("place", "name", "content"),
    [
        (0, "steerjax.json", "[" * 100_000),
        (2, "adapter_config.json", {"base_model_name_or_path": "9" * 10_000}),
        (2, "adapter_config.json", {"base_model_name_or_path": "~nobody/model"}),
        (2, "adapter_config.json", {"lora_dropout": 2**31}),
        (2, "adapter_config.json", {"lora_alpha": 1e30, "r": 2**20, "use_rslora": True}),
    ],
    ids=["nested", "long name", "no user", "dropout", "alpha"],
)
def test_what_the_long_part_found(folders, place, name, content):
    file = folders[place] / name
    before = file.read_text()
    file.write_text(content if isinstance(content, str) else json.dumps(json.loads(before) | content))
    try:
        assert opened(folders[place]) == "refused"
    finally:
        file.write_text(before)


@pytest.mark.parametrize(
    "model",
    [
        {"type": "BPE", "vocab": {}, "merges": []},
        {"type": "WordLevel", "vocab": {}, "unk_token": "x"},
        {"type": "Unigram", "vocab": [["b", 0.0]], "unk_id": None},
    ],
    ids=lambda model: model["type"],
)
def test_a_tokenizer_without_a_vocabulary(folders, tried, tmp_path, model):
    raw = json.loads((folders[1] / "tokenizer.json").read_text()) | {"added_tokens": [], "pre_tokenizer": None}
    (tmp_path / "tokenizer.json").write_text(json.dumps(raw | {"decoder": None, "model": model}))
    with refused(ModelError, "tokenizer.json"):
        load_tokenizer(tmp_path)
    tried("model folder", "tokenizer.json without a vocabulary")
