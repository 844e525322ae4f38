"""Whole OpenAssistant trees equal their threads one by one: loss, predictions and every gradient, on every back end."""

import json
from pathlib import Path

import numpy as np
import pytest

from steerjax.chat.render import Renderer
from steerjax.chat.templates import TEMPLATES
from steerjax.chat.tokenizer import load_tokenizer
from steerjax.data.oasst import read_threads
from steerjax.data.packing import pack, packing_statistics, unshared_rows
from steerjax.data.trees import grow
from steerjax.models.config import LlamaConfig
from steerjax.models.llama import CausalLM, Compute, RewardModel
from steerjax.objectives import Setting
from steerjax.objectives.objective import TRAIN, VALIDATION
from steerjax.objectives.regression import Regression, RegressionConfig
from steerjax.objectives.sft import SFT, SFTConfig
from steerjax.schema import OASST
from tests import needs_shared
from tests.helpers import assert_trees_close, host_batch, init_params, loss_and_gradients, outputs_at_ends
from tests.models.attention.forests import kernels_anywhere

WORDS = ("rivers", "trees", "stones", "care", "answers", "model", "says", "knows", "about", "the", "and", "with")
RENDERER = Renderer(load_tokenizer("embedded"), TEMPLATES["extra_id"], OASST)


def message(random, number, role: str, depth: int) -> dict:
    """A message and up to three replies, rated as full exports are (a mean of raters between 0 and 1)."""
    other = {"prompter": "assistant", "assistant": "prompter"}[role]
    replies = [message(random, number, other, depth - 1) for _ in range(random.integers(1, 4) if depth > 1 else 0)]
    text = " ".join(random.choice(WORDS, random.integers(1, 6)))
    own = {"message_id": f"m{next(number)}", "text": text, "role": role, "replies": replies}
    return own | ({"labels": labels(random)} if role == "assistant" else {})


def labels(random) -> dict:
    return {name: {"value": float(random.random()), "count": 3} for name in ("quality", "humor")}


def written(path: Path, trees) -> str:
    path.write_text("".join(json.dumps(tree) + "\n" for tree in trees))
    return str(path)


def examples(source: str, objective):
    threads = [conversation for _, conversation in read_threads(source, OASST)]
    found = [example for thread in threads for example in objective.examples(thread, TRAIN)]
    if isinstance(objective, Regression):
        objective.data[VALIDATION] = objective.data[TRAIN]
        objective.check_data()
    return threads, found


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> str:
    random, number = np.random.default_rng(0), iter(range(10**6))
    trees = [{"prompt": message(random, number, "prompter", 4)} for _ in range(3)]
    return written(tmp_path_factory.mktemp("oasst") / "trees.jsonl", trees)


@pytest.mark.parametrize("attention", ["chunked", "blockwise", "splash", "cudnn", "triton"])
@pytest.mark.parametrize("kind", ["reward", "chat", "chat, once a thread"])
def test_whole_trees_equal_threads(source, kind, attention, monkeypatch):
    kernels_anywhere(monkeypatch)
    setting = Setting(OASST, RENDERER, 64)
    if kind == "reward":
        objective = Regression(RegressionConfig(), setting)
    else:
        objective = SFT(SFTConfig(threads="all" if "thread" in kind else "once"), setting)
    threads, found = examples(source, objective)
    trees = grow(found)
    assert len(trees) == 3
    shared = [turn.id for thread in threads for turn in thread.turns if turn.role == "assistant"]
    rated = sum(len(example.places) for example in found) if kind == "reward" else len(set(shared))
    assert rated == len(set(shared)) < len(shared)  # a turn of several threads counts once
    vocab = RENDERER.tokenizer.vocab_size
    config = LlamaConfig(vocab, 32, 64, num_layers=1, num_heads=2, num_kv_heads=1, initializer_range=0.1)
    compute = Compute(attention=attention, chunk=128)
    module = RewardModel(config, len(OASST), compute=compute) if kind == "reward" else CausalLM(config, compute)
    params = init_params(module)
    longest = -(-max(len(example.tokens) for example in found) // 128) * 128
    packed, alone = pack(trees, 512), unshared_rows(trees)
    (loss, _), gradients = loss_and_gradients(module, [objective], host_batch([objective], trees, packed, 512), params)
    dense = module.clone(compute=Compute())
    (expected, _), others = loss_and_gradients(
        dense, [objective], host_batch([objective], trees, alone, longest), params
    )
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    assert_trees_close(gradients, others, rtol=1e-5)
    if kind == "reward":
        ours = outputs_at_ends(module, objective, trees, packed, 512, params)
        theirs = outputs_at_ends(dense, objective, trees, alone, longest, params)
        assert_trees_close(ours, theirs, rtol=1e-5, atol=1e-6)
    assert packing_statistics(trees, packed, 512).saving > 1.5


@pytest.mark.parametrize(("kind", "least"), [("reward", 1.4), ("chat", 1.4)])
def test_the_openassistant_sample_shares_what_its_threads_have_in_common(tmp_path, kind, least):
    """Labels are made from a seed, as the sample has none."""
    random = np.random.default_rng(0)
    trees = [json.loads(line) for line in needs_shared("data/oasst/trees_en_100.jsonl").read_text().splitlines()]

    def label(node):
        if node["role"] == "assistant":
            node["labels"] = labels(random)
        for reply in node["replies"]:
            label(reply)

    for tree in trees:
        label(tree["prompt"])
    setting = Setting(OASST, RENDERER)
    objective = Regression(RegressionConfig(), setting) if kind == "reward" else SFT(SFTConfig(), setting)
    _, found = examples(written(tmp_path / "trees.jsonl", trees), objective)
    forest = grow(found)
    statistics = packing_statistics(forest, pack(forest, 8192), 8192)
    print(f"{kind}: {statistics.saving:.2f} times fewer tokens, {statistics.examples} examples, {len(forest)} trees")
    assert statistics.saving > least
