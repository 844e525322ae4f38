"""The same answers from an OpenAI-compatible server (vLLM, SGLang) that serves an exported chat model.

Ratings go to the chat template as `chat_template_kwargs`: `attributes`, and those of earlier turns, one entry a
message, as `message_attributes` (vLLM 0.32 drops what it does not know of a message). Texts are sent as they are.

Requests run on one event loop in a thread of its own, as only a task can be cut off whatever it waits for: an address,
a header that comes a byte a second, a pause between two tries. So time limits are whole, and an interrupt ends all.
"""

import asyncio
import copy
import functools
import os
import queue
import sys
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any, Self

from tqdm import tqdm

from steerjax.chat.templates import Template
from steerjax.data.conversation import Conversation, Turn
from steerjax.errors import ConfigError, ModelError
from steerjax.inference.steering import Answer, Sampling, Setting, end_space, hashed
from steerjax.schema import Schema, round_rating

LARGEST = 8 << 20  # bytes of one answer; parsed, they may take thirty times as much memory
_AHEAD = 16  # requests of each worker that may be answered before the first one is
_QUIET = 10.0  # seconds between two words on tries
_LOG = "check that an OpenAI-compatible server is up there, and its log"


class RefusedRequest(ModelError):
    """The server is up and does not take this request."""


class Server:
    """Answers over HTTP; methods as those of `engine.Engine`. A request is a list of bodies, one for each setting.

    What passes (no connection, a cut or late answer, status 408, 409, 429, 5xx) is tried again after a pause: what
    Retry-After says, up to 120 s, else 0.5 to 8 s. An answer of more than `LARGEST` bytes is an error.

    Args:
        url: `http://host:8000` or `.../v1`. The key in OPENAI_API_KEY is sent there, if there is one, and nowhere else:
            a redirect to another host, port or scheme is an error.
        model: the served name; None takes the only model that it serves.
        template: of the served model; None, not known: the white space around an answer is then removed.
        workers: requests at a time. attempts: tries of one request. timeout: seconds of a try, for a whole answer.

    Raises ModelError: no server there, or it serves several models; later, an odd answer or, as RefusedRequest, what
    the server does not take. ConfigError: a url or key that cannot be sent.
    """

    def __init__(
        self, url: str, model: str | None, schema: Schema, sampling: Sampling = Sampling(), *,  # noqa: B008
        template: Template | None = None, workers: int = 16, attempts: int = 8, timeout: float = 600,
    ):  # fmt: skip
        import openai

        self._schema, self._sampling, self._template, self._workers = schema, sampling, template, workers
        self._key = os.environ.get("OPENAI_API_KEY", "").strip()
        self._timeout = timeout
        if not (self._key.isascii() and (self._key or "none").isprintable()):
            raise ConfigError("OPENAI_API_KEY holds characters that a header cannot carry\n  cure: set it again")
        if "@" in url.partition("://")[2].partition("/")[0]:
            raise ConfigError("the server's address holds a password\n  cure: leave it out, and set OPENAI_API_KEY")
        if not url.startswith(("http://", "https://")):
            raise ConfigError(f"'{url}' is no address of a server; cure: http://HOST:PORT")
        self.url = url.rstrip("/").removesuffix("/v1") + "/v1"
        with self._reported():
            client = openai.AsyncOpenAI(
                base_url=self.url, api_key=self._key or "none", max_retries=attempts - 1,
                timeout=openai.Timeout(None, connect=min(timeout, 5.0)), http_client=_http_client(timeout, attempts),
                _strict_response_validation=True,
            )  # fmt: skip
        self._completions = client.chat.completions

        async def served() -> list[str]:
            return [entry.id for entry in (await client.models.list()).data]

        names = [model] if model else self._start(served()).result()
        if len(names) != 1:
            names = f"{', '.join(names) or 'no model':.1000}"
            raise ModelError(f"{self.url} serves {names}; cure: name one with --server-model")
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
        room, asked = asyncio.Semaphore(self._workers), deque()

        async def in_turn(request: list[dict]) -> list[Answer]:
            async with room:
                return await self._answers(request)

        try:
            for request in requests[done:]:
                asked.append(self._start(in_turn(request)))
                if len(asked) >= _AHEAD * self._workers:
                    yield asked.popleft().result()
            while asked:
                yield asked.popleft().result()
        finally:
            for future in asked:
                future.cancel()

    def stream(self, request: list[dict]) -> Iterator[str | Answer]:
        pieces = queue.SimpleQueue()
        whole = self._start(self._streamed(request[0], pieces.put))
        whole.add_done_callback(lambda _: pieces.put(None))
        try:
            yield from iter(pieces.get, None)
            yield whole.result()
        finally:
            whole.cancel()

    def submit(self, request: list[dict]) -> Future[list[Answer]]:
        """One request, asked now; `result()` gives the answers or raises, `cancel()` gives it up."""
        return self._start(self._answers(request))

    def _start(self, work: Coroutine) -> Future:
        async def reported():
            with self._reported():
                return await work

        return asyncio.run_coroutine_threadsafe(reported(), _loop())

    async def _answers(self, request: list[dict]) -> list[Answer]:
        answers = []
        for body in request:
            raw = await self._completions.with_raw_response.create(**body)
            try:
                reply = raw.parse()
                if len(reply.choices) != body["n"]:
                    raise ValueError(f"{len(reply.choices)} answers instead of {body['n']}")
                choices = sorted(reply.choices, key=lambda choice: choice.index)
                if [choice.index for choice in choices] != list(range(body["n"])):
                    raise ValueError("answers that are not numbered from 0 on")
                tokens = reply.usage.completion_tokens if reply.usage and body["n"] == 1 else None
                for choice in choices:
                    text = self._response(_said(choice.message.content, choice.finish_reason), choice.finish_reason)
                    answers.append(Answer(text, choice.finish_reason, tokens))
            except Exception as error:  # the client's, pydantic's, json's
                why = f"{error.__cause__ or error}"
                raise ValueError(f"an odd answer, {raw.text!r:.200}: {why:.300}") from None
        return answers

    async def _streamed(self, body: dict, show: Callable[[str], None]) -> Answer:
        text, shown, finish, tokens = "", "", None, None
        async with asyncio.timeout(self._timeout):
            events = await self._completions.create(**body, stream=True, stream_options={"include_usage": True})
            async for event in events:
                tokens = event.usage.completion_tokens if event.usage else tokens
                for choice in event.choices:
                    text += _said(choice.delta.content, "length")
                    finish = choice.finish_reason or finish
                    ready = self._response(text, "length").rstrip()
                    show(ready[len(shown) :])
                    shown = ready
        if finish is None:
            raise ValueError("the stream ends before the answer does")
        text = self._response(text, finish)
        show(text[len(shown) :])
        return Answer(text, finish, tokens)

    def _response(self, text: str, finish: str) -> str:
        """What the server wrote, as `stopping.Stops` leaves it."""
        if self._template is None:
            return text.strip()
        return self._template.answer(text.removesuffix(end_space(self._template)) if finish == "stop" else text)

    @contextmanager
    def _reported(self) -> Iterator[None]:
        """What the client raises (its own errors, httpx's, json's), as a ModelError that does not show the key."""
        try:
            yield
        except Exception as error:
            about = f"{error} {error.__cause__ or ''}".strip() or type(error).__name__
            about = about.replace(self._key, "OPENAI_API_KEY") if self._key else about
            about = "".join(c if c.isprintable() else " " for c in about[:1000])
            kind, cure = ModelError, getattr(error, "cure", _LOG)
            if getattr(error, "status_code", 0) in (400, 413, 422):  # it is up, and says what it does not take
                kind, cure = RefusedRequest, "ask for what the server says that it takes"
            raise kind(f"{self.url}: {about}\n  cure: {cure}") from None


class _Unusable(Exception):
    """An answer that would be no better at the next try."""

    def __init__(self, message: str, cure: str = _LOG):
        super().__init__(message)
        self.cure = cure


@functools.cache
def _loop() -> asyncio.AbstractEventLoop:
    """One for the process; its thread ends with it, whatever is under way."""
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="requests", daemon=True).start()
    return loop


def _http_client(timeout: float, attempts: int):
    """The HTTP client of openai's, which bounds a whole answer and sends nothing to another address."""
    import httpx2
    import openai

    class Bounded(httpx2.AsyncByteStream):
        def __init__(self, stream: httpx2.AsyncByteStream):
            self._stream, self.aclose = stream, stream.aclose

        async def __aiter__(self) -> AsyncIterator[bytes]:
            size = 0
            async for chunk in self._stream:
                size += len(chunk)
                if size > LARGEST:
                    raise _Unusable(f"an answer of more than {LARGEST >> 20} MiB")
                yield chunk

    class Client(openai.DefaultAsyncHttpxClient):
        async def send(self, request: httpx2.Request, **options: Any) -> httpx2.Response:
            try:
                async with asyncio.timeout(timeout):
                    return await super().send(request, **options)
            except TimeoutError:
                raise httpx2.ReadTimeout(f"no whole answer in {timeout:g} s", request=request) from None

    said = -_QUIET

    async def asks(request: httpx2.Request) -> None:
        nonlocal said
        tried = int(request.headers.get("x-stainless-retry-count", 0))
        if tried and time.monotonic() > said + _QUIET:
            said = time.monotonic()
            tqdm.write(f"{request.url}: try {tried + 1} of {attempts}", file=sys.stderr)

    async def answered(response: httpx2.Response) -> None:
        response.stream = Bounded(response.stream)
        if (coding := response.headers.get("content-encoding", "identity")) != "identity":
            raise _Unusable(f"an answer in the coding '{coding:.80}', which was not asked for")
        if response.has_redirect_location:
            here, there = response.url, response.url.join(response.headers["location"])
            if (there.scheme, there.host, there.port) != (here.scheme, here.host, here.port):
                cure = "give that address, if it may have the texts and OPENAI_API_KEY"
                raise _Unusable(f"redirects to {there.scheme}://{there.netloc.decode('ascii', 'replace'):.200}", cure)

    hooks = {"request": [asks], "response": [answered]}
    return Client(headers={"Accept-Encoding": "identity"}, event_hooks=hooks)


def _said(content: str | None, finish: str) -> str:
    """The text of an answer. Raises ValueError: none, where it is not cut before it began; half a surrogate pair."""
    if content is None and finish != "length":
        raise ValueError("no text")
    (content or "").encode()
    return content or ""


def _given(values: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if value}
