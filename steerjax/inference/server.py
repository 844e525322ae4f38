"""The same answers from an OpenAI-compatible server (vLLM, SGLang) that serves an exported chat model.

Ratings go to the chat template as `chat_template_kwargs`: `attributes`, and those of earlier turns, if any have some,
as `message_attributes`, one entry a message. (vLLM 0.32 drops what it does not know of a message.)
"""

from __future__ import annotations

import hashlib
import http.client
import json
import os
import random
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from typing import Any

from steerjax.chat.control import escape, find_control_string
from steerjax.chat.templates import Template
from steerjax.data.conversation import Conversation
from steerjax.errors import DataError, ModelError
from steerjax.inference.answers import Answer, Sampling
from steerjax.inference.steering import Setting
from steerjax.schema import Schema, round_rating

_AGAIN = (408, 409, 425, 429, 500, 502, 503, 504)  # statuses that may pass


@dataclass(frozen=True)
class ServerRequest:
    """A conversation in one or several settings, as messages; `ratings` has an entry for each message."""

    messages: tuple[dict[str, Any], ...]
    ratings: tuple[dict[str, int] | None, ...]
    settings: tuple[Setting, ...]
    samples: int = 1


@dataclass(frozen=True)
class Server:
    """Answers over HTTP.

    Attributes:
        url: `http://host:8000` or `.../v1`. A key in OPENAI_API_KEY is sent as a bearer token.
        model: the served name.
        sampling: see there; `top_k` is sent only if it is set (OpenAI itself has none).
        control_strings: what texts must not contain.
        template: of the served model; None, not known: the white space around an answer is then removed.
        escaping: make control strings harmless instead of refusing them.
        workers: requests at a time.
        timeout: seconds of silence after which a request is tried again.
        attempts: tries of one request, with growing pauses.
    """

    url: str
    model: str
    sampling: Sampling
    control_strings: frozenset[str]
    template: Template | None = None
    escaping: bool = False
    workers: int = 16
    timeout: float = 600.0
    attempts: int = 6

    def prepare(
        self, conversation: Conversation, settings: Sequence[Setting], samples: int, schema: Schema
    ) -> ServerRequest:
        """The conversation as messages.

        Raises:
            DataError: a text with a control string.
        """
        messages, given = [], []
        if conversation.system is not None:
            messages.append({"role": "system", "content": self._content(conversation, conversation.system, "system")})
            given.append(None)
        for index, turn in enumerate(conversation.turns):
            content = self._content(conversation, turn.content, f"turns[{index}].content")
            messages.append({"role": turn.role, "content": content})
            ratings = turn.ratings or turn.predicted_ratings or {}
            given.append({name: round_rating(r, schema[name]) for name, r in ratings.items()} or None)
        return ServerRequest(tuple(messages), tuple(given), tuple(settings), samples)

    def run(self, requests: Sequence[ServerRequest], done: int) -> Iterator[tuple[int, list[list[Answer]]]]:
        """(index, answers [setting][sample]) of the requests from `done` on, as they come.

        Raises:
            ModelError: the server cannot be reached or refuses a request.
        """
        with ThreadPoolExecutor(self.workers) as pool:
            waiting = {pool.submit(self._answers, requests[i]): i for i in range(done, len(requests))}
            try:
                for future in as_completed(waiting):
                    yield waiting[future], future.result()
            finally:
                pool.shutdown(wait=False, cancel_futures=True)

    def stream(self, request: ServerRequest) -> Iterator[str | Answer]:
        """The pieces of one answer as they come, then the whole `Answer`."""
        body = self._body(request, request.settings[0]) | {"stream": True, "stream_options": {"include_usage": True}}
        text, shown, finish, tokens = "", "", "length", None
        with _request(self.url, "/chat/completions", body, self.timeout, self.attempts, read=lambda r: r) as response:
            for line in response:
                data = line.decode("utf-8").strip().removeprefix("data:").strip()
                if not data.startswith("{"):  # blank lines, comments, [DONE]
                    continue
                event = json.loads(data)
                if "error" in event:
                    raise ModelError(f"{self.url}: {event['error']}\n  cure: see the server's log")
                tokens = (event.get("usage") or {}).get("completion_tokens", tokens)
                for choice in event.get("choices", ()):
                    text += (choice.get("delta") or {}).get("content") or ""
                    finish = choice.get("finish_reason") or finish
                    ready = self._response(text, "length").rstrip()
                    yield ready[len(shown) :]
                    shown = ready
        text = self._response(text, finish)
        yield text[len(shown) :]
        yield Answer(text, finish, tokens)

    def _response(self, text: str, finish: str) -> str:
        """What the server wrote, as `stopping.Stops` leaves it."""
        if self.template is None or self.template.strip:
            return text.strip()
        end = self.template.end  # may begin with white space, which is no end yet to a server
        return text.removesuffix(end[: len(end) - len(end.lstrip())]) if finish == "stop" else text

    def _content(self, conversation: Conversation, text: str, field: str) -> str:
        if self.escaping:
            text = escape(text, self.control_strings)
        if (found := find_control_string(text, self.control_strings)) is not None:
            raise DataError(
                f"the text contains the control string '{found}'", file=conversation.file, line=conversation.line,
                field=field, cure="remove it, or use --control-strings escape",
            )  # fmt: skip
        return text

    def _body(self, request: ServerRequest, setting: Setting) -> dict[str, Any]:
        s = self.sampling
        body: dict[str, Any] = {
            "model": self.model, "messages": list(request.messages), "n": request.samples,
            "max_tokens": s.max_new_tokens, "temperature": s.temperature, "top_p": s.top_p,
        }  # fmt: skip
        if self.template:
            body["stop"] = sorted(self.template.control_strings)
        if s.top_k:
            body["top_k"] = s.top_k
        asked: dict[str, Any] = {"attributes": dict(setting)} if setting else {}
        if any(request.ratings):
            asked["message_attributes"] = list(request.ratings)
        if asked:
            body["chat_template_kwargs"] = asked
        # As with our own decoder: one seed, and still other draws for other prompts and settings.
        text = json.dumps([s.seed, request.messages, request.ratings, sorted(setting.items())])
        body["seed"] = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=4).digest()) >> 1
        return body

    def _answers(self, request: ServerRequest) -> list[list[Answer]]:
        return [self._ask(self._body(request, setting)) for setting in request.settings]

    def _ask(self, body: dict[str, Any]) -> list[Answer]:
        reply = _request(self.url, "/chat/completions", body, self.timeout, self.attempts)
        try:
            choices = sorted(reply["choices"], key=lambda choice: choice["index"])
            tokens = (reply.get("usage") or {}).get("completion_tokens") if len(choices) == 1 else None
            each = [(c["message"]["content"] or "", c["finish_reason"]) for c in choices]
            answers = [Answer(self._response(text, finish), finish, tokens) for text, finish in each]
        except (KeyError, TypeError, AttributeError):
            raise ModelError(
                f"{self.url}: no chat completion: {str(reply)[:300]}\n  cure: see the server's log"
            ) from None
        if len(answers) != body["n"]:
            raise ModelError(f"{self.url}: {len(answers)} answers instead of {body['n']}\n  cure: --samples 1")
        return answers


def connect(url: str, model: str | None, *, timeout: float = 600.0, attempts: int = 6, **settings) -> Server:
    """A `Server`; without a name the only model that it serves.

    Raises:
        ModelError: no server there, or it serves several models.
    """
    url = url.rstrip("/").removesuffix("/v1") + "/v1"
    if model is None:
        names = [entry["id"] for entry in _request(url, "/models", None, timeout, attempts)["data"]]
        if len(names) != 1:
            raise ModelError(f"{url} serves {', '.join(names) or 'no model'}\n  cure: name one with --server-model")
        model = names[0]
    return Server(url, model, timeout=timeout, attempts=attempts, **settings)


def _request(url: str, path: str, body: dict[str, Any] | None, timeout: float, attempts: int, read=json.load) -> Any:
    """What `read` makes of the response to a request, which is tried again while the server is away or busy."""
    headers = {"Content-Type": "application/json"}
    if key := os.environ.get("OPENAI_API_KEY"):
        headers["Authorization"] = f"Bearer {key}"
    data = None if body is None else json.dumps(body).encode()
    for attempt in range(1, attempts + 1):
        try:
            return read(urllib.request.urlopen(urllib.request.Request(url + path, data, headers), timeout=timeout))
        except urllib.error.HTTPError as error:
            problem = f"{error.code} {_message(error)}"
            if error.code not in _AGAIN:
                raise ModelError(f"{url}{path}: {problem}\n  cure: correct what the server's message names") from None
        except (OSError, http.client.HTTPException) as error:  # refused, reset, timed out
            problem = str(getattr(error, "reason", error)) or type(error).__name__
        except ValueError as error:  # no URL, no JSON
            raise ModelError(f"{url}{path}: {error}\n  cure: an OpenAI-compatible server, http://HOST:PORT") from None
        if attempt < attempts:
            time.sleep(min(30, 0.5 * 2**attempt) * random.uniform(0.5, 1))
    raise ModelError(f"{url}{path}: {problem}, after {attempts} attempts\n  cure: check that the server is up")


def _message(error: urllib.error.HTTPError) -> str:
    """What the server says, from the JSON forms in use, else the start of its text."""
    text = error.read().decode("utf-8", "replace")
    try:
        reply = json.loads(text)
        return str((reply.get("error") or reply).get("message") or reply.get("detail") or reply)
    except (ValueError, AttributeError):
        return text[:300]
