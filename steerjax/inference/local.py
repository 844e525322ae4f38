"""Conversations to answers with a model of our own: what `server.py` is for a served one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from steerjax.bundle.opening import OpenModel
from steerjax.chat.render import Renderer
from steerjax.data.conversation import Conversation
from steerjax.errors import DataError, ModelError
from steerjax.inference.answers import Answer, Sampling
from steerjax.inference.engine import Engine, Request
from steerjax.inference.steering import Setting, label_of
from steerjax.schema import Schema

_WINDOW = 4  # batches whose rows are sorted by length


@dataclass(frozen=True)
class Local:
    """An engine with the renderer of its model."""

    engine: Engine
    renderer: Renderer
    opened: OpenModel
    labels: bool

    def prepare(self, conversation: Conversation, settings: Sequence[Setting], samples: int, schema: Schema) -> Request:
        """The conversation's tokens in each setting; earlier answers with the ratings that they have.

        Raises:
            DataError: what the renderer refuses, or no room for the answer.
        """
        history = [(turn.ratings or turn.predicted_ratings) if self.labels else None for turn in conversation.turns]
        prompts = []
        for setting in settings:
            label = label_of(setting, self.opened.description.default_ratings)
            rendered = self.renderer.render(
                conversation, history, generation_prompt=True, generation_label=label or None
            )
            prompts.append(rendered.tokens)
        longest, room = max(map(len, prompts)), self.opened.model.config.max_position_embeddings
        if longest + self.engine.sampling.max_new_tokens > room:
            raise DataError(
                f"{longest} tokens and {self.engine.sampling.max_new_tokens} new ones are more than the model's {room}",
                file=conversation.file, line=conversation.line, cure="shorten it, or use a lower --max-new-tokens",
            )  # fmt: skip
        return Request(tuple(prompts), samples)

    def run(self, requests: Sequence[Request], done: int) -> Iterator[tuple[int, list[list[Answer]]]]:
        """(index, answers [setting][sample]) of the requests from `done` on.

        Batches are cut from all requests, whatever is done, so that an interrupted job computes the batches of an
        uninterrupted one.
        """
        size = self.engine.requests_per_batch(len(requests[0].prompts) * requests[0].samples) if requests else 1
        for begin in range(0, len(requests), _WINDOW * size):
            window = range(begin, min(begin + _WINDOW * size, len(requests)))
            order = sorted(window, key=lambda i: len(requests[i].prompts[0]))
            for batch in (order[at : at + size] for at in range(0, len(order), size)):
                if max(batch) >= done:
                    yield from zip(batch, self.engine.generate([requests[i] for i in batch]), strict=True)

    def stream(self, request: Request) -> Iterator[str | Answer]:
        """See `Engine.stream`."""
        return self.engine.stream(request.prompts[0])


def local(opened: OpenModel, schema: Schema, sampling: Sampling, *, batch_size: int, control_strings: str) -> Local:
    """A `Local` for an open model.

    Raises:
        ModelError: it is a reward model.
    """
    about = opened.description
    if about.kind != "chat":
        raise ModelError(f"'{about.path}' is a {about.kind} model, which writes no text\n  cure: give a chat model")
    engine = Engine(
        opened.model, opened.params, about.tokenizer, about.template, sampling, opened.mesh, batch_size=batch_size
    )
    renderer = Renderer(about.tokenizer, about.template, schema, about.system_prompt, control_strings)
    return Local(engine, renderer, opened, labels=about.schema is not None)
