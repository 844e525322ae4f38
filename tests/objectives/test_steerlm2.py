"""SteerLM 2.0: golden values, the gradient of KL(w' || b') response by response, groups in trees, rows, a run."""

import json
import signal
import subprocess
from dataclasses import replace
from types import SimpleNamespace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from steerjax.bundle import open_bundle
from steerjax.chat.render import Renderer
from steerjax.chat.templates import TEMPLATES
from steerjax.chat.tokenizer import load_tokenizer
from steerjax.config import default_config, resolve
from steerjax.data.conversation import Conversation, Sample, Turn
from steerjax.data.packing import lay_out, pack
from steerjax.data.trees import grow
from steerjax.errors import ConfigError, DataError
from steerjax.export import export
from steerjax.models.llama import CausalLM, Compute
from steerjax.objectives import Setting
from steerjax.objectives.objective import TRAIN, VALIDATION
from steerjax.objectives.steerlm2 import SteerLM2, SteerLM2Config, log_current, log_targets
from steerjax.parallel.mesh import MeshConfig, make_mesh
from steerjax.report.records import read_metrics
from steerjax.schema import HELPSTEER
from steerjax.training.train import train
from tests.helpers import (
    SCHEMA,
    TINY,
    assert_trees_close,
    builder,
    host_batch,
    init_params,
    loss_and_gradients,
    random_tokens,
)
from tests.refusals import refused
from tests.training.test_equality import updated
from tests.training.test_run import command, environment, kill_after_step

MODULE = CausalLM(TINY, Compute(chunk=32))


@pytest.mark.short
def test_golden_values():
    """Reference facts, section 5.4."""
    log_ratings, log_priors, log_sampled = [-1, -2, -0.5], [-10, -12, -11], [-9, -11, -12]
    current, tokens = np.array([-8.5, -11.5, -12]), [5, 6, 7]
    log_w = log_targets(log_ratings, log_priors, log_sampled)
    row = jnp.array([[0, *current, 0, 0]]), jnp.array([[0, *log_sampled, 0, 0]]), jnp.array([[0, 1, 1, 1, 4, 5]])
    log_b = np.asarray(log_current(*row))[0]
    assert log_b[[0, 4, 5]].tolist() == [0, 0, 0]
    w, b = np.exp(log_w), np.exp(log_b[1:4])
    np.testing.assert_allclose(w, [0.073799, 0.027149, 0.899052], atol=1e-6)
    np.testing.assert_allclose(b, [0.506480, 0.186324, 0.307196], atol=1e-6)
    assert w @ (log_w - log_b[1:4]) == pytest.approx(0.771012, abs=1e-6)
    assert (w - b) @ -current / np.mean(tokens) == pytest.approx(0.265662, abs=1e-6)


@pytest.mark.short
def test_sums_of_hundreds_of_nats_stay_in_the_log_domain():
    log_w = log_targets([-1, -2], [-900, -2000], [-20, -1500])
    assert log_w.dtype == np.float64
    np.testing.assert_allclose(log_w, [-379, 0], atol=1e-9)
    log_b = log_current(jnp.array([[-900.0, -2000.0]]), jnp.array([[-20.0, -1500.0]]), jnp.array([[0, 0]]))
    np.testing.assert_allclose(log_b, [[-380, 0]], atol=1e-4)


def objective(row_length: int = 2**30) -> SteerLM2:
    return SteerLM2(SteerLM2Config(), Setting(SCHEMA, None, 16, row_length))


SIZES = (2, 5, 1, 3, 4, 2)


def some_texts(sizes=SIZES, seed: int = 0, longest: int = 12) -> list[list[tuple[np.ndarray, int, int]]]:
    """Of each prompt (tokens, root, start) of so many responses: some begin alike, some are the same text, one is its
    end alone. The last prompt stands twice."""
    random, groups = np.random.default_rng(seed), []
    for size in sizes:
        prompt = random_tokens(random, longest) if len(groups) < len(sizes) - 1 else groups[0][0][0][: groups[0][0][2]]
        answers = [random_tokens(random, longest) for _ in range(size)]
        if size > 2:
            answers[1], answers[2] = answers[0], np.concatenate([answers[0][:2], answers[2]])
        if size > 4:
            answers[4] = answers[4][:1]
        groups.append([(np.concatenate([prompt, answer]), max(1, len(prompt) - 1), len(prompt)) for answer in answers])
    return groups


def flat(groups):
    return [text for group in groups for text in group]


def plain_divergence(likelihoods, sizes, groups, logs):
    """Mean over prompts of KL(w' || b') / mean tokens, and of `distance`, from all responses' log Q."""
    losses, distances, start = [], [], 0
    for size, group, (rating, prior, sampled) in zip(sizes, groups, logs, strict=True):
        log_w = jax.nn.log_softmax(rating + prior - sampled)
        log_b = jax.nn.log_softmax(likelihoods[start : start + size] - sampled)
        w, b = jnp.exp(log_w), jnp.exp(log_b)
        distances.append(((w + 1e-8) * jnp.log((w + 1e-8) / (b + 1e-8))).sum())
        losses.append((w * (log_w - log_b)).sum() / np.mean([len(tokens) - start for tokens, _, start in group]))
        start += size
    return sum(losses) / len(groups), sum(distances) / len(groups)


def trees_of(found: SteerLM2, groups, logs):
    return grow([e for group, each in zip(groups, logs, strict=True) for e in found.group(TRAIN, group, *each)])


def logs_around(current, sizes, random):
    """Of each prompt's responses log P(a|x,y), log P(y|x), log Q'(y|a,x), the latter two not far from log Q."""
    logs = []
    for values in np.split(current, np.cumsum(sizes)[:-1]):
        rating, prior, sampled = random.normal(size=(3, len(values)))
        logs.append((rating, values + prior, values + sampled))
    return logs


class Case(NamedTuple):
    """Prompts with responses, and what is expected of them by plain differentiation."""

    params: dict
    groups: list
    logs: list  # of each prompt: log P(a|x,y), log P(y|x), log Q'(y|a,x)
    loss: float
    distance: float
    gradient: dict

    def trees(self, found: SteerLM2):
        return trees_of(found, self.groups, self.logs)


@pytest.fixture(scope="module")
def case() -> Case:
    return make_case()


def make_case(**options) -> Case:
    params, groups = init_params(MODULE), [g for g in some_texts(**options) if len(g) > 1]
    sizes, rows = [len(g) for g in groups], np.zeros((len(flat(groups)), 24), np.int32)
    trained = np.zeros(rows.shape, bool)
    for row, learnt, (tokens, _, start) in zip(rows, trained, flat(groups), strict=True):
        row[: len(tokens)], learnt[start : len(tokens)] = tokens, True

    def likelihoods(params):
        """Of each response in a row of its own."""
        places = np.broadcast_to(np.arange(24), rows.shape)
        logits = MODULE.apply({"params": params}, rows, places, np.full(rows.shape, 24))[:, :-1]
        found = jnp.take_along_axis(jax.nn.log_softmax(logits), rows[:, 1:, None], axis=-1)[..., 0]
        return (found * trained[:, 1:]).sum(axis=1)

    logs = logs_around(np.asarray(jax.jit(likelihoods)(params)), sizes, np.random.default_rng(1))

    def loss(params):
        return plain_divergence(likelihoods(params), sizes, groups, logs)

    (value, distance), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    return Case(params, groups, logs, float(value), float(distance), gradient)


def test_packed_groups_have_the_gradient_of_one_row_a_response():
    """Groups of unequal n; responses that begin alike, and equal ones. They are short: float32 rounds sums of many
    nats by more than 1e-5."""
    found, case = objective(), make_case(longest=6)
    trees = case.trees(found)
    rows = pack(trees, 48)
    assert len(trees) < len(case.groups)  # two have one prompt
    assert len(rows) > 1
    batch = host_batch([found], trees, [*rows, ()], 48)
    assert found.count(batch.targets["steerlm2"]) == len(case.groups)
    (loss, sums), gradients = loss_and_gradients(MODULE, [found], batch, case.params)
    np.testing.assert_allclose(loss, case.loss, rtol=1e-5)
    np.testing.assert_allclose(sums["distance"][0] / sums["distance"][1], case.distance, rtol=1e-5)
    assert_trees_close(gradients, case.gradient, rtol=1e-5)


@pytest.mark.short
def test_the_gradient_is_that_of_the_divergence():
    """Of hidden states and head, to 1e-6: with few, likely tokens, as float32 rounds sums of many nats."""
    random = np.random.default_rng(2)
    groups = [[(t % 4, root, start) for t, root, start in g] for g in some_texts(longest=5) if len(g) > 1]
    sizes = [len(group) for group in groups]
    hidden = random.normal(size=(1, 256, 8)).astype(np.float32)
    kernel = random.normal(size=(8, 4)).astype(np.float32)
    nothing = [np.zeros((3, size)) for size in sizes]
    trees = trees_of(objective(), groups, nothing)
    (row,) = pack(trees, 256)
    layout = lay_out(trees, row, 256, ("steerlm2",))
    places, tokens, learnt = np.zeros((3, sum(sizes), 8), np.int32)
    for example, end in layout.ends:
        text, _, start = flat(groups)[example.number]
        own = np.flatnonzero(layout.until[: end + 1] > end)[example.places]
        places[example.number, : len(own)], tokens[example.number, : len(own)] = own, text[start:]
        learnt[example.number, : len(own)] = 1

    def likelihoods(hidden, kernel):
        found = jax.nn.log_softmax(hidden[0, places] @ kernel)
        return (jnp.take_along_axis(found, tokens[..., None], axis=-1)[..., 0] * learnt).sum(axis=1)

    logs = logs_around(np.asarray(likelihoods(hidden, kernel)), sizes, random)
    found = objective()
    batch = jax.tree.map(lambda x: x[0], host_batch([found], trees_of(found, groups, logs), [row], 256))
    arrays = batch.targets["steerlm2"]

    def plain(hidden, kernel):
        return plain_divergence(likelihoods(hidden, kernel), sizes, groups, logs)[0]

    def ours(hidden, kernel):
        total, _ = found.loss(SimpleNamespace(head=lambda x: x @ kernel), hidden, batch, arrays)
        return total / found.count(arrays)

    results = [jax.jit(jax.value_and_grad(one, argnums=(0, 1)))(hidden, kernel) for one in (ours, plain)]
    assert_trees_close(*results, rtol=1e-6)
    assert np.abs(results[1][1][0]).max() > 1e-3


@pytest.fixture(scope="module")
def alone(case):
    return two_updates(case, (1, 1, 1, 1), 1, 1)


def two_updates(case, sizes, micro_batches, devices=8):
    found = objective()
    trees, mesh = case.trees(found), make_mesh(MeshConfig(*sizes), jax.devices()[:devices])
    rows = pack(trees, 64)
    rows += [()] * (8 - len(rows))
    losses, state = updated([found], MODULE, trees, rows, mesh, micro_batches)
    return losses, jax.device_get(state.params)


MESHES = [((2, 2, 2, 1), 2), ((8, 1, 1, 1), 1), ((1, 1, 2, 4), 8)]


@pytest.mark.slow
@pytest.mark.parametrize(("sizes", "micro_batches"), MESHES, ids=str)
def test_eight_devices_and_micro_batches_equal_one(case, alone, sizes, micro_batches):
    losses, params = two_updates(case, sizes, micro_batches)
    np.testing.assert_allclose(losses, alone[0], rtol=1e-5)
    assert_trees_close(params, alone[1], rtol=1e-5)
    assert abs(losses[1] - losses[0]) > 1e-3  # the first update is felt


@pytest.mark.short
def test_a_group_that_no_row_holds_is_a_bad_row_and_leaves_nothing_behind():
    """Its responses alone would fit."""
    group = some_texts((4, 2))[0]
    length = grow(objective().group(TRAIN, group, *np.zeros((3, 4))))[0].length
    assert length > max(len(tokens) for tokens, _, _ in group)
    found = objective(length - 1)
    with refused(DataError, "4", str(length), cure="config.batch.row_length"):
        found.group(TRAIN, group, *np.zeros((3, 4)))
    assert not any(found.counts[TRAIN].values())
    found = objective(length)
    (row,) = pack(grow(found.group(TRAIN, group, *np.zeros((3, 4)))), length)
    assert len(row[0].examples) == 4


# ---- Rows


RENDERER = Renderer(load_tokenizer("embedded"), TEMPLATES["extra_id"], HELPSTEER)
TALK = Conversation(
    (Turn("user", "Hi"), Turn("assistant", "Yo"), Turn("user", "More")), "SYS", "talk", "rows.jsonl", 7,
    asked={"verbosity": 1.0, "helpfulness": 4.0},
    samples=(Sample("one", -1.0, -10.0, -9.0), Sample("one two", -2.0, -12.0, -11.0), Sample("", -0.5, -11.0, -12.0)),
)  # fmt: skip


def on_rows(**setting) -> SteerLM2:
    return SteerLM2(SteerLM2Config(), Setting(HELPSTEER, RENDERER, **setting))


@pytest.mark.short
def test_what_a_row_trains():
    """Each response and its end, after the label line of what was asked for; that of an earlier turn has none."""
    found = on_rows()
    examples = found.examples(TALK, TRAIN)
    (tree,) = grow(examples)
    (row,) = pack([tree], 256)
    layout = builder([found], [tree], 256).layout(row)
    arrays = found.arrays(layout)
    start = "<extra_id_0>System\nSYS\n<extra_id_1>User\nHi\n<extra_id_1>Assistant\nYo\n<extra_id_1>User\nMore\n"
    start += "<extra_id_1>Assistant\n<extra_id_2>helpfulness:4,verbosity:1\n"
    decode = RENDERER.tokenizer.decode
    for example, sample in zip(examples, TALK.samples, strict=True):
        (end,) = (place for one, place in layout.ends if one is example)
        trained = arrays["trained"] & (arrays["slots"] == end)
        assert decode(example.tokens[: example.places[0] + 1]) == start
        assert decode(arrays["targets"][trained]) == f"{sample.content}\n<extra_id_1>"
    ends = [place for _, place in layout.ends]
    assert len({*arrays["groups"][ends]}) == 1
    np.testing.assert_allclose(np.exp(arrays["log_targets"][ends]), [0.073799, 0.027149, 0.899052], atol=1e-6)
    assert arrays["log_sampled"][ends].tolist() == [-9, -11, -12]
    assert set(arrays["tokens"][ends]) == {np.float32(arrays["trained"].sum() / 3)}
    assert found.count(arrays) == 1
    assert "1 prompts with 3 responses" in found.summary()["steerlm2, train"]
    assert "1.2 of 3.0" in found.summary()["steerlm2, train"]


@pytest.mark.short
def test_one_response_teaches_nothing():
    found = on_rows()
    single = replace(TALK, samples=TALK.samples[:1])
    assert found.examples(single, TRAIN) == []
    assert len(found.examples(TALK, VALIDATION)) == 3
    with refused(DataError, "train", cure="steerlm2"):
        found.check_data()
    assert "1 prompts with fewer than two" in found.summary()["steerlm2, train"]


@pytest.mark.short
def test_default_ratings_are_checked():
    with refused(ConfigError, "config.steerlm2.default_ratings", "9"):
        SteerLM2Config(default_ratings={"helpfulness": 9.0}).check(HELPSTEER)


# ---- A run


def experiment(rows, steps=8):
    config = default_config()
    config.objectives = ("steerlm2",)
    config.data.train = (str(rows),)
    config.data.validation_fraction = 0.25
    config.steerlm2.default_ratings = {"helpfulness": 4.0}
    config.model.update(hidden_size=32, intermediate_size=64, num_layers=1, num_heads=2, num_kv_heads=2)
    config.batch.update(rows=8, row_length=128)
    config.compute.attention_chunk = 32
    config.optimizer.update(learning_rate=3e-3, epsilon=1e-6, warmup_steps=0, schedule="constant")
    config.train.update(steps=steps, evaluate_every=4, checkpoint_every=2, plots=False)
    return config


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """Of three to five responses those with more good words are to be preferred; Q' has drawn all alike."""
    random, path = np.random.default_rng(0), tmp_path_factory.mktemp("rows") / "rows.jsonl"
    with path.open("w") as file:
        for number in range(40):
            samples = []
            for good in random.integers(0, 5, random.integers(3, 6)).tolist():
                text = "good " * good + "word " * (4 - good)
                samples.append(Sample(text, good - 5.0, -40.0, -40.0))
            asked = {"helpfulness": 4.0}
            talk = Conversation(
                (Turn("user", f"Question {number}?"),), id=str(number), asked=asked, samples=tuple(samples)
            )
            file.write(json.dumps(talk.to_json()) + "\n")
    return path


@pytest.fixture(scope="module")
def whole(rows, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("whole")
    train(resolve(experiment(rows).to_dict()), workdir)
    return workdir


def assert_same(whole, others):
    """Parameters to the bit, and what an exported model is asked for."""
    first, *rest = (open_bundle(folder, MeshConfig(data=8)) for folder in (whole, *others))
    for other in rest:
        jax.tree.map(np.testing.assert_array_equal, first.params, other.params)
        assert (other.description.kind, other.description.default_ratings) == ("chat", {"helpfulness": 4.0})


def test_a_run_learns_resumes_as_if_uninterrupted_and_is_exported(rows, whole, tmp_path, capsys):
    first, *_, last = read_metrics(whole / "metrics.jsonl")
    assert (first["step"], last["split"]) == (1, VALIDATION)  # the first is of the parameters before its step
    assert 0 < last["distance"] < 0.5 * first["distance"]
    for steps in (4, 8):
        train(resolve(experiment(rows, steps=steps).to_dict()), tmp_path / "parts")
    said = capsys.readouterr().out
    assert "resumed at step 4 of 8" in said
    assert "distance at step 2" in said
    export(str(tmp_path / "parts"), tmp_path / "exported")
    assert_same(whole, [tmp_path / "parts", tmp_path / "exported"])


RECIPE = """
from tests.objectives.test_steerlm2 import experiment

def get_config():
    return experiment({!r}, steps=24)
"""


@pytest.mark.slow
def test_a_killed_command_goes_on(rows, tmp_path, repository):
    recipe, env = tmp_path / "recipe.py", environment(repository)
    recipe.write_text(RECIPE.format(str(rows)))
    killed, whole = (command(recipe, tmp_path / name) for name in ("killed", "whole"))
    assert kill_after_step(killed, tmp_path / "killed", 10, env, signal.SIGKILL) == -signal.SIGKILL
    outputs = [
        subprocess.run(one, env=env, check=True, capture_output=True, text=True).stdout for one in (killed, whole)
    ]
    assert ["resumed at step" in output for output in outputs] == [True, False]
    assert_same(tmp_path / "whole", [tmp_path / "killed"])
