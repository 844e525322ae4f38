"""SteerLM 2.0's driver on tiny random models: what it writes, and the same when it was killed in each stage."""

import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from scipy.special import log_softmax, softmax

from steerjax.beta_bins import log_probabilities
from steerjax.bundle.reader import open_reader
from steerjax.config import resolve
from steerjax.data.loading import load_conversations, split_by_prompt
from steerjax.errors import ConfigError, DataError, ModelError
from steerjax.inference import job
from steerjax.inference.importance import read_scores
from steerjax.iteration import driver
from steerjax.iteration.driver import iterate
from steerjax.iteration.groups import ALONE, CUT
from steerjax.iteration.options import Options
from steerjax.report.records import read_metrics
from steerjax.schema import HELPSTEER
from steerjax.training.train import Run
from steerjax.typed import typed
from tests.hf_folders import CLASSIFIER, TINY, random_tensors, write_folder
from tests.refusals import refused
from tests.reward_models import read_rows, write_rows

ASKED = {"helpfulness": 1, "verbosity": 0}
FILES = ("samples", "rated", "log_sampled", "log_prior", "groups")


# A step has the eight groups that are trained on, each in a row of its own.
RECIPE = """
from steerjax.config import default_config

def get_config():
    config = default_config()
    config.objectives = ("steerlm2",)
    config.data.validation_fraction = 0.2
    config.model.source = {chat!r}
    config.batch.update(rows=8, row_length=160)
    config.optimizer.update(learning_rate=1e-3, warmup_steps=0, schedule="constant")
    config.train.update(steps=3, checkpoint_every=1, plots=False, trackers=())
    return config
"""


def model_folder(folder, kind, seed=0, **config):
    """Tiny, with norms that do nothing; a chat model's answers are short."""
    config = TINY | {"num_hidden_layers": 2, "tie_word_embeddings": False} | config
    tensors = random_tensors(config, seed)
    for name, tensor in tensors.items():
        tensors[name] = np.ones_like(tensor) if "norm" in name else 0.3 * tensor
    if kind == "chat":
        tensors["lm_head.weight"][config["eos_token_id"]] *= 5
    write_folder(folder, config, tensors)
    about = {"kind": kind, "template": "extra_id", "attributes": HELPSTEER.to_json()}
    (folder / "steerjax.json").write_text(json.dumps(about))
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return model_folder(folder / "chat", "chat"), model_folder(folder / "reward", "reward", **CLASSIFIER)


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    """Eight bare prompts, two conversations of one name that end with a user's turn, and the first prompt again."""
    rows = [{"prompt": f"Name a prime above {n}."} for n in range(8)]
    answer = {"role": "assistant", "content": "Hello", "ratings": {"verbosity": 1}}
    for said in ("Hi", "Hey"):
        turns = [{"role": "user", "content": said}, answer, {"role": "user", "content": "Why?"}]
        rows.append({"turns": turns, "id": "one name"})
    return write_rows(tmp_path_factory.mktemp("prompts") / "prompts.jsonl", [*rows, rows[0]])


def experiment(chat, **changes):
    made = {}
    exec(RECIPE.format(chat=str(chat)), made)
    config = made["get_config"]()
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


def dying(function, calls, name=""):
    """The function, killed at the last of so many calls; where a file is named, as it writes that, within a line."""
    left = iter(range(calls - 1, -1, -1))

    def call(first, *rest, **options):
        file = Path(getattr(first, "name", "")).name
        if not file.startswith(name) or next(left):
            return function(first, *rest, **options)
        if name:
            first.write(rest[0][0][: len(rest[0][0]) // 2])
            first.flush()
        raise Killed

    return call


@pytest.fixture(scope="module")
def whole(models, prompts, tmp_path_factory):
    """A workdir of an iteration that was killed as it wrote the third answers, and went on to its end."""
    chat, reward = models
    workdir = tmp_path_factory.mktemp("iterate") / "work"
    arguments = experiment(chat), options(reward, prompts), workdir
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(job, "_write", dying(job._write, 3, "samples"))
        with pytest.raises(Killed):
            iterate(*arguments)
    assert (workdir / "iteration-1" / "samples.jsonl.partial").read_bytes().count(b"\n") == 8
    (found,) = iterate(*arguments)
    return workdir, found


@pytest.mark.slow
def test_every_answer_is_in_a_group_or_listed(whole):
    workdir, found = whole
    folder = workdir / "iteration-1"
    samples, rated, groups = (read_rows(folder / f"{name}.jsonl") for name in ("samples", "rated", "groups"))
    skipped = read_rows(folder / "groups.jsonl.skipped.jsonl")
    answers = [(row["turns"][-1]["content"], row["generation"]["finish"]) for row in samples]
    assert len(samples) == 10 * 4
    assert all(row["generation"]["attributes"] == ASKED for row in samples)
    assert {row["file"] for row in skipped} == {str(folder / "rated.jsonl")}
    listed = Counter(row["reason"] for row in skipped)
    assert listed.keys() <= {CUT, ALONE}
    assert listed[CUT] == sum(bool(text) and finish == "length" for text, finish in answers)
    kept = [response["value"] for group in groups for response in group["responses"]]
    assert len(kept) + listed.total() + len(samples) - len(rated) == len(samples)
    lines = {row["line"] for row in skipped}
    assert kept == [row["turns"][-1]["content"] for line, row in enumerate(rated, start=1) if line not in lines]
    assert (found.prompts, found.answers, found.left_out, found.groups) == (10, 40, 40 - len(kept), len(groups))


def test_rows_of_groups(whole):
    """Prompts once, without ratings; the log-probabilities of their answers and of the ratings that were asked for."""
    workdir, found = whole
    folder = workdir / "iteration-1"
    asked, groups = read_rows(workdir / "prompts.jsonl"), read_rows(folder / "groups.jsonl")
    assert len(asked) == 10
    assert all(turn.keys() == {"role", "content"} for row in asked for turn in row["turns"])
    assert {group["label"] for group in groups} == {"helpfulness:1,verbosity:0"}
    assert [turn["from"] for turn in groups[-1]["prompt_turns"]] == ["User", "Assistant", "User"]
    said = {row["turns"][-1]["content"]: row["turns"][-1] for row in read_rows(folder / "rated.jsonl")}
    effective = []
    for group in groups:
        responses = group["responses"]
        predicted = [said[response["value"]]["predicted_ratings"] for response in responses]
        table = np.array([[row[name] for name in HELPSTEER.names] for row in predicted])
        expected = log_probabilities(table, HELPSTEER, ASKED)
        np.testing.assert_allclose([response["log(P(a|x,y))"] for response in responses], expected)
        effective.append(1 / np.square(softmax(logs(group))).sum())
    assert found.effective_samples == pytest.approx(np.mean(effective))
    for name, key in (("log_sampled", "log(Q(y|a,x))"), ("log_prior", "log(P(y|x))")):
        scores = [value for one in read_scores(folder / f"{name}.jsonl") for value in one.log_likelihoods]
        assert {response[key] for group in groups for response in group["responses"]} <= set(scores)


def logs(group) -> np.ndarray:
    """log w of a group's answers, but for a constant."""
    return np.array([r["log(P(a|x,y))"] + r["log(P(y|x))"] - r["log(Q(y|a,x))"] for r in group["responses"]])


def test_before_the_first_step_all_answers_are_as_likely_as_when_they_were_sampled(whole):
    """So b' is uniform, and the first step's distance is KL(w' || uniform)."""
    workdir, found = whole
    groups = load_conversations([str(workdir / "iteration-1" / "groups.jsonl")], HELPSTEER).conversations
    train, held_out = split_by_prompt(groups, 0.2, 0)
    expected = [np.mean([log_softmax(logs(g)) @ softmax(logs(g)) + np.log(len(g["responses"])) for g in part])
                for part in ([g.to_json() for g in split] for split in (train, held_out))]  # fmt: skip
    records = read_metrics(workdir / "iteration-1" / "run" / "metrics.jsonl")
    first = next(record for record in records if record["split"] == "train")
    assert first["step"] == 1
    assert first["distance"] == pytest.approx(expected[0], abs=1e-4)
    assert found.before == pytest.approx(expected[1])
    assert found.after == records[-1]["distance"]


def test_a_finished_iteration_is_not_started_again(models, prompts, whole, monkeypatch, capsys):
    chat, reward = models
    workdir, found = whole
    for name in ("Session", "annotate", "open_bundle", "train"):
        monkeypatch.setattr(driver, name, None)
    assert iterate(experiment(chat), options(reward, prompts), workdir) == [found]
    (workdir / "iteration-1" / "result.json").rename(workdir / "aside")
    with pytest.raises(TypeError, match="NoneType"):  # the training
        iterate(experiment(chat), options(reward, prompts), workdir)
    (workdir / "aside").rename(workdir / "iteration-1" / "result.json")
    head, line = capsys.readouterr().out.split("iteration 1: answers")[0].strip().splitlines()
    assert head.split()[:2] == ["iteration", "prompts"]
    assert line.split()[:3] == ["1", str(found.groups), "40"]


@pytest.mark.slow
def test_an_iteration_that_was_killed_is_the_same(models, prompts, whole, tmp_path_factory):
    """Nobody disturbs the other one."""
    chat, reward = models
    (killed, _) = whole
    expected = content(killed)
    aside = killed.rename(killed.with_name("killed"))
    try:
        iterate(experiment(chat), options(reward, prompts), killed)
        assert content(killed) == expected
    finally:
        killed.rename(killed.with_name("undisturbed"))
        aside.rename(killed)


STAGES = (("samples", 3), ("rated", 1), ("log_sampled", 1), ("log_prior", 1), ("groups", 2))


@pytest.mark.slow
def test_killed_in_each_stage(models, prompts, whole, tmp_path_factory):
    """At a write of each file, in the middle of the training, and before the result is written."""
    chat, reward = models
    workdir, _ = whole
    expected = content(workdir)
    aside = workdir.rename(workdir.with_name("aside"))
    arguments = experiment(chat), options(reward, prompts), workdir
    try:
        for name, calls in STAGES:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(job, "_write", dying(job._write, calls, name))
                with pytest.raises(Killed):
                    iterate(*arguments)
            assert (workdir / "iteration-1" / f"{name}.jsonl.partial").exists()
        for place, name, calls in ((Run, "evaluate", 2), (driver, "write_text", 1)):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(place, name, dying(getattr(place, name), calls))
                with pytest.raises(Killed):
                    iterate(*arguments)
        iterate(*arguments)
        assert content(workdir) == expected
    finally:
        workdir.rename(workdir.with_name("in each stage"))
        aside.rename(workdir)


REFUSED = {  # name -> (changes of the config, of the options, the error, what it names, its cure)
    "another objective": ({"objectives": ("sft",)}, {}, ConfigError, "config.objectives", "sft_steerlm2"),
    "no chat model": ({"model.source": "random"}, {}, ConfigError, "config.model.source", "chat"),
    "fewer layers": ({"model.keep_layers": 1}, {}, ConfigError, "config.model.keep_layers", "0"),
    "held-out data": ({"data.validation": ("x.jsonl",)}, {}, ConfigError, "config.data.validation", "empty"),
    "data of its own": ({"steerlm2.train": ("x.jsonl",)}, {}, ConfigError, "config.steerlm2.train", "empty"),
    "other attributes": ({"data.schema": "oasst"}, {}, ConfigError, "config.data", "helpfulness"),
    "another template": ({"chat.template": "chatml"}, {}, ModelError, "extra_id", ""),
    "nothing asked for": ({}, {"attributes": ""}, ConfigError, "nothing", "attributes"),
    "an unknown attribute": ({}, {"attributes": "wit=3"}, ConfigError, "wit", ""),
    "what is not predicted": ({}, {"attributes": "coherence=3"}, ModelError, "coherence", "coherence"),
    "no prompts": ({}, {"prompts": "nowhere.jsonl"}, DataError, "nowhere.jsonl", ""),
    "a chat model that rates": ({}, {"reward_model": "chat"}, ModelError, "chat", ""),
    "a reward model that answers": ({}, {"prior": "reward"}, ModelError, "reward", ""),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refused_before_anything_is_computed(name, models, prompts, tmp_path, monkeypatch):
    chat, reward = models
    config, changes, error, fact, cure = REFUSED[name]
    about = json.loads((reward / "steerjax.json").read_text())
    rated = [attribute for attribute in HELPSTEER.names if attribute != "coherence"]
    other = tmp_path / "reward"
    shutil.copytree(reward, other)
    (other / "steerjax.json").write_text(json.dumps(about | {"provenance": {"rated_attributes": rated}}))
    folders = {"chat": str(chat), "reward": str(other)}
    given = {"reward_model": str(other), "prompts": str(prompts)} | changes
    given = {key: folders.get(value, value) for key, value in given.items()}
    monkeypatch.setattr(driver, "Session", None)
    with refused(error, fact, cure=cure):
        iterate(experiment(chat, **config), replace(options(other, prompts), **given), tmp_path / "work")


def test_pairs_are_asked_without_their_old_responses(tmp_path):
    sides = [[{"role": "user", "content": "q"}, {"role": "assistant", "content": text}] for text in ("good", "bad")]
    file = write_rows(tmp_path / "pairs.jsonl", [{"turns": sides[0], "rejected": sides[1], "strength": 2.0}])
    asked = Options(prompts=str(file), reward_model="")
    setup = driver.Setup(None, asked, tmp_path, SimpleNamespace(schema=HELPSTEER), None, None, tmp_path / "asked.jsonl")
    driver.write_prompts(setup, {})
    (row,) = read_rows(setup.prompts)
    assert row == {"system": None, "turns": sides[0][:1], "id": f"{file}:1"}


def test_a_workdir_of_other_settings(models, prompts, whole):
    chat, reward = models
    for config, changes, key in (
        ({}, {"samples": 5}, "samples"),
        ({}, {"edges": "equal"}, "edges"),
        ({"optimizer.learning_rate": 1e-4}, {}, "config.optimizer.learning_rate"),
        ({"train.seed": 1}, {}, "config.train.seed"),
        ({}, {"prior": str(reward.parent / "prior")}, "prior"),
    ):
        if "prior" in changes:
            model_folder(reward.parent / "prior", "chat", seed=1)
        with refused(DataError, key, cure="settings"):
            iterate(experiment(chat, **config), options(reward, prompts, **changes), whole[0])


@pytest.mark.parametrize(
    ("name", "value"),
    [("samples", 1), ("iterations", 0), ("temperature", 0.0), ("top_p", 1.5), ("edges", "sharp"), ("prior", "a\0b")],
)
def test_options_out_of_range(name, value):
    with refused(ConfigError, f"options.{name}"):
        typed(Options, {"prompts": "p", "reward_model": "r", name: value}, "options", ConfigError)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2))
def test_killed_at_random_moments(seed, models, prompts, tmp_path, repository):
    """Real processes and SIGKILL, two iterations: the bytes of every stage and the parameters of one that nobody
    disturbed."""
    chat, reward = models
    (tmp_path / "recipe.py").write_text(RECIPE.format(chat=str(chat)))
    command = [
        sys.executable, "-m", "steerjax", "iterate", "--config", tmp_path / "recipe.py", "--workdir", tmp_path / "work",
        "--prompts", prompts, "--reward-model", reward, "--attributes", "helpfulness=1,verbosity=0", "--samples", 4,
        "--max-new-tokens", 16,
    ]  # fmt: skip
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(repository), "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "cache"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }  # fmt: skip

    def run(seconds=None) -> bool:
        """Whether it came to its end."""
        process = subprocess.Popen(list(map(str, command)), env=environment, stdout=subprocess.DEVNULL)
        try:
            assert process.wait(timeout=seconds) == 0
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            return False
        return True

    assert run()  # compiles
    shutil.rmtree(tmp_path / "work")
    begin = time.monotonic()
    assert run()
    seconds, expected = time.monotonic() - begin, content(tmp_path / "work")
    assert len(expected) > 2 * len(FILES)
    (tmp_path / "work").rename(tmp_path / "whole")
    draw, kills = random.Random(seed), 0
    while not run(draw.uniform(0.2, 0.8) * seconds if kills < 6 else None):
        kills += 1
    assert kills
    assert content(tmp_path / "work") == expected
