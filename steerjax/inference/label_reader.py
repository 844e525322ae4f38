"""Expected ratings from a language model that writes label lines behind responses (`objectives/attribute_lm.py`).

The texts go through the model once, in packed rows. Then all walk the label line together, as its names are the same:
at each attribute the labels' probabilities are read, given the likeliest labels of those before, and the likeliest
is written. A text's label tokens see that text alone, so what texts share is still computed once.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from steerjax.bundle import Bundle
from steerjax.chat.render import Renderer
from steerjax.data.batch import Batch
from steerjax.data.conversation import Conversation
from steerjax.data.packing import Layout, Row
from steerjax.data.trees import Example
from steerjax.errors import ModelError
from steerjax.inference.engine import bucket
from steerjax.models.attention import Cache, Window
from steerjax.models.attention.mask import allowed
from steerjax.models.llama import CausalLM
from steerjax.schema import Schema

_NAME = "rating"
_FEWEST = 8  # places for texts in a row; then powers of two, so that few shapes are compiled


@dataclass(frozen=True, eq=False)
class LabelQuestion:
    """One attribute of a label line: C labels that are told apart by paths of P tokens through a trie.

    Node 0 is the trie's root, where the tokens before the value end; only the J inner nodes are tokens to be seen.
    """

    before: np.ndarray  # int32 [U], what stands before the value
    labels: np.ndarray  # float32 [C], ascending
    written: np.ndarray  # int32 [C M], each label's tokens, the last at the end
    lengths: np.ndarray  # int32 [C], how many they are
    nodes: np.ndarray  # int32 [J], tokens of the inner nodes
    depths: np.ndarray  # int32 [J], from 1
    sees: np.ndarray  # bool [J J], itself and its ancestors
    at: np.ndarray  # int32 [C P], the node that a token of a path follows
    token: np.ndarray  # int32 [C P], -1 behind the end of a path


def make_question(before: Sequence[int], values: Mapping[int, Sequence[int]], after: Sequence[int]) -> LabelQuestion:
    """`values` are each label's tokens, `after` the first of what follows any of them.

    A path has as many of a value's tokens, and then of `after`, as no other begins with. Raises ValueError: two labels
    are the same tokens.
    """
    texts = {label: (*tokens, *after[:1]) for label, tokens in values.items()}
    paths = []
    for label, text in texts.items():
        shared = (len(os.path.commonprefix([text, x])) for other, x in texts.items() if other != label)  # noqa: RUF071
        longest = max(shared, default=0)
        if longest >= len(text):
            raise ValueError(label)
        paths.append(text[: longest + 1])
    inner = sorted({path[:depth] for path in paths for depth in range(1, len(path))}, key=lambda x: (len(x), x))
    places = {(): 0} | {node: 1 + place for place, node in enumerate(inner)}
    P, M = max(map(len, paths)), max(map(len, values.values()))
    at, token = np.zeros((len(paths), P), np.int32), np.full((len(paths), P), -1, np.int32)
    written = np.zeros((len(paths), M), np.int32)
    for row, (path, own) in enumerate(zip(paths, values.values(), strict=True)):
        at[row, : len(path)] = [places[path[:depth]] for depth in range(len(path))]
        token[row, : len(path)] = path
        written[row, M - len(own) :] = own
    return LabelQuestion(
        before=np.array(before, np.int32),
        labels=np.array(list(values), np.float32),
        written=written,
        lengths=np.array([len(own) for own in values.values()], np.int32),
        nodes=np.array([node[-1] for node in inner], np.int32),
        depths=np.array([len(node) for node in inner], np.int32),
        sees=np.array([[x == y[: len(x)] for x in inner] for y in inner], bool).reshape(len(inner), len(inner)),
        at=at,
        token=token,
    )


class LabelReader:
    """What `Scorer` asks of a language model. Raises ModelError: the tokenizer writes two labels alike."""

    def __init__(self, bundle: Bundle, renderer: Renderer, schema: Schema):
        self._renderer = renderer
        parts, end = renderer.rating_parts(schema.names)
        following = [*(part.before for part in parts[1:]), end]
        self.questions = []
        for name, part, after in zip(schema.names, parts, following, strict=True):
            try:
                self.questions.append(make_question(part.before, part.values, after))
            except ValueError as alike:
                said = f"'{bundle.description.path}': its tokenizer writes label {alike} of {name} as another one"
                raise ModelError(f"{said}\n  cure: train with another config.chat.labels") from None
        # Positions of a label line: the model must be able to tell these apart too.
        self.room = sum(len(q.before) + q.written.shape[1] for q in self.questions)
        self.function = partial(_rate, bundle.module, self.questions)

    def example(self, number: int, conversation: Conversation, turn: int) -> Example:
        """The text up to its label line. Its last token is the target of the one before: with it the walk begins."""
        tokens, root, _ = self._renderer.rating_tokens(conversation, turn, {})
        place, one = np.array([len(tokens) - 2], np.int32), np.ones(1, np.float32)
        return Example(_NAME, number, tokens[:-1], min(root, len(tokens) - 1), place, tokens[-1:], one)

    def arrays(self, rows: Mapping[int, Sequence[Row]]) -> dict:
        """Where each text of a row ends, and its last token."""
        most = max((sum(len(part.examples) for part in row) for packed in rows.values() for row in packed), default=0)
        return {_NAME: partial(_asked, size=bucket(most, _FEWEST))}

    def read(self, layout: Layout, output: np.ndarray):
        """Each text's number, and its expected ratings [A]."""
        return zip((example.number for example, _ in layout.ends), output, strict=False)


def _asked(layout: Layout, size: int) -> dict[str, np.ndarray]:
    """`ends` int32 [E], -1 where there is no text, and `last` int32 [E]."""
    asked = np.full((2, size), -1, np.int32)
    for place, (example, end) in enumerate(layout.ends):
        asked[:, place] = end, example.targets[0]
    return {"ends": asked[0], "last": np.maximum(asked[1], 0)}


class _Walked(NamedTuple):
    """W tokens of label lines that were fed so far, and how far each text is."""

    cache: Cache  # [L B T+W K H], those of the rows' tokens first
    owner: np.ndarray  # int [W], the text of a token
    seen: Bool[Array, "B W"]  # False: fills up
    places: Int[Array, "B W"]  # positions
    next: Int[Array, "B E"]  # position of the next token


def _rate(model: CausalLM, questions: Sequence[LabelQuestion], params: dict, batch: Batch) -> Float[Array, "B E A"]:
    """Expected ratings of the texts of packed rows."""
    tokens, positions, until = batch[:3]
    c, (B, T) = model.config, tokens.shape
    ends, last = batch.targets[_NAME]["ends"], batch.targets[_NAME]["last"]
    window = Window(positions, positions + c.window) if c.window else None
    nothing = jnp.zeros((c.num_layers, B, 0, c.num_kv_heads, c.head_dim), model.compute.dtype)
    run = partial(model.apply, {"params": params})
    _, cache = run(tokens, positions, Cache(nothing, nothing), allowed(until, window=window), method="extend")
    of_rows = (jnp.arange(T) <= ends[..., None]) & (ends[..., None] < until[:, None])  # [B E T]
    begin = jnp.take_along_axis(positions, ends, axis=1) + 1
    none = jnp.zeros((B, 0), bool)
    walked = _Walked(cache, np.zeros(0, int), none, none.astype(jnp.int32), begin)
    fed, lengths, found = last[..., None], jnp.ones_like(last), []
    for question in questions:
        states, walked = _feed(model, run, question, walked, fed, lengths, of_rows, positions)
        likelihoods = jax.nn.log_softmax(run(states, method="head"), axis=-1)  # [B E nodes V]
        each = likelihoods[:, :, question.at, np.maximum(question.token, 0)]
        chances = jax.nn.softmax(jnp.where(question.token < 0, 0, each).sum(-1), axis=-1)
        found.append(jnp.einsum("BEC,C->BE", chances, question.labels, precision="highest"))
        choice = chances.argmax(-1)
        fed, lengths = jnp.asarray(question.written)[choice], jnp.asarray(question.lengths)[choice]
    return jnp.stack(found, axis=-1)


def _feed(
    model: CausalLM, run, question: LabelQuestion, walked: _Walked, fed: Int[Array, "B E M"],
    lengths: Int[Array, "B E"], of_rows: Bool[Array, "B E T"], positions: Int[Array, "B T"],
) -> tuple[Float[Array, "B E nodes D"], _Walked]:  # fmt: skip
    """States of the question's nodes, after the last label's tokens (the last `lengths` of `fed`) went through the
    model, then those before the value, then the inner nodes, which are not kept."""
    (B, E, M), U, J = fed.shape, len(question.before), len(question.nodes)
    S = M + U + J
    own = np.broadcast_to(np.concatenate([question.before, question.nodes]), (B, E, U + J))
    tokens = jnp.concatenate([fed, own], axis=-1)
    steps = np.concatenate([np.arange(-M, 0), np.arange(U), U - 1 + question.depths])
    places = jnp.maximum((walked.next + lengths)[..., None] + steps, 0)
    valid = jnp.broadcast_to(steps >= -lengths[..., None], (B, E, S))
    sees = np.tril(np.ones((S, S), bool))
    sees[M + U :, M + U :] = question.sees
    texts = np.eye(E, dtype=bool)[:, None, :, None]  # label tokens see those of their own text alone
    among = texts & sees[:, None] & (valid[:, None, None] | np.eye(E * S, dtype=bool).reshape(E, S, E, S))
    before = (walked.owner == np.arange(E)[:, None]) & walked.seen[:, None]  # [B E W]
    past = jnp.repeat(jnp.concatenate([of_rows, before], axis=-1)[:, :, None], S, axis=2)
    mask = jnp.concatenate([past, among.reshape(B, E, S, E * S)], axis=-1).reshape(B, E * S, -1)
    flat = places.reshape(B, E * S)
    if model.config.window:
        keys = jnp.concatenate([positions, walked.places, flat], axis=1)
        mask &= flat[:, :, None] - keys[:, None] < model.config.window
    states, new = run(tokens.reshape(B, E * S), flat, walked.cache, mask, method="extend")
    kept = np.arange(E * S).reshape(E, S)[:, : M + U].ravel()
    cache = jax.tree.map(lambda x, y: jnp.concatenate([x, y[:, :, kept]], axis=2), walked.cache, new)
    walked = _Walked(
        cache,
        np.concatenate([walked.owner, np.repeat(np.arange(E), M + U)]),
        jnp.concatenate([walked.seen, valid.reshape(B, E * S)[:, kept]], axis=1),
        jnp.concatenate([walked.places, flat[:, kept]], axis=1),
        walked.next + lengths + U,
    )
    return states.reshape(B, E, S, -1)[:, :, [M + U - 1, *range(M + U, S)]], walked
