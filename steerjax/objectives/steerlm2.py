"""SteerLM 2.0: of a prompt's sampled responses, those that fit the asked ratings better become likelier.

With x a prompt, a the asked ratings, and y_i responses that Q' gave, the model Q is to have P(y|a,x), which is
proportional to P(a|x,y) P(y|x). Weighted by importance, over the responses to one prompt:

    w'_i = softmax_i(log P(a|x,y_i) + log P(y_i|x) - log Q'(y_i|a,x))
    b'_i = softmax_i(log Q(y_i|a,x) - log Q'(y_i|a,x))

The loss of a prompt is KL(w' || b') over the mean number of trained tokens of its responses.

Source: HelpSteer2, arXiv 2406.08673, section 4.5; NeMo-Aligner `gpt_steerlm_model.py`, whose gradient this is.
"""

import functools
from collections import Counter
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pydantic.dataclasses
from jaxtyping import Array, Float, Int
from scipy.special import log_softmax

from steerjax.data.conversation import Conversation
from steerjax.data.packing import check_fits
from steerjax.data.trees import Example, grow
from steerjax.errors import DataError
from steerjax.models.logits import token_log_likelihoods
from steerjax.objectives.cross_entropy import chunked_cross_entropy
from steerjax.objectives.objective import TRAIN, VALIDATION, Evaluation, Objective, SteeredConfig
from steerjax.report.losses import LossPage
from steerjax.typed import STRICT

TINY = 1e-8  # the reference's, in `distance`


@pydantic.dataclasses.dataclass(frozen=True, config=STRICT)
class SteerLM2Config(SteeredConfig):
    """SteerLM 2.0, from rows of sampled responses with log-probabilities; config.model.source is what sampled them."""

    group = "steerlm2"


def log_targets(log_ratings, log_priors, log_sampled) -> Float[np.ndarray, " n"]:
    """log w' of a prompt's n responses, float64, from `Sample`'s log-probabilities."""
    return log_softmax(np.add(log_ratings, log_priors, dtype=np.float64) - log_sampled)


def log_current(
    log_likelihoods: Float[Array, "B T"], log_sampled: Float[Array, "B T"], groups: Int[Array, "B T"]
) -> Float[Array, "B T"]:
    """log b' where responses end, float32: over the places of a row that have the same number in `groups`, from 0 to T;
    a place alone in its group has 0."""
    ratios = log_likelihoods - log_sampled
    top = jnp.take_along_axis(_reduced(jax.ops.segment_max, ratios, groups), groups, axis=1)
    total = _reduced(jax.ops.segment_sum, jnp.exp(ratios - top), groups)
    return ratios - top - jnp.log(jnp.take_along_axis(total, groups, axis=1))


def _reduced(reduce, values: Float[Array, "B T"], segments: Int[Array, "B T"]) -> Float[Array, "B T"]:
    """Row by row."""
    return jax.vmap(functools.partial(reduce, num_segments=values.shape[1]))(values, segments)


@dataclass(frozen=True, eq=False)
class _Response:
    tokens: np.ndarray  # int32 [n], those that are trained
    group: int
    log_target: float
    log_sampled: float
    mean: float  # trained tokens of a response of its group


class SteerLM2(Objective):
    """Each response is an example; those of a prompt are one unit, which packing never cuts.

    Targets are numbers of trained tokens, each its own, so that two responses share their prompt and nothing else.
    """

    name, kind, Config, sampled = "steerlm2", "chat", SteerLM2Config, True

    def __init__(self, config, setting):
        super().__init__(config, setting)
        self.counts: dict[str, Counter] = {TRAIN: Counter(), VALIDATION: Counter()}
        self._responses: list[_Response] = []  # of both splits, by `Example.number`
        self._groups = self._tokens = 0  # so many

    def examples(self, conversation, split):
        counts, samples = self.counts[split], conversation.samples
        if len(samples) < 2:
            counts["single"] += 1
            return []
        texts = [self._tokens_of(conversation, sample.content) for sample in samples]
        logs = [np.array([getattr(s, key) for s in samples]) for key in ("log_rating", "log_prior", "log_sampled")]
        return self.group(split, texts, *logs)

    def _tokens_of(self, conversation: Conversation, response: str) -> tuple[np.ndarray, int, int]:
        """The tokens through a response's end, `Rendered.root`, and where the response begins."""
        tokens, root, start = self.setting.renderer.response_tokens(conversation, response, conversation.asked)
        self.setting.check_length(len(tokens))
        return tokens, root, start

    def group(self, split: str, texts, log_ratings, log_priors, log_sampled) -> list[Example]:
        """Of one prompt's responses: (tokens, root, where the response begins) each, and their log-probabilities.

        Raises DataError: no row can hold them together.
        """
        found, first = [], self._tokens
        root = min(min(root, start) for _, root, start in texts)
        for number, (tokens, _, start) in enumerate(texts, start=len(self._responses)):
            places = np.arange(start - 1, len(tokens) - 1, dtype=np.int32)
            targets = np.arange(first, first + len(places), dtype=np.int32)
            ones = np.ones(len(places), np.float32)
            found.append(Example(self.name, number, tokens[:-1], root, places, targets, ones, unit=self._groups))
            first += len(places)
        try:
            check_fits(grow(found)[0].length, self.setting.row_length)
        except DataError as error:
            raise error.but(field="responses", message=f"{len(texts)} responses to a prompt: {error.message}") from None
        targets, mean = log_targets(log_ratings, log_priors, log_sampled), (first - self._tokens) / len(texts)
        for (tokens, _, start), target, sampled in zip(texts, targets, log_sampled, strict=True):
            self._responses.append(_Response(tokens[start:], self._groups, target, sampled, mean))
        effective = 1 / np.exp(2 * targets).sum()
        self.counts[split].update(groups=1, responses=len(texts), tokens=first - self._tokens, effective=effective)
        self._groups, self._tokens = self._groups + 1, first
        return found

    def check_data(self):
        for split, counts in self.counts.items():
            if not counts["groups"]:
                what = f"nothing to train for {split}: no prompt with two responses"
                raise DataError(what, cure="rows of the format steerlm2 with two responses or more (docs/steerlm2.md)")

    def arrays(self, layout):
        """All [T]. Where a token is trained: `targets` int32, the next one; `slots` int32, the place where its response
        ends; `trained` bool. At slots: `groups` int32, the first slot of the same prompt; float32 `log_targets`,
        `log_sampled`, and `tokens`, the mean number of trained tokens of a response. Every other place is its own slot
        and group."""
        length = len(layout.tokens)
        slots, groups = np.arange(length, dtype=np.int32), np.arange(length, dtype=np.int32)
        targets, firsts = np.zeros(length, np.int32), {}
        logs, sampled, tokens = np.zeros((3, length), np.float32)
        for example, end in layout.ends:
            if example.objective != self.name:
                continue
            response = self._responses[example.number]
            own = np.flatnonzero(layout.until[: end + 1] > end)  # what its last token sees: the example's tokens
            targets[own[example.places]] = response.tokens
            slots[own[example.places]] = end
            groups[end] = firsts.setdefault(response.group, end)
            logs[end], sampled[end], tokens[end] = response.log_target, response.log_sampled, response.mean
        trained = layout.targets[self.name] >= 0
        return {
            "targets": targets, "slots": slots, "trained": trained, "groups": groups, "log_targets": logs,
            "log_sampled": sampled, "tokens": tokens,
        }  # fmt: skip

    def count(self, arrays):
        first = arrays["groups"] == jnp.arange(arrays["groups"].shape[-1])
        return (first & (arrays["tokens"] > 0)).sum(dtype=jnp.float32)

    def _divergence(self, model, hidden, arrays):
        """KL(w' || b') / mean tokens and `distance`, both summed over the rows, and the gradient of the first for each
        token's negative log likelihood [B T]."""
        each, _ = token_log_likelihoods(hidden, model.head, arrays["targets"], self.setting.loss_chunk)
        each = jnp.where(arrays["trained"], each, 0.0)
        likelihoods = _reduced(jax.ops.segment_sum, each, arrays["slots"])
        log_w, log_b = arrays["log_targets"], log_current(likelihoods, arrays["log_sampled"], arrays["groups"])
        w, b, over = jnp.exp(log_w), jnp.exp(log_b), jnp.maximum(arrays["tokens"], 1.0)
        divergence = (w * (log_w - log_b) / over).sum()
        distance = ((w + TINY) * jnp.log((w + TINY) / (b + TINY))).sum()
        return divergence, distance, jnp.take_along_axis((w - b) / over, arrays["slots"], axis=1)

    def loss(self, model, hidden, batch, arrays):
        divergence, distance, weights = self._divergence(model, hidden, arrays)
        chunk = self.setting.loss_chunk
        total, *_ = chunked_cross_entropy(hidden, model.head, arrays["targets"], weights, chunk)
        # The value of the divergence, and the gradient of the weighted sum, which is the divergence's.
        return total + jax.lax.stop_gradient(divergence - total), {"distance": (distance, self.count(arrays))}

    def outputs(self, model, hidden, batch, arrays):
        """Sums of loss and distance, and the number of prompts."""
        divergence, distance, _ = self._divergence(model, hidden, arrays)
        return divergence, distance, self.count(arrays)

    def evaluate(self, steps):
        loss, distance, count = np.sum([[float(x) for x in outputs] for _, outputs in steps], axis=0)
        return Evaluation(loss / count, {"distance": distance / count})

    def facts(self):
        return self.config.facts()

    def summary(self):
        said = {}
        for split, n in self.counts.items():
            groups = max(1, n["groups"])
            words = (
                f"{n['groups']} prompts with {n['responses']} responses, {n['tokens']:,} trained tokens",
                f"effective responses a prompt, by w': {n['effective'] / groups:.1f} of {n['responses'] / groups:.1f}",
                n["single"] and f"{n['single']} prompts with fewer than two responses are left out",
            )
            said[f"steerlm2, {split}"] = "; ".join(filter(None, words))
        return said

    def report(self, evaluation, folder, records, summary, config_text):
        distance = evaluation.values["distance"]
        values = {"loss (nats a token)": evaluation.loss, "distance, KL(w' || b') (nats)": distance}
        before = [r for r in records if r["split"] == VALIDATION and r.get("distance") is not None]
        if before:
            values[f"distance at step {before[0]['step']}"] = before[0]["distance"]
        counted = f"validation, {self.counts[VALIDATION]['groups']} prompts"
        page = LossPage("SteerLM 2.0 on the validation split", counted, values, self.losses(records), "nats a token")
        return page.write(folder, summary, config_text)
