"""The parts of the side-by-side benchmarks that a figure could be wrong by."""

import numpy as np
import pytest

from steerjax.data.batch import BatchPlan
from steerjax.data.trees import Example, grow


@pytest.fixture(autouse=True)
def beside_the_scripts(monkeypatch, repository):
    monkeypatch.syspath_prepend(str(repository / "benchmarks"))


@pytest.mark.parametrize(("count", "expected"), [(6.0, [2.0, 4.0]), ("tokens", [1.0, 6.0])])
def test_ratios_are_of_rates(count, expected):
    from turns import ratios

    ours = [{"seconds": 1.0, "tokens": 10}, {"seconds": 2.0, "tokens": 60}]
    theirs = [{"seconds": 2.0, "tokens": 20}, {"seconds": 8.0, "tokens": 40}]
    found = ratios({"ours": {"turns": ours}, "theirs": {"turns": theirs}}, "ours", count)
    assert found == {"theirs": {"median": np.mean(expected), "least": expected[0], "greatest": expected[1]}}


def test_the_peer_trains_the_same_tokens(tmp_path):
    """Labels stand at the tokens themselves, targets a place before them; every conversation is there once."""
    from sft import read_steps, write_steps

    texts = [[7, 8, 9, 1, 2], [7, 8, 9, 3, 4, 5], [6, 6, 1]]
    examples = []
    for number, text in enumerate(texts):
        tokens, places = np.array(text, np.int32), np.arange(1, len(text) - 1, dtype=np.int32)
        weights = np.ones(len(places), np.float32)
        examples.append(Example("sft", number, tokens, min(3, len(text)), places, tokens[places + 1], weights))
    plan = BatchPlan(grow(examples), rows=1, row_length=16, seed=0)
    write_steps(tmp_path / "steps.jsonl", plan, 1)
    (step,) = read_steps(tmp_path)
    found = {tuple(one["input_ids"]): one["labels"] for one in step}
    assert found == {tuple(text): [-100, -100, *text[2:]] for text in texts}


class Fake:
    """As much of a Trainer as is called; two micro-batches a step."""

    def __init__(self, callbacks, losses):
        (self.turns,), self.losses = callbacks, losses

    def training_step(self, model, inputs, num_items_in_batch=None):
        return inputs

    def train(self):
        self.turns.on_train_begin(None, None, None)
        for loss in self.losses:
            for part in (1, 2):
                self.training_step(None, {"size": part})
            if loss is None:
                raise ValueError("no loss")
            self.turns.on_log(None, None, None, logs={"loss": loss})
        self.turns.on_log(None, None, None, logs={"train_loss": 0.0})


@pytest.mark.parity
def test_a_trainer_by_turns():
    from trainer import by_turns

    turn = by_turns(Fake, lambda inputs: {"examples": inputs["size"]}, losses=[0.5, 0.25, None])
    assert [turn(), turn()] == [{"loss": 0.5, "examples": 3}, {"loss": 0.25, "examples": 3}]
    with pytest.raises(ValueError, match="no loss"):
        turn()


def test_the_table_is_of_the_results():
    from table import BEGIN, END, README, table_text

    assert BEGIN + table_text() + END in README.read_text()
