"""The same answers from an OpenAI-compatible server (vLLM, SGLang) that serves an exported chat model.

Ratings go to the chat template as `chat_template_kwargs`: `attributes`, and those of earlier turns, one entry a
message, as `message_attributes` (vLLM 0.32 drops what it does not know of a message). Texts are sent as they are.
"""

import copy
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, Self

from steerjax.chat.templates import Template
from steerjax.data.conversation import Conversation, Turn
from steerjax.errors import ConfigError, ModelError
from steerjax.inference.steering import Answer, Sampling, Setting, end_space, hashed
from steerjax.schema import Schema, round_rating


class RefusedRequest(ModelError):
    """The server is up and does not take this request."""


class Server:
    """Answers over HTTP; methods as those of `engine.Engine`. A request is a list of bodies, one for each setting.

    Args:
        url: `http://host:8000` or `.../v1`. The key in OPENAI_API_KEY is sent, if there is one.
        model: the served name; None takes the only model that it serves.
        template: of the served model; None, not known: the white space around an answer is then removed.
        workers: requests at a time. attempts: tries of one request, with growing pauses. timeout: seconds of a try.

    Raises ModelError: no server there, or it serves several models; later, an odd answer or, as RefusedRequest, what
    the server does not take.
    """

    def __init__(
        self, url: str, model: str | None, schema: Schema, sampling: Sampling = Sampling(), *,  # noqa: B008
        template: Template | None = None, workers: int = 16, attempts: int = 8, timeout: float = 600,
    ):  # fmt: skip
        import openai

        self.url = url.rstrip("/").removesuffix("/v1") + "/v1"
        self._schema, self._sampling, self._template, self._workers = schema, sampling, template, workers
        key = os.environ.get("OPENAI_API_KEY", "").strip() or "none"
        if not (key.isascii() and key.isprintable()):
            raise ConfigError("OPENAI_API_KEY holds characters that a header cannot carry\n  cure: set it again")
        if not url.startswith(("http://", "https://")):
            raise ConfigError(f"'{url}' is no address of a server; cure: http://HOST:PORT")
        with self._reported():
            waits = openai.Timeout(timeout, connect=min(timeout, 5.0))
            options = {"max_retries": attempts - 1, "timeout": waits, "_strict_response_validation": True}
            client = openai.OpenAI(base_url=self.url, api_key=key, **options)
            self._create = client.chat.completions.create
            names = [model] if model else [served.id for served in client.models.list()]
        if len(names) != 1:
            raise ModelError(f"{self.url} serves {', '.join(names) or 'no model'}; cure: name one with --server-model")
        self.model = names[0]

    def drawing(self, sampling: Sampling, batch_size: int) -> Self:
        """The same server, asked to draw so, `batch_size` requests at a time."""
        other = copy.copy(self)
        other._sampling, other._workers = sampling, batch_size
        return other

    def prepare(self, conversation: Conversation, settings: Sequence[Setting], samples: int) -> list[dict[str, Any]]:
        turns, s = conversation.turns, self._sampling
        if conversation.system is not None:
            turns = (Turn("system", conversation.system), *turns)
        messages = [{"role": turn.role, "content": turn.content} for turn in turns]
        rated = [(turn.ratings or turn.predicted_ratings or {}).items() for turn in turns]
        ratings = [{name: round_rating(r, self._schema[name]) for name, r in each} or None for each in rated]
        body = {
            "model": self.model, "messages": messages, "n": samples,
            "max_tokens": s.max_new_tokens, "temperature": s.temperature, "top_p": s.top_p,
        }  # fmt: skip
        body |= {"stop": sorted(self._template.control_strings)} if self._template else {}
        bodies = []
        for setting in settings:
            asked = {"attributes": dict(setting), "message_attributes": ratings if any(ratings) else None}
            ours = {"top_k": s.top_k, "chat_template_kwargs": _given(asked)}  # OpenAI itself has neither
            seed = hashed(s.seed, messages, ratings, sorted(setting.items()))
            bodies.append(body | {"seed": seed, "extra_body": _given(ours)})
        return bodies

    def run(self, requests: Sequence[list[dict]], done: int = 0) -> Iterator[list[Answer]]:
        with ThreadPoolExecutor(self._workers) as pool:
            try:
                yield from pool.map(self.answers, requests[done:])
            finally:
                pool.shutdown(wait=False, cancel_futures=True)

    def stream(self, request: list[dict]) -> Iterator[str | Answer]:
        text, shown, finish, tokens = "", "", None, None
        with self._reported():
            for event in self._create(**request[0], stream=True, stream_options={"include_usage": True}):
                tokens = event.usage.completion_tokens if event.usage else tokens
                for choice in event.choices:
                    text += choice.delta.content or ""
                    finish = choice.finish_reason or finish
                    ready = self._response(text, "length").rstrip()
                    yield ready[len(shown) :]
                    shown = ready
            if finish is None:
                raise ValueError("the stream ends before the answer does")
        text = self._response(text, finish)
        yield text[len(shown) :]
        yield Answer(text, finish, tokens)

    def answers(self, request: list[dict]) -> list[Answer]:
        """To one request; may be called from several threads."""
        answers = []
        for body in request:
            with self._reported():
                reply = self._create(**body)
                if len(reply.choices) != body["n"]:
                    raise ValueError(f"{len(reply.choices)} answers instead of {body['n']}")
            tokens = reply.usage.completion_tokens if reply.usage and body["n"] == 1 else None
            for choice in sorted(reply.choices, key=lambda choice: choice.index):
                text = self._response(choice.message.content or "", choice.finish_reason)
                answers.append(Answer(text, choice.finish_reason, tokens))
        return answers

    def _response(self, text: str, finish: str) -> str:
        """What the server wrote, as `stopping.Stops` leaves it."""
        if self._template is None:
            return text.strip()
        return self._template.answer(text.removesuffix(end_space(self._template)) if finish == "stop" else text)

    @contextmanager
    def _reported(self) -> Iterator[None]:
        """What the client raises (its own errors, httpx's, json's), as a ModelError."""
        try:
            yield
        except Exception as error:
            about = f"{error} {error.__cause__ or ''}".strip()[:1000]
            kind, cure = ModelError, "check that an OpenAI-compatible server is up there, and its log"
            if getattr(error, "status_code", 0) in (400, 413, 422):  # it is up, and says what it does not take
                kind, cure = RefusedRequest, "ask for what the server says that it takes"
            raise kind(f"{self.url}: {about}\n  cure: {cure}") from None


def _given(values: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if value}
