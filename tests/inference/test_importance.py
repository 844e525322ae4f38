"""Log-likelihoods of answers: of the tokens that training trains, and transformers'."""

import os
from dataclasses import replace

import numpy as np
import pytest

from steerjax.bundle import open_bundle
from steerjax.data.conversation import Conversation, Turn
from steerjax.data.readers import iter_rows
from steerjax.inference import importance
from steerjax.inference.importance import Group, answer_example, read_scores, score_groups
from steerjax.inference.likelihood import LikelihoodScorer
from steerjax.objectives import Setting
from steerjax.objectives.objective import TRAIN
from steerjax.objectives.sft import SFT, SFTConfig
from steerjax.parallel.mesh import MeshConfig
from steerjax.schema import HELPSTEER
from tests.reward_models import chat_folder, killed

ASKED = {"verbosity": 0, "helpfulness": 4}
SMOLLM2 = os.environ.get("STEERJAX_SMOLLM2", "")


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    bundle = open_bundle(chat_folder(tmp_path_factory.mktemp("chat"), context=256), template="extra_id")
    return replace(bundle, description=replace(bundle.description, schema=HELPSTEER))


def groups(answers=("A prime.", "7", "", "A prime number, " * 20)):
    prompts = [Conversation((Turn("user", f"Name {n} primes."),), id=str(n)) for n in range(18)]
    return [Group(prompt, ASKED, answers) for prompt in prompts]


@pytest.mark.parametrize("label", [ASKED, None])
def test_examples_are_those_of_training(opened, label):
    """Same tokens, and the same of them are learnt as in SFT."""
    renderer, prompt = opened.renderer(), groups()[0].prompt
    found = answer_example(renderer, prompt, label, "Two is one.")
    trained = replace(prompt, turns=(*prompt.turns, Turn("assistant", "Two is one.", ratings=label)))
    sft = SFT(SFTConfig(), Setting(HELPSTEER, renderer, row_length=256))
    (expected,) = sft.examples(trained, TRAIN)
    for name in ("tokens", "places", "targets", "weights"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name))


def test_scores_and_what_is_too_long(opened, tmp_path, monkeypatch):
    """Each answer's, whatever shares its row; null where none holds it; the same bytes after an interruption."""
    monkeypatch.setattr(importance, "_CHUNK", 1)  # a group for each of eight rows
    path, asked, how = tmp_path / "scores.jsonl", groups(), {"labelled": True, "row_length": 96}
    score_groups(path, asked, opened, {}, **how)
    found, whole = read_scores(path), path.read_bytes()
    scorer, renderer = LikelihoodScorer(opened, row_length=96), opened.renderer()
    for group, one in zip(asked, found, strict=True):
        assert one.id == group.prompt.id
        assert one.log_likelihoods[3] is None
        for answer, tokens, value in zip(group.answers[:3], one.answers, one.log_likelihoods, strict=False):
            example = answer_example(renderer, group.prompt, ASKED, answer)
            assert (one.prompt, tokens) == (example.root, len(example.tokens) - example.root)
            assert value == pytest.approx(scorer([example]).log_likelihoods[0], abs=1e-4)
    score_groups(tmp_path / "prior.jsonl", asked, opened, {}, **how | {"labelled": False})
    assert read_scores(tmp_path / "prior.jsonl")[0].prompt < found[0].prompt

    lines = whole.splitlines(keepends=True)
    killed(path, b"".join(lines[:11]) + lines[11][:9])
    score_groups(path, asked, opened, {}, **how)
    assert path.read_bytes() == whole


@pytest.mark.slow
@pytest.mark.skipif(not SMOLLM2, reason="STEERJAX_SMOLLM2 is not set")
@pytest.mark.parity
@pytest.mark.smollm2
def test_smollm2_log_likelihoods_equal_transformers(tmp_path):
    """Real prompts and answers, with and without the label line."""
    import torch
    from transformers import LlamaForCausalLM

    one_row = MeshConfig(data=1, context=8)  # at a time
    bundle = open_bundle(SMOLLM2, one_row, template="chatml", dtype="float32")
    bundle = replace(bundle, description=replace(bundle.description, schema=HELPSTEER))
    rows = {}
    for _, row in iter_rows("embedded:helpsteer"):
        if len(row["prompt"]) < 400 and len(row["response"]) < 400:
            rows.setdefault(row["prompt"], []).append(row["response"])
    asked = [
        Group(Conversation((Turn("user", prompt),), id=str(n)), ASKED, tuple(answers[:2]))
        for n, (prompt, answers) in enumerate(list(rows.items())[:2])
    ]
    theirs = LlamaForCausalLM.from_pretrained(SMOLLM2, dtype=torch.float32, attn_implementation="eager").eval()
    for label in (ASKED, None):
        path = tmp_path / f"{bool(label)}.jsonl"
        score_groups(path, asked, bundle, {}, labelled=bool(label), row_length=512)
        for group, one in zip(asked, read_scores(path), strict=True):
            for answer, value in zip(group.answers, one.log_likelihoods, strict=True):
                example = answer_example(bundle.renderer(), group.prompt, label, answer)
                tokens = torch.tensor(example.tokens[None].astype(np.int64))
                with torch.no_grad():
                    logs = torch.log_softmax(theirs(tokens).logits[0].double(), -1)
                expected = sum(float(logs[i - 1, tokens[0, i]]) for i in range(example.root, tokens.shape[1]))
                assert value == pytest.approx(expected, abs=1e-3)
