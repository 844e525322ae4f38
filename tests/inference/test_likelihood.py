"""Log-likelihoods: those of each text alone, whatever shares a row; transformers'; the same on every mesh."""

import math
import re
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from steerjax.bundle import open_bundle
from steerjax.errors import ConfigError, DataError, ModelError
from steerjax.inference.likelihood import LikelihoodScorer, continuation
from steerjax.models.logits import cut, joined, token_log_likelihoods
from steerjax.parallel.mesh import MeshConfig
from tests.refusals import refused
from tests.reward_models import chat_folder, reward_folder

MESHES = {
    "data": MeshConfig(),
    "fsdp and tensor": MeshConfig(data=2, fsdp=2, tensor=2),
    "context": MeshConfig(data=4, context=2),
}


@pytest.fixture(autouse=True)
def short_rows(monkeypatch):
    monkeypatch.setattr("steerjax.inference.packed._SHORTEST_ROW", 64)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return chat_folder(tmp_path_factory.mktemp("chat"), context=256)


@pytest.fixture(scope="module")
def opened(folder):
    return open_bundle(folder, template="chatml")


def texts(seed=0) -> list[tuple[np.ndarray, int]]:
    """(tokens, where the continuation starts): one beginning, four prompts after it, one to six continuations each, of
    which some are one token, some begin another, and one stands twice."""
    random = np.random.default_rng(seed)

    def draw(low, high):
        return random.integers(10, 4096, random.integers(low, high))

    found, beginning = [], draw(30, 31)
    for count in (1, 6, 3, 5):
        prompt = np.concatenate([beginning, draw(5, 20)])
        answers = [draw(1, 12) for _ in range(count)]
        if count > 3:
            answers[1], answers[2] = answers[0][:1], np.concatenate([answers[0], draw(1, 4)])
        found += [(np.concatenate([prompt, answer]), len(prompt)) for answer in answers]
    return [*found, found[3]]


def plain_logits(bundle):
    """Tokens -> their logits [T, V], without packing, chunks or mesh."""
    params, length = jax.tree.map(jnp.asarray, jax.device_get(bundle.params)), 80
    apply = jax.jit(lambda row: bundle.module.apply({"params": params}, row[None], jnp.arange(length)[None], until)[0])
    until = jnp.full((1, length), length)
    return lambda tokens: np.asarray(apply(np.pad(tokens, (0, length - len(tokens)))), np.float64)[: len(tokens)]


def alone(logits, tokens, start) -> tuple[float, bool]:
    """Log-likelihood of one text, and whether it is greedy."""
    found = logits(tokens)[start - 1 : -1]
    likelihoods = found - np.logaddexp.reduce(found, axis=-1, keepdims=True)
    targets = tokens[start:]
    return likelihoods[np.arange(len(targets)), targets].sum(), bool((found.argmax(-1) == targets).all())


@pytest.fixture(scope="module")
def expected(opened):
    logits = plain_logits(opened)
    return [alone(logits, *text) for text in texts()]


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("root", [0, 30])
def test_what_shares_a_row_does_not_matter(folder, expected, mesh, root):
    """root 30: all in one tree, which is cut into several rows."""
    scorer = LikelihoodScorer(open_bundle(folder, MESHES[mesh], template="chatml"), row_length=128)
    given = texts()
    found = scorer([continuation(*text, root) for text in given])
    np.testing.assert_allclose(found.log_likelihoods, [value for value, _ in expected], rtol=0, atol=1e-4)
    assert found.greedy.tolist() == [greedy for _, greedy in expected]
    assert found.log_likelihoods.dtype == np.float64
    assert np.ptp(found.log_likelihoods) > 10
    assert found.tokens.sum() == scorer.counts.tokens < sum(len(tokens) for tokens, _ in given) / (1.2 + (root > 0))
    assert scorer.counts.examples == len(given)
    # The same again compiles nothing and gives the same bits; the order is the caller's.
    compiled = scorer._packed._function._cache_size()
    again = scorer([continuation(*text, root) for text in given])
    assert scorer._packed._function._cache_size() == compiled
    np.testing.assert_array_equal(again.log_likelihoods, found.log_likelihoods)
    backwards = scorer([continuation(*text, root) for text in given[::-1]])
    np.testing.assert_allclose(backwards.log_likelihoods[::-1], found.log_likelihoods, rtol=0, atol=1e-5)


def test_greedy_is_what_the_model_would_say(opened):
    tokens, logits = texts()[0][0][:40].tolist(), plain_logits(opened)
    start = len(tokens)
    for _ in range(3):
        tokens.append(int(logits(np.array(tokens))[-1].argmax()))
    other = [*tokens[:-1], (tokens[-1] + 1) % 4096]
    found = LikelihoodScorer(opened)([continuation(tokens, start), continuation(other, start)])
    assert found.greedy.tolist() == [True, False]
    assert found.log_likelihoods[0] > found.log_likelihoods[1]


def test_any_example_that_training_makes_has_a_likelihood(opened):
    """Targets in several places, with weights, of another objective, kept together as units."""
    tokens, start = texts()[0]
    first, last = (continuation(tokens[:end], begin) for begin, end in ((10, 20), (start, len(tokens))))
    both = replace(
        last, objective="sft", number=7, unit="pair", weights=np.repeat(np.float32([2, 0.5]), [10, len(last.places)]),
        places=np.concatenate([first.places, last.places]), targets=np.concatenate([first.targets, last.targets]),
    )  # fmt: skip
    one, two, sum_of_both = LikelihoodScorer(opened)([first, last, both]).log_likelihoods
    assert sum_of_both == pytest.approx(2 * one + 0.5 * two, abs=1e-4)


@pytest.mark.parity
def test_equals_transformers(folder, opened):
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    theirs = []
    for tokens, start in texts(seed=1):
        with torch.no_grad():
            logp = model(torch.tensor(tokens[None], dtype=torch.long)).logits[0].log_softmax(-1)
        theirs.append(logp[np.arange(start - 1, len(tokens) - 1), tokens[start:]].double().sum().item())
    ours = LikelihoodScorer(opened, row_length=128)([continuation(*text, 30) for text in texts(seed=1)])
    np.testing.assert_allclose(ours.log_likelihoods, theirs, rtol=0, atol=1e-4)


@pytest.mark.short
def test_logits_of_a_row_never_exist():
    random = np.random.default_rng(0)
    states, kernel = random.normal(size=(2, 37, 8)).astype(np.float32), random.normal(size=(8, 96)).astype(np.float32)
    targets = random.integers(0, 96, (2, 37))
    traced = str(jax.make_jaxpr(lambda s: token_log_likelihoods(s, lambda x: x @ kernel, targets, 8))(states))
    sizes = [math.prod(map(int, shape.split(","))) for shape in re.findall(r":f32\[([\d,]+)\]", traced)]
    assert max(sizes) == 2 * 8 * 96
    values, likeliest = token_log_likelihoods(states, lambda x: x @ kernel, targets, 8)
    expected = jax.nn.log_softmax(states @ kernel)
    np.testing.assert_allclose(values, np.take_along_axis(expected, targets[..., None], -1)[..., 0], atol=1e-5)
    np.testing.assert_array_equal(likeliest, expected.argmax(-1) == targets)
    np.testing.assert_array_equal(joined(cut(states, 8), 37), states)


def test_refusals(opened, tmp_path):
    with refused(ModelError, "reward", cure="chat"):
        LikelihoodScorer(open_bundle(reward_folder(tmp_path / "reward"), template="chatml"))
    with refused(ConfigError, "3 rows", cure="8"):
        LikelihoodScorer(opened, rows=3)
    long = continuation(np.ones(301, int), 5)
    with refused(DataError, "300", "the model holds 256", cure="positions"):
        LikelihoodScorer(opened, row_length=512)([long])
    with refused(DataError, "300", "a row holds 128", cure="row"):
        LikelihoodScorer(opened, row_length=128)([long])
