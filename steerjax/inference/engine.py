"""Batched decoding: prompts once through the model, then one token a row and step under one jit.

A row is one answer: a prompt in one setting of the ratings, and one sample. What the settings of a prompt have in
common, the prefix, is computed once; the suffix is what differs, at least the last token. The cache's slots: [0, P)
prefix, [P, P + Q) suffix, then new tokens. Padding is masked, and positions count without it.
"""

import copy
import functools
import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from steerjax.bundle import Bundle
from steerjax.data.conversation import Conversation
from steerjax.errors import DataError
from steerjax.inference.sampler import draw
from steerjax.inference.steering import Answer, Sampling, Setting, hashed, label_of
from steerjax.inference.stopping import Stops
from steerjax.models.attention import Cache
from steerjax.models.llama import CausalLM
from steerjax.parallel.rules import RULES, constrain, mesh_ways
from steerjax.schema import Schema

_WINDOW = 4  # batches whose requests are sorted by length
_LOOK = 64  # steps between two looks of the host


class Request(NamedTuple):
    """One prompt in one or several settings: int32 tokens of each, up to the answer; and the answers to each."""

    prompts: tuple[np.ndarray, ...]
    samples: int = 1


class Inputs(NamedTuple):
    """A batch of R requests with n rows each, B = R n, right-padded; arrays of the host."""

    prefix: Int[np.ndarray, "R P"]
    prefix_lengths: Int[np.ndarray, " R"]
    suffix: Int[np.ndarray, "B Q"]
    suffix_lengths: Int[np.ndarray, " B"]  # at least 1; 0 in rows that fill the batch
    seeds: Int[np.ndarray, " B"]


class State(NamedTuple):
    """Where a batch stands; S = P + Q + M - 1, as the last token is never fed back."""

    cache: Cache  # keys and values [L B S K H]
    seen: Bool[Array, "B S"]  # which slots hold a token
    keys: Array  # of the rows' draws
    tokens: Int[Array, "B M"]  # those drawn so far; after a row's end they mean nothing
    drawn: Int[Array, " B"]  # how many in each row, its end included
    done: Bool[Array, " B"]  # rows that have ended
    count: Int[Array, ""]  # steps; the greatest of `drawn`


class Engine:
    """Answers from a chat model of our own. The text of a row depends on others at most in the rounding of sums.

    `schema` is that of label lines; `batch_size`, rows decoded together, is rounded to whole requests that the mesh
    can share evenly. Raises ModelError: a reward model.
    """

    def __init__(self, bundle: Bundle, schema: Schema, sampling: Sampling = Sampling(), batch_size: int = 8):  # noqa: B008
        self._about = about = bundle.description
        about.expect("chat")
        model = bundle.module.clone(compute=replace(bundle.module.compute, remat="none"))
        self.params, self.mesh, self.sampling, self.batch_size = bundle.params, bundle.mesh, sampling, batch_size
        self.model, self.stops = str(about.path), Stops(about.tokenizer, about.template)
        self._renderer, self._ways = bundle.renderer(schema), mesh_ways(bundle.mesh, RULES["batch"])
        self._start = jax.jit(functools.partial(start, model, self.stops), static_argnums=0)
        self._advance = jax.jit(functools.partial(advance, model, self.stops), static_argnums=0, donate_argnums=2)

    def drawing(self, sampling: Sampling, batch_size: int) -> Self:
        """The same model, drawing so. What was compiled is shared, and no seed is compiled."""
        other = copy.copy(self)
        other.sampling, other.batch_size = sampling, batch_size
        return other

    def prepare(self, conversation: Conversation, settings: Sequence[Setting], samples: int) -> Request:
        """The conversation's tokens in each setting of the ratings; earlier answers with those that they have.

        Raises DataError: what the renderer refuses, or no room for the answer.
        """
        about = self._about
        history = [(turn.ratings or turn.predicted_ratings) if about.schema else None for turn in conversation.turns]
        labels = [label_of(setting, about.default_ratings) or None for setting in settings]
        render = functools.partial(self._renderer.render, conversation, history, generation_prompt=True)
        prompts = tuple(render(generation_label=label).tokens for label in labels)
        longest, new, room = max(map(len, prompts)), self.sampling.max_new_tokens, about.model.max_position_embeddings
        if longest + new > room:
            wrong = f"{longest} tokens and {new} new ones are more than the model's {room}"
            cure = "shorten it, or use a lower --max-new-tokens"
            raise DataError(wrong, cure=cure, file=conversation.file, line=conversation.line)
        return Request(prompts, samples)

    def run(self, requests: Sequence[Request], done: int = 0) -> Iterator[list[Answer]]:
        """The answers to each request from `done` on, for each setting and sample; all have as many of both."""
        rows = len(requests[0].prompts) * requests[0].samples if requests else 1
        size = self._batch(rows, len(requests))
        for first in range(0, len(requests), _WINDOW * size):  # all windows, so that a resumed job has the same batches
            window = range(first, min(first + _WINDOW * size, len(requests)))
            order, answers = sorted(window, key=lambda i: len(requests[i].prompts[0])), {}
            for batch in (order[at : at + size] for at in range(0, len(order), size)):
                if max(batch) >= done:
                    *_, drawn = self._steps([requests[i] for i in batch], size, _LOOK)
                    found = [self._answer(*row) for row in drawn[: len(batch) * rows]]
                    answers |= {i: found[place * rows : (place + 1) * rows] for place, i in enumerate(batch)}
            yield from (answers[i] for i in window if i >= done)

    def stream(self, request: Request) -> Iterator[str | Answer]:
        """The pieces of one answer as they are drawn, then the whole `Answer`."""
        shown = ""
        for rows in self._steps([request], self._batch(1, 1), 1):
            answer = self._answer(*rows[0])
            ready = shown if answer.finish == "stop" else self.stops.settled(answer.text)
            if ready.startswith(shown):
                yield ready[len(shown) :]
                shown = ready
        yield answer.text[len(shown) :]
        yield answer

    def _batch(self, rows: int, requests: int) -> int:
        """Requests of so many rows in a batch, where there are so many."""
        return -(-max(1, min(self.batch_size // rows, requests)) // self._ways) * self._ways

    def _steps(self, requests: Sequence[Request], size: int, interval: int) -> Iterator[list[tuple[np.ndarray, bool]]]:
        """(tokens, ended) of each row, after every `interval` steps."""
        inputs, how = arrange(requests, size, self.sampling.seed), replace(self.sampling, seed=0)
        with jax.set_mesh(self.mesh):
            state = self._start(how, self.params, inputs)
            while True:
                tokens, drawn, done, count = jax.device_get((state.tokens, state.drawn, state.done, state.count))
                yield [(row[:n], bool(d)) for row, n, d in zip(tokens, drawn, done, strict=True)]
                if done.all() or count == how.max_new_tokens:
                    return
                state = self._advance(how, self.params, state, min(int(count) + interval, how.max_new_tokens))

    def _answer(self, tokens: np.ndarray, ended: bool) -> Answer:
        text, stopped = self.stops.find(tokens)
        return Answer(text, "stop" if ended or stopped else "length", len(tokens), tuple(tokens.tolist()))


def arrange(requests: Sequence[Request], size: int, seed: int = 0) -> Inputs:
    """Requests as a batch of `size`, lengths rounded up so that few shapes are compiled."""
    prefixes, suffixes, seeds = [], [], []
    for request in requests:
        shared = common_length(request.prompts)
        prefixes.append(request.prompts[0][:shared])
        for prompt in request.prompts:
            suffixes += [prompt[shared:]] * request.samples
            seeds += [hashed(seed, prompt.tolist(), sample) for sample in range(request.samples)]
    rows = size * len(seeds) // len(requests)
    seeds += [0] * (rows - len(seeds))
    return Inputs(*_padded(prefixes, size, least=32), *_padded(suffixes, rows, least=1), np.array(seeds, np.int32))


def common_length(prompts: Sequence[np.ndarray]) -> int:
    """Tokens that all prompts begin with, leaving at least one to each."""
    return len(os.path.commonprefix([prompt[:-1].tolist() for prompt in prompts]))  # noqa: RUF071 - tokens, no paths


def bucket(length: int, least: int) -> int:
    """`length` rounded up to a power of two, or to three quarters of one."""
    power = 1 << max(0, length - 1).bit_length()
    return max(least, power * 3 // 4 if power * 3 // 4 >= length else power)


def _padded(texts: Sequence[np.ndarray], rows: int, least: int) -> tuple[np.ndarray, np.ndarray]:
    lengths = np.array([len(text) for text in texts] + [0] * (rows - len(texts)), np.int32)
    out = np.zeros((rows, bucket(int(lengths.max()), least)), np.int32)
    for row, text in zip(out, texts, strict=False):
        row[: len(text)] = text
    return out, lengths


def start(model: CausalLM, stops: Stops, sampling: Sampling, params: dict, inputs: Inputs) -> State:
    """Prefixes, then suffixes through the model; the first token is drawn."""
    R, B, M = len(inputs.prefix), len(inputs.suffix), sampling.max_new_tokens

    def feed(cache: Cache, seen: Bool[Array, "B S"], tokens: Int[Array, "B T"], lengths: Int[Array, " B"]):
        real = jnp.arange(tokens.shape[1]) < lengths[:, None]
        states, new = extend(model, params, cache, seen, constrain(tokens, "batch", None), real)
        cache = jax.tree.map(lambda *x: jnp.concatenate(x, axis=2), cache, new)
        return states, cache, jnp.concatenate([seen, real], axis=1)

    _, cache, seen = feed(empty_cache(model, R), jnp.zeros((R, 0), bool), inputs.prefix, inputs.prefix_lengths)
    cache = jax.tree.map(lambda x: placed(jnp.repeat(x, B // R, axis=1)), cache)  # each row of a request gets its own
    states, cache, seen = feed(cache, jnp.repeat(seen, B // R, axis=0), inputs.suffix, inputs.suffix_lengths)
    states = jnp.take_along_axis(states, inputs.suffix_lengths[:, None, None] - 1, axis=1)[:, 0]
    room = ((0, 0), (0, 0), (0, M - 1), (0, 0), (0, 0))
    state = State(
        cache=jax.tree.map(lambda x: placed(jnp.pad(x, room)), cache),
        seen=jnp.pad(seen, room[1:3]),
        keys=jax.vmap(jax.random.key)(inputs.seeds),
        tokens=jnp.zeros((B, M), jnp.int32),
        drawn=jnp.zeros(B, jnp.int32),
        done=inputs.suffix_lengths == 0,
        count=jnp.int32(0),
    )
    return add_token(model, stops, sampling, params, state, states)


def extend(
    model: CausalLM, params: dict, cache: Cache, seen: Bool[Array, "B S"],
    tokens: Int[Array, "B T"], real: Bool[Array, "B T"],
) -> tuple[Float[Array, "B T D"], Cache]:  # fmt: skip
    """States, keys and values of texts that go on after those of the cache; `real` is false in their padding."""
    B, T = tokens.shape
    own = jnp.tril(jnp.ones((T, T), bool)) & real[:, None]
    mask = jnp.concatenate([jnp.broadcast_to(seen[:, None], (B, T, seen.shape[1])), own], axis=-1)
    positions = seen.sum(1, keepdims=True) + jnp.arange(T)
    if model.config.window:
        slots = jnp.concatenate([jnp.cumsum(seen, axis=1) - 1, positions], axis=1)
        mask &= positions[:, :, None] - slots[:, None] < model.config.window
    return model.apply({"params": params}, tokens, positions, cache, mask, method="extend")


def advance(model: CausalLM, stops: Stops, sampling: Sampling, params: dict, state: State, until: int) -> State:
    """Draws tokens until there are `until`, or all rows have ended."""
    B, M = state.tokens.shape

    def step(state: State) -> State:
        fed = state.count - 1
        token, real = jax.lax.dynamic_slice_in_dim(state.tokens, fed, 1, axis=1), jnp.ones((B, 1), bool)
        states, new = extend(model, params, state.cache, state.seen, token, real)
        slot = state.seen.shape[1] - (M - 1) + fed
        write = functools.partial(jax.lax.dynamic_update_slice_in_dim, start_index=slot)
        cache = jax.tree.map(functools.partial(write, axis=2), state.cache, new)
        state = state._replace(cache=cache, seen=write(state.seen, real, axis=1))
        return add_token(model, stops, sampling, params, state, states[:, 0])

    return jax.lax.while_loop(lambda state: (state.count < until) & ~state.done.all(), step, state)


def add_token(
    model: CausalLM, stops: Stops, sampling: Sampling, params: dict, state: State, states: Float[Array, "B D"]
) -> State:
    """Draws a token for each row, and sees whether it ends the row. Every process reads what is constrained here."""
    logits = model.apply({"params": params}, states, method="head")
    token = draw(logits, state.keys, state.count, sampling)
    tokens = jax.lax.dynamic_update_slice_in_dim(state.tokens, token[:, None], state.count, axis=1)
    tokens = constrain(tokens, None, None)
    drawn = constrain(jnp.where(state.done, state.drawn, state.count + 1), None)
    done = constrain(state.done | stops.ended(tokens, state.count), None)
    return state._replace(tokens=tokens, drawn=drawn, done=done, count=state.count + 1)


def empty_cache(model: CausalLM, rows: int) -> Cache:
    """Of no slots: keys and values [L B 0 K H]."""
    c = model.config
    none = jnp.zeros((c.num_layers, rows, 0, c.num_kv_heads, c.head_dim), model.compute.dtype)
    return Cache(none, none)


def placed(x: Array) -> Array:
    """A part of the cache on the mesh: rows on (data, fsdp), key-value heads on tensor."""
    return constrain(x, None, "batch", None, "kv_heads", None)
