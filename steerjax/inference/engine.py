"""Batched decoding: prompts once through the model, then one token a row and step under one jit.

A row is one answer: a prompt in one setting of the ratings, and one sample. What the settings of a prompt have in
common, the prefix, is computed once; the suffix is what differs; the last token is fed with the first step. When the
rows of a request have ended, the next request takes their place, while the others go on.

The cache's slots: [0, M) a ring, one slot a step for all rows, as no answer has more than M tokens; [M, M + Q) suffix,
then P of the prefix, which follow the longest prompt at work. What a row has not filled is masked.
"""

import copy
import functools
import math
import os
from collections import deque
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
from steerjax.models.llama import CausalLM, unstacked
from steerjax.parallel.rules import RULES, constrain, mesh_ways
from steerjax.schema import Schema

_WINDOW = 8  # batches whose requests are sorted by length
_CHUNK = 64  # tokens of a prefix that go through the model at once


class Request(NamedTuple):
    """One prompt in one or several settings: int32 tokens of each, up to the answer; and the answers to each."""

    prompts: tuple[np.ndarray, ...]
    samples: int = 1


class Inputs(NamedTuple):
    """W requests with n rows each, right-padded; arrays of the host."""

    prefix: Int[np.ndarray, "W P"]
    prefix_lengths: Int[np.ndarray, " W"]
    suffix: Int[np.ndarray, "Wn Q"]
    suffix_lengths: Int[np.ndarray, " Wn"]
    last: Int[np.ndarray, " Wn"]  # token of the prompt; -1 where there is no request
    seeds: Int[np.ndarray, " Wn"]


class Rows(NamedTuple):
    """How the rows of a batch lie: W ways of the mesh have C places each, and a place has the n rows of a request."""

    W: int
    C: int
    n: int


class State(NamedTuple):
    """Where a batch stands."""

    cache: tuple[Cache, ...]  # keys and values [B K S H] of each layer, S = M + Q + P
    positions: Int[Array, "B S"]  # where in its row's text the token of a slot stands; -1: none
    next_token: Int[Array, " B"]  # the token that goes through the model next
    seeds: Int[Array, " B"]
    tokens: Int[Array, "B M"]  # those drawn so far
    drawn: Int[Array, " B"]  # how many, an end included
    ended: Bool[Array, " B"]  # has drawn an end, or is no row
    count: Int[Array, ""]  # steps

    @property
    def done(self) -> Bool[Array, " B"]:
        return self.ended | (self.drawn == self.tokens.shape[1])


class Engine:
    """Answers from a chat model of our own. The text of a row depends on others at most in the rounding of sums.

    `schema` is that of label lines; not `labelled`, where nobody says that the model knows them, ratings of earlier
    answers are left out. `batch_size`, rows decoded together, is rounded to whole requests that the mesh can share
    evenly. Raises ModelError: a reward model.
    """

    def __init__(
        self, bundle: Bundle, schema: Schema, sampling: Sampling = Sampling(), batch_size: int = 8, *,  # noqa: B008
        labelled: bool = True,
    ):  # fmt: skip
        self._about = about = bundle.description
        about.expect("chat")
        model = bundle.module.clone(compute=replace(bundle.module.compute, stacked=False, remat="none"))
        self.params, self.mesh = unstacked(bundle.params), bundle.mesh
        self.sampling, self.batch_size, self._labelled = sampling, batch_size, labelled
        self.model, self.stops = str(about.path), Stops(about.tokenizer, about.template)
        self._renderer, self._ways = bundle.renderer(schema), mesh_ways(bundle.mesh, RULES["batch"])
        self._empty = jax.jit(functools.partial(empty, model), static_argnums=(0, 1, 2))
        self._fit = jax.jit(fit, static_argnums=1)
        self._fill = jax.jit(functools.partial(fill, model), static_argnums=0, donate_argnums=2)
        self._advance = jax.jit(functools.partial(advance, model, self.stops), static_argnums=(0, 1), donate_argnums=3)

    def drawing(self, sampling: Sampling, batch_size: int) -> Self:
        """The same model, drawing so. What was compiled is shared, and no seed is compiled."""
        other = copy.copy(self)
        other.sampling, other.batch_size = sampling, batch_size
        return other

    def prepare(self, conversation: Conversation, settings: Sequence[Setting], samples: int) -> Request:
        """The conversation's tokens in each setting of the ratings; earlier answers with those that they have.

        Raises DataError: what the renderer refuses, or no room for the answer.
        """
        about, turns = self._about, conversation.turns
        history = [(turn.ratings or turn.predicted_ratings) if self._labelled else None for turn in turns]
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
        order, answers = by_length(requests, done, _WINDOW * self.batch_size), {}
        for index, rows in self._work(requests, order):
            answers[index] = [self._answer(*row) for row in rows]
            while done in answers:
                yield answers.pop(done)
                done += 1

    def stream(self, request: Request) -> Iterator[str | Answer]:
        """The pieces of one answer as they are drawn, then the whole `Answer`."""
        shown = ""
        for _, rows in self._work([request], [0], each_step=True):
            answer = self._answer(*rows[0])
            ready = shown if answer.finish == "stop" else self.stops.settled(answer.text)
            if ready.startswith(shown):
                yield ready[len(shown) :]
                shown = ready
        yield answer.text[len(shown) :]
        yield answer

    def _work(self, requests: Sequence[Request], order: Sequence[int], each_step: bool = False):
        """Takes requests up in this order. Yields (index, (tokens, ended) of each row) when one is answered; with
        `each_step` of all at work after each step.
        """
        if not order:
            return
        how, M, W = replace(self.sampling, seed=0), self.sampling.max_new_tokens, self._ways
        waiting = deque(order[at : at + W] for at in range(0, len(order), W))
        n = len(requests[order[0]].prompts) * requests[order[0]].samples
        shape = Rows(W, max(1, min(self.batch_size // (n * W), len(waiting))), n)
        shared = {index: common_length(requests[index].prompts) for index in order}
        Q = bucket(max(len(prompt) - 1 - shared[i] for i in order for prompt in requests[i].prompts), 0)
        groups: list[Sequence[int]] = [()] * shape.C
        with jax.set_mesh(self.mesh):
            state = self._empty(shape, M, M + Q)
            while waiting or any(groups):
                free = [place for place, group in enumerate(groups) if not group][: len(waiting)]
                for place in free:
                    groups[place] = waiting.popleft()
                P = max(bucket(shared[index], _CHUNK) for group in groups for index in group)
                if free and state.positions.shape[1] != M + Q + P:
                    state = self._fit(state, M + Q + P)
                for place in free:
                    inputs = arrange([requests[index] for index in groups[place]], W, P, Q, self.sampling.seed)
                    state = self._fill(shape, self.params, state, inputs, place)
                steps, enough = 1 if each_step else M, 1 if waiting else shape.C
                state = self._advance(how, shape, self.params, state, steps, enough)
                tokens, drawn, ended, done = jax.device_get((state.tokens, state.drawn, state.ended, state.done))
                for place, group in enumerate(groups):
                    rows = (np.arange(W)[:, None] * shape.C + place) * n + np.arange(n)
                    finished = done[rows].all()
                    if each_step or finished:
                        for index, own in zip(group, rows, strict=False):
                            yield index, [(tokens[row, : drawn[row]], bool(ended[row])) for row in own]
                    if finished:
                        groups[place] = ()

    def _answer(self, tokens: np.ndarray, ended: bool) -> Answer:
        text, stopped = self.stops.find(tokens)
        return Answer(text, "stop" if ended or stopped else "length", len(tokens), tuple(tokens.tolist()))


def by_length(requests: Sequence[Request], first: int, window: int) -> list[int]:
    """Requests from `first` on: windows of so many, sorted by length, up and down in turn so that the cache's size
    changes little."""
    order = []
    for number, begin in enumerate(range(first, len(requests), window)):
        part = range(begin, min(begin + window, len(requests)))
        order += sorted(part, key=lambda index: len(requests[index].prompts[0]), reverse=number % 2 == 1)
    return order


def arrange(requests: Sequence[Request], size: int, slots: int, suffix: int, seed: int = 0) -> Inputs:
    """Requests as inputs of `size`, prefixes padded to `slots` tokens and suffixes to `suffix`."""
    prefixes, suffixes, last, seeds = [], [], [], []
    for request in requests:
        shared = common_length(request.prompts)
        prefixes.append(request.prompts[0][:shared])
        for prompt in request.prompts:
            suffixes += [prompt[shared:-1]] * request.samples
            last += [prompt[-1]] * request.samples
            seeds += [hashed(seed, prompt.tolist(), sample) for sample in range(request.samples)]
    rows = size * len(seeds) // len(requests)
    missing = rows - len(seeds)
    last, seeds = np.array(last + [-1] * missing, np.int32), np.array(seeds + [0] * missing, np.int32)
    return Inputs(*_padded(prefixes, size, slots), *_padded(suffixes, rows, suffix), last, seeds)


def common_length(prompts: Sequence[np.ndarray]) -> int:
    """Tokens that all prompts begin with, leaving at least one to each."""
    return len(os.path.commonprefix([prompt[:-1].tolist() for prompt in prompts]))  # noqa: RUF071 - tokens, no paths


def bucket(length: int, least: int) -> int:
    """`length` rounded up to a power of two, so that few shapes are compiled."""
    return max(least, 1 << (length - 1).bit_length() if length else 0)


def _padded(texts: Sequence[np.ndarray], rows: int, length: int) -> tuple[np.ndarray, np.ndarray]:
    lengths = np.array([len(text) for text in texts] + [0] * (rows - len(texts)), np.int32)
    out = np.zeros((rows, length), np.int32)
    for row, text in zip(out, texts, strict=False):
        row[: len(text)] = text
    return out, lengths


def empty(model: CausalLM, rows: Rows, new: int, slots: int) -> State:
    """No row at work."""
    B = math.prod(rows)
    return State(
        cache=empty_cache(model, B, slots),
        positions=jnp.full((B, slots), -1),
        next_token=jnp.zeros(B, jnp.int32),
        seeds=jnp.zeros(B, jnp.int32),
        tokens=jnp.zeros((B, new), jnp.int32),
        drawn=jnp.zeros(B, jnp.int32),
        ended=jnp.ones(B, bool),
        count=jnp.int32(0),
    )


def fit(state: State, slots: int) -> State:
    """Slots of prefixes added or left out at the end."""
    room = max(0, slots - state.positions.shape[1])

    def fitted(x: Array) -> Array:
        return placed(jnp.pad(x[:, :, :slots], ((0, 0), (0, 0), (0, room), (0, 0))))

    positions = jnp.pad(state.positions[:, :slots], ((0, 0), (0, room)), constant_values=-1)
    return state._replace(cache=jax.tree.map(fitted, state.cache), positions=positions)


def fill(model: CausalLM, rows: Rows, params: dict, state: State, inputs: Inputs, place: Int[Array, ""]) -> State:
    """Requests into a place of each way: their prefixes go through the model, then the suffixes of their rows."""
    W, P = inputs.prefix.shape
    M, Q, n = state.tokens.shape[1], inputs.suffix.shape[1], rows.n

    def chunk(number: Int[Array, ""], cache: tuple[Cache, ...]) -> tuple[Cache, ...]:
        begin = number * _CHUNK
        tokens = jax.lax.dynamic_slice_in_dim(inputs.prefix, begin, _CHUNK, axis=1)
        positions = jnp.broadcast_to(begin + jnp.arange(_CHUNK), tokens.shape)
        cached = jnp.broadcast_to(jnp.arange(P), (W, P))
        return write(cache, extend(model, params, cache, cached, tokens, positions)[1], begin)

    chunks = -(-inputs.prefix_lengths.max() // _CHUNK)
    cache = jax.lax.fori_loop(0, chunks, chunk, empty_cache(model, W, P))
    lengths = jnp.repeat(inputs.prefix_lengths, n)[:, None]
    positions = jnp.where(jnp.arange(P) < lengths, jnp.arange(P), -1)
    positions = jnp.pad(positions, ((0, 0), (Q, 0)), constant_values=-1)
    cache = jax.tree.map(lambda x: jnp.pad(jnp.repeat(x, n, axis=0), ((0, 0), (0, 0), (Q, 0), (0, 0))), cache)
    cache = jax.tree.map(placed, cache)  # each row of a request has its own
    if Q:
        own = lengths + jnp.arange(Q)
        positions = positions.at[:, :Q].set(jnp.where(jnp.arange(Q) < inputs.suffix_lengths[:, None], own, -1))
        cache = write(cache, extend(model, params, cache, positions, inputs.suffix, own)[1], 0)

    def put(whole: Array, part: Array, slot: int = 0) -> Array:
        into = whole.reshape(*rows, *whole.shape[1:])
        part = part.reshape(W, 1, n, *part.shape[1:])
        start = (0, place, 0, 0, slot, 0) if slot else (0, place, *[0] * (part.ndim - 2))
        return jax.lax.dynamic_update_slice(into, part, start).reshape(whole.shape)

    none = jnp.zeros(W * n, jnp.int32)
    return State(
        cache=jax.tree.map(lambda whole, part: placed(put(whole, part, M)), state.cache, cache),
        positions=put(state.positions, jnp.pad(positions, ((0, 0), (M, 0)), constant_values=-1)),
        next_token=put(state.next_token, jnp.maximum(inputs.last, 0)),
        seeds=put(state.seeds, inputs.seeds),
        tokens=put(state.tokens, jnp.zeros((W * n, M), jnp.int32)),
        drawn=put(state.drawn, none),
        ended=put(state.ended, inputs.last < 0),
        count=state.count,
    )


def extend(
    model: CausalLM, params: dict, cache: tuple[Cache, ...], cached: Int[Array, "B S"], tokens: Int[Array, "B T"],
    positions: Int[Array, "B T"],
) -> tuple[Float[Array, "B T D"], tuple[Cache, ...]]:  # fmt: skip
    """States, keys and values of tokens that go on after those of the cache whose positions (`cached`) are before."""
    B, T = tokens.shape
    seen = (cached >= 0) & (cached < positions[:, :1])
    own = jnp.broadcast_to(jnp.tril(jnp.ones((T, T), bool)), (B, T, T))
    mask = jnp.concatenate([jnp.broadcast_to(seen[:, None], (B, T, seen.shape[1])), own], axis=-1)
    if model.config.window:
        mask &= positions[:, :, None] - jnp.concatenate([cached, positions], axis=1)[:, None] < model.config.window
    tokens, cache = constrain(tokens, "batch", None), _swapped(cache)
    states, new = model.apply({"params": params}, tokens, positions, cache, mask, method="extend")
    return states, _swapped(new)


def advance(
    model: CausalLM, stops: Stops, sampling: Sampling, rows: Rows, params: dict, state: State, steps: int, enough: int
) -> State:
    """Draws so many tokens in each row that is not done, or until `enough` places have no row at work."""
    M, end = state.tokens.shape[1], state.count + steps

    def step(state: State) -> State:
        slot, position = state.count % M, jnp.max(state.positions, axis=1, keepdims=True) + 1
        states, new = extend(model, params, state.cache, state.positions, state.next_token[:, None], position)
        logits = model.apply({"params": params}, states[:, 0], method="head")
        token = draw(logits, jax.vmap(jax.random.key)(state.seeds), state.drawn, sampling)
        # Known when all of the cache is read: otherwise XLA copies it, to write while it is read. No token is below 0.
        slot += jnp.minimum(jnp.min(token), 0)
        positions = jax.lax.dynamic_update_slice_in_dim(state.positions, position, slot, axis=1)
        here = (jnp.arange(M) == state.drawn[:, None]) & ~state.done[:, None]
        tokens = constrain(jnp.where(here, token[:, None], state.tokens), None, None)  # every process reads these
        drawn = constrain(jnp.where(state.done, state.drawn, state.drawn + 1), None)
        ended = constrain(jnp.where(state.done, state.ended, stops.ended(tokens, state.drawn)), None)
        return State(
            write(state.cache, new, slot), positions, token, state.seeds, tokens, drawn, ended, state.count + 1
        )

    def goes_on(state: State) -> Bool[Array, ""]:
        free = state.done.reshape(rows).all((0, 2)).sum()
        return (state.count < end) & (free < enough)

    return jax.lax.while_loop(goes_on, step, state)


def empty_cache(model: CausalLM, rows: int, slots: int) -> tuple[Cache, ...]:
    """Keys and values [B K S H] of each layer. So XLA multiplies on a CPU without turning them around first."""
    c, shape = model.config, (rows, model.config.num_kv_heads, slots, model.config.head_dim)
    return tuple(Cache(*(placed(jnp.zeros(shape, model.compute.dtype)) for _ in "kv")) for _ in range(c.num_layers))


def write(cache: tuple[Cache, ...], new: tuple[Cache, ...], slot: int | Int[Array, ""]) -> tuple[Cache, ...]:
    """The cache with these keys and values from that slot on."""
    return jax.tree.map(lambda x, y: jax.lax.dynamic_update_slice_in_dim(x, y, slot, axis=2), cache, new)


def placed(x: Array) -> Array:
    """A part of the cache on the mesh: rows on (data, fsdp), key-value heads on tensor."""
    return constrain(x, "batch", "kv_heads", None, None)


def _swapped(cache: tuple[Cache, ...]) -> tuple[Cache, ...]:
    """[B K S H] as [B S K H], and back."""
    return jax.tree.map(lambda x: jnp.swapaxes(x, 1, 2), cache)
