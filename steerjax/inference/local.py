"""Conversations to answers with a model of our own: what `server.py` is for a served one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from steerjax.bundle import Bundle
from steerjax.data.conversation import Conversation
from steerjax.errors import DataError, ModelError
from steerjax.inference.answers import Answer, Sampling
from steerjax.inference.engine import Engine, Request
from steerjax.inference.steering import Setting, label_of
from steerjax.schema import Schema


class Local:
    """An engine with the renderer of its model.

    Args:
        bundle: a chat model.
        schema: of the label lines; the model's, where it has one.

    Raises:
        ModelError: it is a reward model.
    """

    def __init__(self, bundle: Bundle, schema: Schema, sampling: Sampling, *, batch_size: int):
        self.description = about = bundle.description
        if about.kind != "chat":
            raise ModelError(f"'{about.path}' is a {about.kind} model, which writes no text\n  cure: give a chat model")
        self.model = str(about.path)
        self._renderer = bundle.renderer(schema)
        self._engine = Engine(
            bundle.module, bundle.params, about.tokenizer, about.template, sampling, bundle.mesh, batch_size=batch_size
        )

    def prepare(self, conversation: Conversation, settings: Sequence[Setting], samples: int, schema: Schema) -> Request:
        """The conversation's tokens in each setting; earlier answers with the ratings that they have.

        Raises:
            DataError: what the renderer refuses, or no room for the answer.
        """
        about, new = self.description, self._engine.sampling.max_new_tokens
        history = [(turn.ratings or turn.predicted_ratings) if about.schema else None for turn in conversation.turns]
        prompts = []
        for setting in settings:
            label = label_of(setting, about.default_ratings) or None
            rendered = self._renderer.render(conversation, history, generation_prompt=True, generation_label=label)
            prompts.append(rendered.tokens)
        longest, room = max(map(len, prompts)), about.model.max_position_embeddings
        if longest + new > room:
            raise DataError(
                f"{longest} tokens and {new} new ones are more than the model's {room}",
                file=conversation.file, line=conversation.line, cure="shorten it, or use a lower --max-new-tokens",
            )  # fmt: skip
        return Request(tuple(prompts), samples)

    def run(self, requests: Sequence[Request], done: int) -> Iterator[tuple[int, list[list[Answer]]]]:
        """See `Engine.run`."""
        return self._engine.run(requests, done)

    def stream(self, request: Request) -> Iterator[str | Answer]:
        """See `Engine.stream`."""
        return self._engine.stream(request)
