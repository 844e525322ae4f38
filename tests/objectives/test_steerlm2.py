"""SteerLM 2.0: golden values, the gradient of KL(w' || b') response by response, groups in trees, rows, a run."""

import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import log_softmax

from steerjax.bundle import open_bundle
from steerjax.chat.render import Renderer
from steerjax.chat.templates import TEMPLATES
from steerjax.chat.tokenizer import load_tokenizer
from steerjax.config import default_config, resolve
from steerjax.data.conversation import Conversation, Sample, Turn
from steerjax.data.packing import pack
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
from steerjax.train import main
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


def likelihood(params, text):
    """log Q(y|a,x) of a response in a row of its own; differentiable."""
    tokens, _, start = text
    inputs = tokens[None], np.arange(len(tokens))[None], np.full((1, len(tokens)), len(tokens))
    logits = MODULE.apply({"params": params}, *inputs)[0]
    return jax.nn.log_softmax(logits)[np.arange(start - 1, len(tokens) - 1), tokens[start:]].sum()


@pytest.fixture(scope="module")
def case():
    """Parameters, groups, log-probabilities of each, and loss and gradient of KL(w' || b') by plain differentiation."""
    params, groups, random = init_params(MODULE), [g for g in some_texts() if len(g) > 1], np.random.default_rng(1)
    logs = [(-3 * random.random(len(g)), -30 * random.random(len(g))) for g in groups]
    sampled = jax.jit(lambda p: [[likelihood(p, text) for text in group] for group in groups])(params)
    sampled = [np.array(one, np.float64) + random.normal(size=len(one)) for one in sampled]
    logs = [
        (rating, sampled_by + 2 * random.normal(size=len(rating)), sampled_by)
        for (rating, _), sampled_by in zip(logs, sampled, strict=True)
    ]

    def plain(params):
        losses, distances = [], []
        for group, (rating, prior, by) in zip(groups, logs, strict=True):
            w = jax.nn.softmax(rating + prior - by)
            b = jax.nn.softmax(jnp.stack([likelihood(params, text) for text in group]) - by)
            distances.append(((w + 1e-8) * jnp.log((w + 1e-8) / (b + 1e-8))).sum())
            losses.append((w * jnp.log(w / b)).sum() / np.mean([len(tokens) - start for tokens, _, start in group]))
        return sum(losses) / len(groups), sum(distances) / len(groups)

    (loss, distance), gradient = jax.jit(jax.value_and_grad(plain, has_aux=True))(params)
    return params, groups, logs, float(loss), float(distance), gradient


def grown(case, found: SteerLM2, split: str = TRAIN):
    return grow([e for group, logs in zip(case[1], case[2], strict=True) for e in found.group(split, group, *logs)])


@pytest.mark.parametrize("row_length", [80, 256])
@pytest.mark.parametrize("micro_batches", [1, 2])
def test_packed_groups_have_the_gradient_of_each_response_alone(case, row_length, micro_batches):
    """Groups of unequal n; responses that begin alike, and equal ones."""
    params, groups, _, loss, distance, gradient = case
    found = objective()
    trees = grown(case, found)
    rows = pack(trees, row_length)
    assert len(trees) < len(groups)  # two have one prompt
    assert (len(rows) > 1) == (row_length == 80)
    whole = host_batch([found], trees, [*rows, ()], row_length)
    (ours, sums), gradients = loss_and_gradients(MODULE, [found], whole, params)
    assert found.count(whole.targets["steerlm2"]) == len(groups)
    np.testing.assert_allclose(ours, loss, rtol=1e-6)
    np.testing.assert_allclose(sums["distance"][0] / sums["distance"][1], distance, rtol=1e-6)
    assert_trees_close(gradients, gradient, rtol=1e-6)
