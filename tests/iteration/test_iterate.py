"""SteerLM 2.0's driver on tiny random models: what it writes, and the same when it was killed in each stage."""

import json
import os
import random
import signal
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from scipy.special import softmax

from steerjax.bundle import describe, open_bundle
from steerjax.bundle.reader import open_reader
from steerjax.config import default_config, resolve
from steerjax.errors import ConfigError, DataError, ModelError, SteerjaxError
from steerjax.inference import job
from steerjax.inference.importance import answer_example, read_scores
from steerjax.iteration import driver
from steerjax.iteration.driver import iterate
from steerjax.iteration.groups import ALONE, CUT, LONG, TOGETHER, UNRATED
from steerjax.iteration.options import Options
from steerjax.report.records import read_metrics
from steerjax.schema import HELPSTEER, OASST
from tests.hf_folders import CLASSIFIER, TINY, random_tensors, write_folder
from tests.refusals import refused
from tests.reward_models import read_rows, write_rows

ASKED = {"helpfulness": 1, "verbosity": 0}
FILES = ("samples", "rated", "log_sampled", "log_prior", "groups")


def model_folder(folder, kind, attributes=HELPSTEER, **config):
    """Tiny, with norms that do nothing; a chat model's answers are short."""
    config = TINY | {"num_hidden_layers": 2, "tie_word_embeddings": False} | config
    tensors = random_tensors(config)
    for name, tensor in tensors.items():
        tensors[name] = np.ones_like(tensor) if "norm" in name else 0.3 * tensor
    if kind == "chat":
        tensors["lm_head.weight"][config["eos_token_id"]] *= 5
    write_folder(folder, config, tensors)
    about = {"kind": kind, "template": "extra_id", "attributes": attributes and attributes.to_json()}
    (folder / "steerjax.json").write_text(json.dumps(about))
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return model_folder(folder / "chat", "chat"), model_folder(folder / "reward", "reward", **CLASSIFIER)


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    """Six bare prompts, two conversations of one name that end with a user's turn, and the first prompt again."""
    answered = {"role": "assistant", "content": "Hello", "ratings": {"verbosity": 1}}
    history = [{"role": "user", "content": "Hi"}, answered]
    rows = [{"prompt": f"Name a prime above {n}."} for n in range(6)]
    rows += [{"turns": [*history, {"role": "user", "content": f"{n}?"}], "id": "one name"} for n in range(2)]
    return write_rows(tmp_path_factory.mktemp("prompts") / "prompts.jsonl", [*rows, rows[0]])


def experiment(chat, **changes):
    """One step holds all groups that are trained on."""
    config = default_config()
    config.objectives = ("steerlm2",)
    config.data.validation_fraction = 0.25
    config.model.source = str(chat)
    config.batch.update(rows=8, row_length=256)
    config.optimizer.update(learning_rate=1e-3, warmup_steps=0, schedule="constant")
    config.train.update(steps=3, checkpoint_every=1, plots=False, trackers=())
    config.update_from_flattened_dict(changes)
    return resolve(config.to_dict())


def options(reward, prompts, **changes):
    asked = ",".join(f"{name}={rating}" for name, rating in ASKED.items())
    given = {"iterations": 1, "samples": 4, "max_new_tokens": 16, "attributes": asked} | changes
    return Options(prompts=str(prompts), reward_model=str(reward), **given)


def content(workdir):
    """Bytes of every stage's file, the last parameters, and what was found."""
    found = {}
    for folder in sorted(workdir.glob("iteration-*")):
        found |= {f"{folder.name}/{name}": (folder / f"{name}.jsonl").read_bytes() for name in FILES}
        found[folder.name] = json.loads((folder / "result.json").read_text())
        last = max((folder / "run" / "checkpoints").iterdir(), key=lambda step: int(step.name))
        reader = open_reader(last)
        found |= {f"{folder.name}/{path}": reader.read(path, ...).tobytes() for path in reader.shapes}
    return found


class Killed(BaseException):
    pass


@pytest.fixture(scope="module")
def whole(models, prompts, tmp_path_factory):
    """A workdir of one iteration that nobody disturbed, with what it printed."""
    chat, reward = models
    workdir = tmp_path_factory.mktemp("iterate") / "work"
    (found,) = iterate(experiment(chat), options(reward, prompts), workdir)
    return workdir, found


def test_an_iteration(models, whole, prompts):
    chat, reward = models
    workdir, found = whole
    folder = workdir / "iteration-1"
    asked, samples, rated, groups = (
        read_rows(file) for file in (workdir / "prompts.jsonl", *(folder / f"{n}.jsonl" for n in ("samples", "rated", "groups")))
    )
    assert len(asked) == 8
    assert all(turn.keys() == {"role", "content"} for row in asked for turn in row["turns"])  # no ratings
    assert len(samples) == 8 * 4
    assert all(row["generation"]["attributes"] == ASKED for row in samples)

    # Every answer is in a group or listed.
    skipped = read_rows(folder / "groups.jsonl.skipped.jsonl")
    kept = [response for group in groups for response in group["responses"]]
    assert len(kept) + len(skipped) + len(samples) - len(rated) == len(samples)
    assert {row["reason"] for row in skipped} <= {CUT, ALONE}
    assert sum(row["generation"]["finish"] == "length" for row in samples) == sum(row["reason"] == CUT for row in skipped)
    for row in skipped:
        assert row["file"] == str(folder / "rated.jsonl")
    assert (found.prompts, found.answers, found.groups) == (8, 32, len(groups))
    assert found.left_out == 32 - len(kept)
    assert {group["label"] for group in groups} == {"helpfulness:1,verbosity:0"}
    assert [turn["from"] for turn in groups[-1]["prompt_turns"]] == ["User", "Assistant", "User"]

    # Log-probabilities are those of each text alone; the prior sees no label line.
    bundle = open_bundle(str(chat))
    conversations = {row["id"]: row for row in asked}
    weights = [softmax([r["log(P(a|x,y))"] + r["log(P(y|x))"] - r["log(Q(y|a,x))"] for r in g["responses"]]) for g in groups]
    assert found.effective_samples == pytest.approx(np.mean([1 / np.square(w).sum() for w in weights]))
    assert len(conversations) == 7
    assert bundle.description.kind == "chat"
    # TODO more


def test_before_the_first_step_all_answers_weigh_the_same(whole):
    """Training renders and scores as the pipeline does: its first step's distance is KL(w' || uniform)."""
    workdir, found = whole
    records = read_metrics(workdir / "iteration-1" / "run" / "metrics.jsonl")
    print([(r["step"], r["split"], r["distance"]) for r in records], found)
    first = next(r for r in records if r["split"] == "train")
    assert first
