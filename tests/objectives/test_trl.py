"""TRL's own RewardTrainer, opened on an export with one score: its scores, its loss and its gradients are ours."""

import json
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from steerjax import annotate, export
from steerjax.objectives.bradley_terry import preference_loss
from steerjax.schema import HELPSTEER, parse_scalar
from tests.reward_models import read_rows, reward_folder, some_conversations, write_rows

pytestmark = pytest.mark.parity
MARGINS = [1.0, 3.0, 2.0]


@pytest.fixture(scope="module")
def reward(tmp_path_factory):
    """A reward model's export with all its attributes."""
    folder = reward_folder(tmp_path_factory.mktemp("reward"))
    about = {"kind": "reward", "template": "extra_id", "attributes": HELPSTEER.to_json()}
    (folder / "steerjax.json").write_text(json.dumps(about))
    return folder


@pytest.fixture(scope="module")
def conversations():
    """Preferred and rejected answers to the same prompts, of different lengths."""
    drawn = some_conversations(9, longest=20)  # every third answers the prompt before it
    return drawn[1::3], drawn[2::3]


@pytest.fixture(scope="module")
def trainer(reward, conversations, tmp_path_factory):
    from datasets import Dataset
    from trl import RewardConfig, RewardTrainer

    folder = tmp_path_factory.mktemp("trl")
    export.main(["--checkpoint", str(reward), "--output", str(folder / "one"), "--scalar", "goodness"])
    rows = []
    for chosen, rejected, margin in zip(*conversations, MARGINS, strict=True):
        sides = {"chosen": chosen.turns, "rejected": rejected.turns}
        messages = {name: [{"role": t.role, "content": t.content} for t in turns] for name, turns in sides.items()}
        rows.append({**messages, "margin": margin})
    config = RewardConfig(str(folder / "run"), report_to="none", use_cpu=True, bf16=False)
    return RewardTrainer(str(folder / "one"), config, train_dataset=Dataset.from_list(rows))


@pytest.mark.parametrize("kind", ["regular", "margin"])
def test_loss_and_gradient_on_the_same_logits(kind, trainer):
    import torch

    random = np.random.default_rng(0)
    chosen, rejected, margin = random.normal(size=(3, 40)).astype(np.float32)
    margin = np.abs(margin)
    theirs = torch.tensor(np.concatenate([chosen, rejected])[:, None], requires_grad=True)
    inputs = {"attention_mask": torch.ones(80, 1)} | ({"margin": torch.tensor(margin)} if kind == "margin" else {})
    expected = trainer.compute_loss(lambda **_: SimpleNamespace(logits=theirs), inputs)
    expected.backward()
    value, gradients = jax.value_and_grad(lambda c, r: preference_loss(c - r, margin, kind).mean(), (0, 1))(
        chosen, rejected
    )
    np.testing.assert_allclose(value, expected.detach(), rtol=1e-6)
    np.testing.assert_allclose(np.concatenate(gradients), theirs.grad[:, 0], rtol=1e-5, atol=1e-7)


def test_scores_through_the_trainer(trainer, reward, conversations, tmp_path):
    """From conversations to the loss: its tokens, its padding, its model of our folder."""
    import torch

    rows = write_rows(tmp_path / "rows.jsonl", conversations[0] + conversations[1])
    annotate.main(["--model", str(reward), "--input", str(rows), "--output", str(tmp_path / "out.jsonl")])
    ratings = [row["turns"][-1]["predicted_ratings"] for row in read_rows(tmp_path / "out.jsonl")]
    weights = parse_scalar("goodness", HELPSTEER)[1]
    scores = np.array([sum(weight * of[name] for name, weight in weights.items()) for of in ratings])
    assert scores.std() > 0.01
    batch = trainer.data_collator(list(trainer.train_dataset))
    with torch.no_grad():
        loss, outputs = trainer.compute_loss(trainer.model.eval(), batch, return_outputs=True)
    np.testing.assert_allclose(outputs.logits[:, 0], scores, rtol=0, atol=1e-4)
    ours = preference_loss(scores[:3] - scores[3:], np.array(MARGINS), "margin").mean()
    np.testing.assert_allclose(ours, loss, rtol=1e-4)
