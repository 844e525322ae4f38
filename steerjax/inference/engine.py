"""Batched decoding: prompts once through the model, then one token a row and step under one jit.

A row is one answer: a prompt in one setting of the ratings, and one sample. What the settings of a prompt have in
common is computed once, in `prefix`; what differs (from the label line on) and the prompt's last token are `suffix`.

The cache's slots: [0, P) prefix, [P, P + Q) suffix, then the new tokens; each part padded to the longest of the
batch. Padding is masked, and positions count without it.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Int

from steerjax.chat.templates import Template
from steerjax.chat.tokenizer import Tokenizer
from steerjax.inference.answers import Answer, Sampling
from steerjax.inference.sampler import draw, row_keys
from steerjax.inference.stopping import Stops
from steerjax.models.attention import Cache
from steerjax.models.llama import CausalLM
from steerjax.parallel.rules import RULES, constrain, mesh_ways

_WINDOW = 4  # batches whose requests are sorted by length


@dataclass(frozen=True, eq=False)
class Request:
    """One prompt in one or several settings.

    Attributes:
        prompts: int32 tokens of each setting, through the place where the answer begins.
        samples: answers to each.
    """

    prompts: tuple[np.ndarray, ...]
    samples: int = 1


class Inputs(NamedTuple):
    """A batch of R requests with n rows each; B = R n. Arrays of the host.

    Attributes:
        prefix, prefix_lengths: [R, P] and [R]; right padding.
        suffix, suffix_lengths: [B, Q] and [B]; at least one token.
        prompts: uint32 [B], a hash of the whole prompt, for the keys of the sampler.
        samples: [B], number of the sample.
        real: [B], false for rows that fill the batch.
    """

    prefix: Int[np.ndarray, "R P"]
    prefix_lengths: Int[np.ndarray, " R"]
    suffix: Int[np.ndarray, "B Q"]
    suffix_lengths: Int[np.ndarray, " B"]
    prompts: Int[np.ndarray, " B"]
    samples: Int[np.ndarray, " B"]
    real: Bool[np.ndarray, " B"]


class State(NamedTuple):
    """Where a batch stands.

    Attributes:
        cache: keys and values [L B S K H]; its slots: see the module's docstring.
        seen: which slots of prefix and suffix hold a token.
        lengths: tokens of each prompt.
        keys: of the sampler.
        tokens: those drawn so far; after a row's end they mean nothing.
        drawn: how many in each row, its end included.
        done: rows that have ended.
        count: steps; the greatest of `drawn`.
    """

    cache: Cache
    seen: Bool[Array, "B P+Q"]
    lengths: Int[Array, " B"]
    keys: Array
    tokens: Int[Array, "B M"]
    drawn: Int[Array, " B"]
    done: Bool[Array, " B"]
    count: Int[Array, ""]


class Engine:
    """Decodes with one model and one way of sampling.

    Args:
        model, params: the chat model; its parameters on `mesh`.
        tokenizer, template: what the model was trained with.
        mesh: None for one device.
        batch_size: rows that are decoded together, about: whole requests, as many as the mesh can share evenly.
        interval: steps between two looks of the host.

    The text of a row does not depend on the others up to the rounding of sums in float32, whose order the shapes of a
    batch may change.
    """

    def __init__(
        self, model: CausalLM, params: dict, tokenizer: Tokenizer, template: Template, sampling: Sampling,
        mesh: Mesh | None = None, batch_size: int = 8, interval: int = 64,
    ):  # fmt: skip
        # One layer a step of the scan: unrolled, XLA copies the weights out of their stack (twice as slow on a CPU).
        model = model.clone(compute=replace(model.compute, unroll=1, remat="none"))
        self.params, self.mesh, self.batch_size, self.interval = params, mesh, batch_size, interval
        self.sampling, self.stops = sampling, Stops(tokenizer, template)
        self._ways = mesh_ways(mesh, RULES["batch"]) if mesh else 1
        self._start = jax.jit(functools.partial(start, model, sampling, self.stops))
        self._advance = jax.jit(functools.partial(advance, model, sampling, self.stops), donate_argnums=1)

    def run(self, requests: Sequence[Request], done: int = 0) -> Iterator[tuple[int, list[list[Answer]]]]:
        """(index, answers [setting][sample]) of the requests from `done` on; all have as many settings and samples.

        Batches are cut from all requests, whatever is done, so that an interrupted job computes the batches of an
        uninterrupted one.
        """
        rows = len(requests[0].prompts) * requests[0].samples if requests else 1
        size = self._batch(rows)
        for begin in range(0, len(requests), _WINDOW * size):
            window = range(begin, min(begin + _WINDOW * size, len(requests)))
            order = sorted(window, key=lambda i: len(requests[i].prompts[0]))
            for batch in (order[at : at + size] for at in range(0, len(order), size)):
                if max(batch) >= done:
                    *_, drawn = self._steps([requests[i] for i in batch], size, self.interval)
                    each = (self._answer(tokens, ended) for tokens, ended in drawn)
                    for i in batch:
                        yield i, [[next(each) for _ in range(requests[i].samples)] for _ in requests[i].prompts]

    def stream(self, request: Request) -> Iterator[str | Answer]:
        """The pieces of one answer as they are drawn, then the whole `Answer`."""
        shown = ""
        for rows in self._steps([request], self._batch(1), 1):
            tokens, ended = rows[0]
            ready = shown if ended else self.stops.settled(self.stops.find(tokens))
            if ready.startswith(shown):
                yield ready[len(shown) :]
                shown = ready
        answer = self._answer(tokens, ended)
        yield answer.text[len(shown) :]
        yield answer

    def _batch(self, rows: int) -> int:
        """Requests of so many rows that are decoded together."""
        return -(-max(1, self.batch_size // rows) // self._ways) * self._ways

    def _steps(self, requests: Sequence[Request], size: int, interval: int) -> Iterator[list[tuple[np.ndarray, bool]]]:
        """(tokens, ended) of each row, after every `interval` steps."""
        inputs = arrange(requests, size)
        with jax.set_mesh(self.mesh) if self.mesh else nullcontext():
            state = self._start(self.params, inputs)
            while True:
                tokens, drawn, done, count = jax.device_get((state.tokens, state.drawn, state.done, state.count))
                yield [(row[:n], bool(d)) for row, n, d in zip(tokens, drawn, done, strict=True)]
                if done.all() or count == self.sampling.max_new_tokens:
                    return
                state = self._advance(self.params, state, min(int(count) + interval, self.sampling.max_new_tokens))

    def _answer(self, tokens: np.ndarray, ended: bool) -> Answer:
        ending = self.stops.find(tokens)
        finish = "stop" if ended or ending.stopped else "length"
        return Answer(ending.text, finish, len(tokens), tuple(tokens.tolist()))


def arrange(requests: Sequence[Request], size: int) -> Inputs:
    """Requests as a batch of `size`, lengths rounded up so that few shapes are compiled."""
    settings, samples = len(requests[0].prompts), requests[0].samples
    if any((len(r.prompts), r.samples) != (settings, samples) for r in requests):
        raise ValueError("requests of one batch need the same number of settings and samples")
    shared = [common_length(request.prompts) for request in requests]
    prefixes = [request.prompts[0][:n] for request, n in zip(requests, shared, strict=True)]
    rows = [(p, s) for request in requests for p in request.prompts for s in range(samples)]
    per_request = settings * samples
    suffixes = [prompt[shared[i // per_request] :] for i, (prompt, _) in enumerate(rows)]
    fill = size - len(requests)
    prefixes += [np.zeros(0, np.int32)] * fill
    suffixes += [np.zeros(1, np.int32)] * fill * per_request
    prompts = [int.from_bytes(hashlib.blake2b(p.astype("<i4").tobytes(), digest_size=4).digest()) for p, _ in rows]
    count = size * per_request
    return Inputs(
        *_padded(prefixes, least=32),
        *_padded(suffixes, least=1),
        prompts=np.array(prompts + [0] * (count - len(rows)), np.uint32),
        samples=np.array([s for _, s in rows] + [0] * (count - len(rows)), np.uint32),
        real=np.arange(count) < len(rows),
    )


def common_length(prompts: Sequence[np.ndarray]) -> int:
    """Tokens that all prompts begin with, leaving at least one to each."""
    shortest = min(len(prompt) for prompt in prompts)
    same = np.all([prompt[:shortest] == prompts[0][:shortest] for prompt in prompts], axis=0)
    return min(shortest - 1, int(np.argmin(same)) if not same.all() else shortest)


def bucket(length: int, least: int) -> int:
    """`length` rounded up to a power of two, or to three quarters of one."""
    power = 1 << max(0, length - 1).bit_length()
    return max(least, power * 3 // 4 if power * 3 // 4 >= length else power)


def _padded(rows: Sequence[np.ndarray], least: int) -> tuple[np.ndarray, np.ndarray]:
    lengths = np.array([len(row) for row in rows], np.int32)
    out = np.zeros((len(rows), bucket(int(lengths.max()), least)), np.int32)
    for target, row in zip(out, rows, strict=True):
        target[: len(row)] = row
    return out, lengths


def start(model: CausalLM, sampling: Sampling, stops: Stops, params: dict, inputs: Inputs) -> State:
    """Prefixes, then suffixes through the model; the first token is drawn."""
    (R, P), (B, Q), M = inputs.prefix.shape, inputs.suffix.shape, sampling.max_new_tokens
    prefix = constrain(inputs.prefix, "batch", None)
    real = jnp.arange(P) < inputs.prefix_lengths[:, None]
    causal = jnp.tril(jnp.ones((P, P), bool))
    positions = jnp.broadcast_to(jnp.arange(P), (R, P))
    empty = empty_cache(model, R)
    _, cache = extend(model, params, prefix, positions, empty, causal & real[:, None])

    # Every row of a request gets its prefix.
    n = B // R
    cache = jax.tree.map(lambda x: placed(jnp.repeat(x, n, axis=1)), cache)
    seen, before = jnp.repeat(real, n, axis=0), jnp.repeat(inputs.prefix_lengths, n)

    real = jnp.arange(Q) < inputs.suffix_lengths[:, None]
    causal = jnp.tril(jnp.ones((Q, Q), bool)) & real[:, None]
    mask = jnp.concatenate([jnp.broadcast_to(seen[:, None], (B, Q, P)), causal], axis=-1)
    suffix = constrain(inputs.suffix, "batch", None)
    states, new = extend(model, params, suffix, before[:, None] + jnp.arange(Q), cache, mask)
    states = jnp.take_along_axis(states, inputs.suffix_lengths[:, None, None] - 1, axis=1)[:, 0]
    logits = model.apply({"params": params}, states, method="head")

    def joined(old, new):  # M - 1: the last token is never fed back
        return placed(jnp.pad(jnp.concatenate([old, new], axis=2), ((0, 0), (0, 0), (0, M - 1), (0, 0), (0, 0))))

    keys = row_keys(sampling.seed, inputs.prompts, inputs.samples)
    state = State(
        cache=jax.tree.map(joined, cache, new),
        seen=jnp.concatenate([seen, real], axis=1),
        lengths=before + inputs.suffix_lengths,
        keys=keys,
        tokens=jnp.zeros((B, M), jnp.int32),
        drawn=jnp.zeros(B, jnp.int32),
        done=~jnp.asarray(inputs.real),
        count=jnp.int32(0),
    )
    return add_token(state, draw(logits, keys, state.count, sampling), stops)


def advance(model: CausalLM, sampling: Sampling, stops: Stops, params: dict, state: State, until: int) -> State:
    """Draws tokens until there are `until`, or all rows have ended."""
    B, S = state.tokens.shape[0], state.cache.keys.shape[2]
    prompt = state.seen.shape[1]  # slots

    def step(state: State) -> State:
        fed = state.count - 1
        written = jnp.broadcast_to(jnp.arange(S - prompt) < fed, (B, S - prompt))
        mask = jnp.concatenate([state.seen, written, jnp.ones((B, 1), bool)], axis=1)
        token = jax.lax.dynamic_slice_in_dim(state.tokens, fed, 1, axis=1)
        positions = (state.lengths + fed)[:, None]
        states, new = extend(model, params, token, positions, state.cache, mask[:, None])
        logits = model.apply({"params": params}, states[:, 0], method="head")
        write = functools.partial(jax.lax.dynamic_update_slice_in_dim, start_index=prompt + fed, axis=2)
        state = state._replace(cache=jax.tree.map(write, state.cache, new))
        return add_token(state, draw(logits, state.keys, state.count, sampling), stops)

    return jax.lax.while_loop(lambda state: (state.count < until) & ~state.done.all(), step, state)


def add_token(state: State, token: Int[Array, " B"], stops: Stops) -> State:
    """Writes a drawn token, and sees whether it ends its row."""
    tokens = jax.lax.dynamic_update_slice_in_dim(state.tokens, token[:, None], state.count, axis=1)
    tokens = constrain(tokens, None, None)  # every process reads it
    drawn = jnp.where(state.done, state.drawn, state.count + 1)
    done = state.done | stops.ended(tokens, state.count)
    return state._replace(
        tokens=tokens, drawn=constrain(drawn, None), done=constrain(done, None), count=state.count + 1
    )


def extend(model: CausalLM, params: dict, tokens, positions, cache: Cache, mask) -> tuple[Array, Cache]:
    return model.apply({"params": params}, tokens, positions, cache, mask, method="extend")


def empty_cache(model: CausalLM, rows: int) -> Cache:
    """Of no slots: keys and values [L B 0 K H]."""
    c = model.config
    none = jnp.zeros((c.num_layers, rows, 0, c.num_kv_heads, c.head_dim), model.compute.dtype)
    return Cache(none, none)


def placed(x: Array) -> Array:
    """A part of the cache on the mesh: rows on (data, fsdp), key-value heads on tensor."""
    return constrain(x, None, "batch", None, "kv_heads", None)
