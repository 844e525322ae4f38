"""The same answers from an OpenAI-compatible server (vLLM, SGLang) that serves an exported chat model.

Ratings go to the chat template as `chat_template_kwargs`: `attributes`, and those of earlier turns, if any have some,
as `message_attributes`, one entry a message. (vLLM 0.32 drops what it does not know of a message.) Texts are sent as
they are: the exported template breaks the control strings in them.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from steerjax.chat.templates import Template
from steerjax.data.conversation import Conversation
from steerjax.errors import ConfigError, ModelError
from steerjax.inference.answers import Answer, Sampling
from steerjax.inference.steering import Setting
from steerjax.schema import Schema, round_rating

Reply = TypeVar("Reply", bound=BaseModel)

_AGAIN = (408, 409, 425, 429, 500, 502, 503, 504)  # statuses that may pass
_CURE = "name an OpenAI-compatible server, http://HOST:PORT"


# What we read of a server's replies; pydantic ignores other keys.


class _Text(BaseModel):
    content: str | None = None


class _Choice(BaseModel):
    index: int = 0
    message: _Text | None = None
    delta: _Text | None = None  # in place of `message`, in a stream
    finish_reason: str | None = None


class _Usage(BaseModel):
    completion_tokens: int | None = None


class _Completion(BaseModel):
    choices: list[_Choice]
    usage: _Usage | None = None


class _Served(BaseModel):
    id: str


class _Models(BaseModel):
    data: list[_Served]


class Server:
    """Answers over HTTP. A request is a list of the bodies that are sent, one for each setting.

    Args:
        url: `http://host:8000` or `.../v1`. A key in OPENAI_API_KEY is sent as a bearer token.
        model: the served name; None takes the only model that it serves.
        sampling: see there; `top_k` is sent only if it is set (OpenAI itself has none).
        template: of the served model; None, not known: the white space around an answer is then removed.
        workers: requests at a time.
        timeout: seconds of silence after which a request is tried again.
        attempts: tries of one request, with growing pauses.

    Raises:
        ModelError: no server there, or it serves several models.
    """

    def __init__(
        self, url: str, model: str | None, sampling: Sampling, *, template: Template | None = None,
        workers: int = 16, timeout: float = 600.0, attempts: int = 6,
    ):  # fmt: skip
        import httpx

        self.url = url.rstrip("/").removesuffix("/v1") + "/v1"
        self._sampling, self._template, self._workers, self._attempts = sampling, template, workers, attempts
        self._client = httpx.Client(timeout=timeout, limits=httpx.Limits(max_connections=workers))
        self.model = model or self._only_model()

    def prepare(
        self, conversation: Conversation, settings: Sequence[Setting], samples: int, schema: Schema
    ) -> list[dict[str, Any]]:
        """The conversation as bodies, one for each setting."""
        messages: list[dict] = [{"role": turn.role, "content": turn.content} for turn in conversation.turns]
        ratings = [
            {name: round_rating(r, schema[name]) for name, r in (turn.ratings or turn.predicted_ratings or {}).items()}
            or None
            for turn in conversation.turns
        ]
        if conversation.system is not None:
            messages.insert(0, {"role": "system", "content": conversation.system})
            ratings.insert(0, None)
        s = self._sampling
        body: dict[str, Any] = {
            "model": self.model, "messages": messages, "n": samples,
            "max_tokens": s.max_new_tokens, "temperature": s.temperature, "top_p": s.top_p,
        }  # fmt: skip
        if self._template:
            body["stop"] = sorted(self._template.control_strings)
        if s.top_k:
            body["top_k"] = s.top_k
        earlier = {"message_attributes": ratings} if any(ratings) else {}
        bodies = []
        for setting in settings:
            asked = ({"attributes": dict(setting)} if setting else {}) | earlier
            # As with our own decoder: one seed, and still other draws for other prompts and settings.
            text = json.dumps([s.seed, messages, ratings, sorted(setting.items())])
            seed = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=4).digest()) >> 1
            bodies.append(body | {"seed": seed} | ({"chat_template_kwargs": asked} if asked else {}))
        return bodies

    def run(self, requests: Sequence[list[dict]], done: int) -> Iterator[tuple[int, list[list[Answer]]]]:
        """(index, answers [setting][sample]) of the requests from `done` on, as they come.

        Raises:
            ModelError: the server cannot be reached, refuses a request, or its answer is no completion.
        """
        with ThreadPoolExecutor(self._workers) as pool:
            waiting = {pool.submit(self._answers, requests[i]): i for i in range(done, len(requests))}
            try:
                for future in as_completed(waiting):
                    yield waiting[future], future.result()
            finally:
                pool.shutdown(wait=False, cancel_futures=True)

    def stream(self, request: list[dict]) -> Iterator[str | Answer]:
        """The pieces of one answer as they come, then the whole `Answer`.

        Raises:
            ModelError: as `run`.
        """
        text, shown, finish, tokens = "", "", None, None
        for event in self._events(request[0] | {"stream": True, "stream_options": {"include_usage": True}}):
            tokens = event.usage.completion_tokens if event.usage else tokens
            for choice in event.choices:
                written = choice.delta or choice.message
                text += (written.content if written else None) or ""
                finish = choice.finish_reason or finish
                ready = self._response(text, "length").rstrip()
                yield ready[len(shown) :]
                shown = ready
        if finish is None:
            raise self._error("the stream ends before the answer does")
        text = self._response(text, finish)
        yield text[len(shown) :]
        yield Answer(text, finish, tokens)

    def _answers(self, request: list[dict]) -> list[list[Answer]]:
        return [self._ask(body) for body in request]

    def _ask(self, body: dict[str, Any]) -> list[Answer]:
        reply = self._parsed(_Completion, self._send("POST", "/chat/completions", body).content)
        choices = sorted(reply.choices, key=lambda choice: choice.index)
        if len(choices) != body["n"]:
            raise self._error(f"{len(choices)} answers instead of {body['n']}", "--samples 1")
        if any(choice.message is None or choice.finish_reason is None for choice in choices):
            raise self._error("an answer without message or finish_reason")
        tokens = reply.usage.completion_tokens if reply.usage and len(choices) == 1 else None
        each = [(choice.message.content or "", choice.finish_reason) for choice in choices]
        return [Answer(self._response(text, finish), finish, tokens) for text, finish in each]

    def _response(self, text: str, finish: str) -> str:
        """What the server wrote, as `stopping.Stops` leaves it."""
        if self._template is None or self._template.strip:
            return text.strip()
        end = self._template.end  # may begin with white space, which is no end yet to a server
        return text.removesuffix(end[: len(end) - len(end.lstrip())]) if finish == "stop" else text

    def _only_model(self) -> str:
        names = [served.id for served in self._parsed(_Models, self._send("GET", "/models").content).data]
        if len(names) != 1:
            raise self._error(f"serves {', '.join(names) or 'no model'}", "name one with --server-model")
        return names[0]

    def _parsed(self, kind: type[Reply], data: bytes) -> Reply:
        try:
            return kind.model_validate_json(data)
        except ValidationError as error:
            first, shown = error.errors()[0], data[:300].decode("utf-8", "replace")
            place = ".".join(map(str, first["loc"]))
            raise self._error(f"no such answer as OpenAI's ({place}: {first['msg']}): {shown}", _CURE) from None

    def _events(self, body: dict[str, Any]) -> Iterator[_Completion]:
        """The events of a stream (server-sent events: lines `data: {...}`)."""
        import httpx

        response, rest = self._send("POST", "/chat/completions", body, stream=True), b""
        try:
            for piece in response.iter_bytes():  # not iter_lines, which also splits at U+2028
                *lines, rest = (rest + piece).split(b"\n")
                for line in lines:
                    data = line.strip().removeprefix(b"data:").strip()
                    if data.startswith(b"{"):  # no blank line, comment or [DONE]
                        yield self._parsed(_Completion, data)
        except httpx.HTTPError as error:
            raise self._error(f"the stream broke off: {error!r}") from None
        finally:
            response.close()

    def _send(self, method: str, path: str, body: dict[str, Any] | None = None, *, stream: bool = False):
        """The response to a request, which is tried again while the server is away or busy."""
        import httpx

        key, problem = os.environ.get("OPENAI_API_KEY", "").strip(), ""
        if not (key.isascii() and key.isprintable()):
            raise ConfigError("OPENAI_API_KEY holds characters that a header cannot carry\n  cure: set it again")
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        for attempt in range(1, self._attempts + 1):
            try:
                request = self._client.build_request(method, self.url + path, json=body, headers=headers)
                response = self._client.send(request, stream=stream)
                if response.is_success:
                    return response
                problem = f"{response.status_code} {_message(response.read())}"
                response.close()
                if response.status_code not in _AGAIN:
                    raise self._error(problem, "correct what the server's message names")
            except (httpx.InvalidURL, httpx.UnsupportedProtocol, httpx.DecodingError) as error:
                raise self._error(str(error), _CURE) from None
            except httpx.TransportError as error:  # refused, reset, timed out
                problem = str(error) or type(error).__name__
            if attempt < self._attempts:
                time.sleep(min(30, 0.5 * 2**attempt) * random.uniform(0.5, 1))
        raise self._error(f"{problem}, after {self._attempts} attempts", "check that the server is up")

    def _error(self, problem: str, cure: str = "see the server's log") -> ModelError:
        return ModelError(f"{self.url}: {problem}\n  cure: {cure}")


def _message(body: bytes) -> str:
    """What the server says, from the JSON forms in use, else the start of its text."""
    try:
        reply = json.loads(body)
        return str((reply.get("error") or reply).get("message") or reply.get("detail") or reply)[:1000]
    except (ValueError, AttributeError, RecursionError):
        return body[:300].decode("utf-8", "replace")
