"""Golden values of the preference losses, pairs in trees, and a run on pairs."""

import json
from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from steerjax.config import default_config, resolve
from steerjax.data.formats import conversation_from_row
from steerjax.data.packing import pack, packing_statistics, unshared_rows
from steerjax.data.trees import grow
from steerjax.errors import ConfigError, DataError
from steerjax.models.llama import Compute, RewardModel
from steerjax.objectives import Setting
from steerjax.objectives.bradley_terry import BradleyTerry, BradleyTerryConfig, preference_loss
from steerjax.objectives.objective import TRAIN, VALIDATION
from steerjax.report.preferences import calibration, preference_result
from steerjax.report.records import read_metrics
from steerjax.schema import HELPSTEER
from steerjax.training.train import train
from tests.helpers import (
    SCHEMA,
    TINY,
    assert_trees_close,
    host_batch,
    init_params,
    loss_and_gradients,
    random_tokens,
    slow_but,
)
from tests.refusals import refused


@pytest.mark.short
def test_golden_values():
    """Reference facts, section 3.2: scores 2.5 (preferred) and 1.0, strength 2."""
    found = [float(preference_loss(jnp.float32(1.5), jnp.float32(2), kind)) for kind in ("regular", "margin", "scaled")]
    np.testing.assert_allclose(found, [0.201413, 0.974077, 0.402827], atol=1e-6)
    assert float(preference_loss(jnp.float32(1.5), jnp.float32(0), "scaled")) == 0


def objective(loss: str = "regular") -> BradleyTerry:
    return BradleyTerry(BradleyTerryConfig(loss=loss, score={"a": 1.0, "b": -0.5}), Setting(SCHEMA, None))


def some_pairs(bt: BradleyTerry, prompts: list[int], seed: int = 0, longest: int = 20):
    """Prompts with so many pairs each; every third shares a response with the one before."""
    random, examples = np.random.default_rng(seed), []
    for count in prompts:
        prompt, last = random_tokens(random, longest), None
        for number in range(count):
            sides = [np.concatenate([prompt, random_tokens(random, longest)]) for _ in range(2)]
            if last is not None and number % 3 == 0:
                sides[0] = last
            last = sides[1]
            rooted = [(tokens, len(prompt)) for tokens in sides]
            examples += bt.pair(TRAIN, rooted, strength=float(random.integers(1, 4)))
    bt.data[VALIDATION] = bt.data[TRAIN]
    bt.check_data()
    return examples


@pytest.mark.parametrize("loss", ["regular", "margin", "scaled"])
@pytest.mark.parametrize("attention", slow_but("blockwise", ["chunked", "blockwise"]))
def test_pairs_in_trees_equal_each_pair_alone(loss, attention):
    """Loss, metrics and every gradient, with responses that are preferred in one pair and not in the next."""
    bt = objective(loss)
    trees = grow(some_pairs(bt, [1, 4, 2, 3]))
    module = RewardModel(TINY, 3, compute=Compute(chunk=32, attention=attention))
    params, found = init_params(module), []
    alone = [pair for tree in trees for pair in pairs_alone(tree)]
    for parts in (trees, alone):
        batch = host_batch([bt], parts, pack(parts, 128), 128)
        found.append(loss_and_gradients(module, [bt], batch, params))
    ((ours, sums), gradients), ((loss_alone, sums_alone), gradients_alone) = found
    np.testing.assert_allclose(ours, loss_alone, rtol=1e-6)
    assert_trees_close(sums, sums_alone, rtol=1e-6)
    assert_trees_close(gradients, gradients_alone, rtol=1e-5)


def pairs_alone(tree):
    """A tree for each pair of a tree."""
    by_unit: dict = {}
    for example in tree.examples:
        by_unit.setdefault(example.unit, []).append(example)
    return [grow(pair)[0] for pair in by_unit.values()]


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(seed=st.integers(0, 10**6), row_length=st.integers(60, 300), shuffled=st.booleans())
def test_a_pair_is_never_split(seed, row_length, shuffled):
    bt = objective()
    trees = grow(some_pairs(bt, [1, 9, 3], seed=seed))
    rows = pack(trees, row_length, np.random.default_rng(seed) if shuffled else None)
    seen = []
    for row in rows:
        units = [trees[part.tree].examples[e].unit for part in row for e in part.examples]
        assert sorted(units) == sorted([*set(units)] * 2)
        seen += units
        arrays = bt.arrays(host_layout(bt, trees, row, row_length))
        assert (arrays["weights"] > 0).sum() == len(set(units))
    assert len(seen) == 2 * 13


def host_layout(bt, trees, row, row_length):
    from tests.helpers import builder

    return builder([bt], trees, row_length).layout(row)


def test_a_pair_that_no_row_can_hold_is_a_bad_row():
    bt = objective()
    trees = grow(some_pairs(bt, [1], longest=40))
    longest = max(len(part) for tree in trees for part in tree.pieces)
    with refused(DataError, str(longest), cure="config.batch.row_length"):
        pack(trees, longest)
    assert len(unshared_rows(trees)) == 2


# ---- Rows


MESSAGES = (
    [{"role": "user", "content": "p"}],
    [{"role": "assistant", "content": "good"}],
    [{"role": "assistant", "content": "bad"}],
)
ROWS = {
    "TRL": {"prompt": "p", "chosen": "good", "rejected": "bad"},
    "RewardBench": {"prompt": "p", "chosen": "good", "rejected": "bad", "subset": "x", "id": 7, "chosen_model": "m"},
    "messages": dict(zip(("prompt", "chosen", "rejected"), MESSAGES, strict=True)),
    "whole messages": {"chosen": MESSAGES[0] + MESSAGES[1], "rejected": MESSAGES[0] + MESSAGES[2]},
    "UltraFeedback": {"prompt": "p", "chosen": MESSAGES[0] + MESSAGES[1], "rejected": MESSAGES[0] + MESSAGES[2]},
    "HH": {"chosen": "\n\nHuman: p\n\nAssistant: good", "rejected": "\n\nHuman: p\n\nAssistant: bad"},
    "HelpSteer2": {"prompt": "p", "response_1": "good", "response_2": "bad", "preference_strength": -2},
    "HelpSteer2, second": {"prompt": "p", "response_1": "bad", "response_2": "good", "preference_strength": 1},
    "HelpSteer3": {"context": MESSAGES[0], "response1": "bad", "response2": "good", "overall_preference": 3},
    "ours": {"turns": MESSAGES[0] + MESSAGES[1], "rejected": MESSAGES[0] + MESSAGES[2], "strength": 2},
}  # fmt: skip
STRENGTHS = {"HelpSteer2": 2, "HelpSteer3": 3, "ours": 2}


@pytest.mark.short
@pytest.mark.parametrize("name", ROWS)
def test_layouts(name):
    conversation = conversation_from_row(ROWS[name], HELPSTEER)
    assert [turn.content for turn in conversation.turns] == ["p", "good"]
    assert [turn.content for turn in conversation.rejected] == ["p", "bad"]
    assert conversation.strength == STRENGTHS.get(name, 1)
    again = conversation_from_row(json.loads(json.dumps(conversation.to_json())), HELPSTEER)
    assert (again.turns, again.rejected, again.strength) == (
        conversation.turns, conversation.rejected, conversation.strength,
    )  # fmt: skip


@pytest.mark.short
def test_a_system_text_beside_or_inside_the_messages():
    system = [{"role": "system", "content": "s"}]
    for prompt, before in ((system + MESSAGES[0], []), ("p", system), (system + MESSAGES[0], system)):
        sides = {key: before + MESSAGES[0] + MESSAGES[side] for key, side in (("chosen", 1), ("rejected", 2))}
        conversation = conversation_from_row({"prompt": prompt, **sides}, HELPSTEER)
        assert (conversation.system, len(conversation.turns), len(conversation.rejected)) == ("s", 2, 2)


BAD = {
    "equal texts": (ROWS["TRL"] | {"rejected": "good"}, "rejected"),
    "no prompt": ({"chosen": "good", "rejected": "bad"}, "chosen"),
    "margin below 0": (ROWS["TRL"] | {"margin": -1}, "strength"),
    "margin as text": (ROWS["TRL"] | {"margin": "much"}, "margin"),
    "ends on the user": ({"chosen": MESSAGES[0], "rejected": MESSAGES[0] + MESSAGES[2]}, "chosen"),
    "an empty side": ({"chosen": MESSAGES[0] + MESSAGES[1], "rejected": []}, "rejected"),
    "an empty side of ours": (ROWS["ours"] | {"rejected": []}, "rejected"),
    "another prompt inside": ({"prompt": "q", "chosen": MESSAGES[0] + MESSAGES[1], "rejected": MESSAGES[2]}, "chosen"),
    "preference missing": (ROWS["HelpSteer3"] | {"overall_preference": None}, "overall_preference"),
    "NaN": (ROWS["HelpSteer2"] | {"preference_strength": float("nan")}, "preference_strength"),
}


@pytest.mark.short
@pytest.mark.parametrize("name", BAD)
def test_rows_that_are_no_pair(name):
    row, field = BAD[name]
    with refused(DataError, field):
        conversation_from_row(row, HELPSTEER)


# ---- The report


@pytest.mark.short
def test_metrics_of_pairs():
    scores = np.array([[2.0, 1.0], [0.0, 3.0], [1.0, 1.0], [4.0, 0.0]])
    result = preference_result(scores, np.ones(4), [(5, 4), (5, 4), (4, 5), (3, 3)], range(4))
    assert result.metrics["accuracy"] == (1 + 0 + 0.5 + 1) / 4
    assert result.metrics["longer"] == (1 + 1 + 0 + 0.5) / 4
    assert result.metrics["margin"] == pytest.approx((1 - 3 + 0 + 4) / 4)
    low, high = result.interval()
    assert low <= result.metrics["accuracy"] <= high
    random = np.random.default_rng(0)
    difference = random.normal(size=20000)
    won = random.random(20000) < 1 / (1 + np.exp(-difference))
    mean, observed, counts = calibration(np.where(won, difference, -difference))
    assert counts.sum() == 40000
    np.testing.assert_allclose(mean, observed, atol=0.02)


# ---- A run


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """Pairs of which the preferred response has more of one word, and ratings that say the same."""
    random, path = np.random.default_rng(0), tmp_path_factory.mktemp("pairs") / "rows.jsonl"
    with path.open("w") as file:
        for number in range(160):
            counts = sorted(random.choice(9, 2, replace=False), reverse=True)
            turns = []
            for count in map(int, counts):
                answer = {"role": "assistant", "content": "good " * count + "word " * (9 - count)}
                answer["ratings"] = {"helpfulness": count / 2}
                turns.append([{"role": "user", "content": f"Question {number // 2}?"}, answer])
            row = {"turns": turns[0], "rejected": turns[1], "strength": int(counts[0] - counts[1])}
            file.write(json.dumps(row) + "\n")
    return path


def experiment(rows, objectives, **changes):
    config = default_config()
    config.objectives = objectives
    config.data.train = (str(rows),)
    config.data.validation_fraction = 0.25
    config.model.update(hidden_size=32, intermediate_size=64, num_layers=1, num_heads=2, num_kv_heads=2)
    config.batch.update(rows=8, row_length=256)
    config.optimizer.update(learning_rate=1e-2, warmup_steps=0, schedule="constant")
    config.train.update(steps=12, plots=True)
    for key, value in changes.items():
        group, name = key.split("__")
        setattr(config[group], name, value)
    return resolve(config.to_dict())


def test_a_run_learns_what_is_preferred(rows, tmp_path, capsys):
    found = train(experiment(rows, ("bradley_terry",), bradley_terry__loss="scaled"), tmp_path)["bradley_terry"]
    assert found.values["accuracy"] > 0.9
    assert found.detail.interval()[0] > 0.8
    assert "40 pairs" in capsys.readouterr().out
    last = read_metrics(tmp_path / "metrics.jsonl")[-1]
    assert last["accuracy"] == found.values["accuracy"]
    assert (tmp_path / "report" / "calibration.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_pairs_beside_ratings_are_the_weighted_sum(rows, tmp_path):
    changes = {"bradley_terry__weight": 0.5, "mesh__data": 2, "mesh__context": 4}
    losses = {}
    for micro_batches in (1, 4):
        e = experiment(rows, ("regression", "bradley_terry"), batch__micro_batches=micro_batches, **changes)
        train(e, tmp_path / str(micro_batches))
        records = read_metrics(tmp_path / str(micro_batches) / "metrics.jsonl")
        records = [r for r in records if r["split"] == "train"]
        losses[micro_batches] = [r["loss"] for r in records]
        parts = [r["regression/loss"] + 0.5 * r["bradley_terry/loss"] for r in records]
        np.testing.assert_allclose(losses[micro_batches], parts, rtol=1e-5)
    np.testing.assert_allclose(losses[1][:4], losses[4][:4], rtol=1e-4)


def test_what_cannot_be_trained(rows, tmp_path):
    plain = tmp_path / "plain.jsonl"
    plain.write_text(
        "".join(json.dumps({"prompt": f"{i}", "response": "r", "helpfulness": 3}) + "\n" for i in range(9))
    )
    with refused(DataError, "pair", cure="chosen"):
        train(experiment(plain, ("bradley_terry",)), tmp_path / "run")
    for score in ({"kindness": 1.0}, {"helpfulness": 0.0}):
        with refused(ConfigError, "config.bradley_terry.score"):
            experiment(rows, ("bradley_terry",), bradley_terry__score=score)


@pytest.mark.short
def test_a_response_with_a_rating_and_a_preference_is_written_once_in_a_tree_too_large_for_a_row():
    bt = objective("regular")
    pairs = some_pairs(bt, [1] * 60)
    prompt, rated = np.arange(7, 27, dtype=np.int32), []
    pairs = [replace(e, tokens=np.concatenate([prompt, e.tokens]), root=20, places=e.places + 20) for e in pairs]
    for number, pair in enumerate(pairs):
        rated.append(replace(pair, objective="regression", number=number, unit=None))
    tokens = {}
    for name, examples in {"pairs": pairs, "both": rated[::-1] + pairs}.items():
        trees = grow(examples)
        rows = pack(trees, 256, np.random.default_rng(0))
        assert len(trees) == 1
        assert len(rows) > 4
        tokens[name] = packing_statistics(trees, rows, 256).tokens
    assert tokens["both"] < 1.02 * tokens["pairs"]
