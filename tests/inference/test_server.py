"""The client of an OpenAI-compatible server, against a made-up one."""

import asyncio
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from steerjax.chat.templates import TEMPLATES
from steerjax.data.conversation import Conversation, Turn
from steerjax.errors import ConfigError, ModelError
from steerjax.inference.server import Server
from steerjax.inference.steering import Answer, Sampling
from steerjax.schema import HELPSTEER
from tests.refusals import refused

pytestmark = pytest.mark.short
ABOUT = {"id": "x", "created": 1, "model": "m", "object": "chat.completion"}
CHUNK = {"object": "chat.completion.chunk"}
USAGE = {"prompt_tokens": 1, "total_tokens": 2}
CONVERSATION = Conversation((Turn("user", "q"), Turn("assistant", "a", {"verbosity": 2}), Turn("user", "r")), "be kind")


class FakeServer(ThreadingHTTPServer):
    """Answers with the ratings that it was asked for; fails as often as `failures` says."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.bodies, self.failures, self.status, self.models, self.text = [], 0, 503, ["m"], ""
        self.raw, self.list, self.headers = None, None, {}


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        names = {
            "data": [{"id": name, "object": "model", "created": 1, "owned_by": "x"} for name in self.server.models],
            "object": "list",
        }
        self.reply(200, names if self.server.list is None else self.server.list)

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.bodies.append(body)
        self.server.headers = self.headers
        if self.server.raw is not None:
            self.reply(200, self.server.raw)
            return
        if self.server.failures:
            self.server.failures -= 1
            if self.server.status is None:
                self.close_connection = True  # hangs up
                return
            self.reply(self.server.status, {"error": {"message": "unknown attribute 'kindness'"}})
            return
        asked = (body.get("chat_template_kwargs") or {}).get("attributes")
        text = self.server.text or json.dumps(asked)
        if body.get("stream"):
            pieces = [{"choices": [{"index": 0, "delta": {"content": c}, "finish_reason": None}]} for c in text]
            pieces += [{"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]}]
            pieces += [{"choices": [], "usage": USAGE | {"completion_tokens": 9}}]
            lines = "".join(f"data: {json.dumps(ABOUT | CHUNK | piece)}\n\n" for piece in pieces)
            self.reply(200, lines + "data: [DONE]\n\n")
            return
        choices = [
            {"index": i, "message": {"role": "assistant", "content": f"{text} {i}"}, "finish_reason": "length"}
            for i in range(body.get("n", 1))
        ]
        self.reply(200, ABOUT | {"choices": choices[::-1], "usage": USAGE | {"completion_tokens": 7}})

    def reply(self, status, body):
        data = body if isinstance(body, bytes) else (body if isinstance(body, str) else json.dumps(body)).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_):
        pass


@pytest.fixture
def fake(monkeypatch):
    monkeypatch.setattr("anyio.sleep", lambda _: asyncio.sleep(0))  # between two tries
    server = FakeServer()
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def client(fake, sampling=None, **options):
    return Server(fake.url, None, HELPSTEER, sampling or Sampling(), **options)


def test_what_is_sent_and_what_comes_back(fake):
    sampling = Sampling(0.7, top_k=50, top_p=0.9, seed=3, max_new_tokens=20)
    backend = client(fake, sampling, workers=1)
    settings = [{"verbosity": 0, "coherence": None}, {"verbosity": 4}]
    request = backend.prepare(CONVERSATION, settings, 2)
    (answers,) = backend.run([request], 0)
    assert answers[2:] == [Answer(f'{{"verbosity": 4}} {i}', "length", None) for i in range(2)]
    first, second = fake.bodies
    assert first.pop("seed") != second.pop("seed")
    assert first == {
        "model": "m", "n": 2, "max_tokens": 20, "temperature": 0.7, "top_p": 0.9, "top_k": 50,
        "messages": [
            {"role": "system", "content": "be kind"}, {"role": "user", "content": "q"},
            {"role": "assistant", "content": "a"}, {"role": "user", "content": "r"},
        ],
        "chat_template_kwargs": {
            "attributes": {"verbosity": 0, "coherence": None},
            "message_attributes": [None, None, {"verbosity": 2}, None],
        },
    }  # fmt: skip
    assert request == client(fake, sampling).prepare(CONVERSATION, settings, 2)  # seeds and all
    (plain,) = client(fake).prepare(CONVERSATION, [{}], 2)
    assert plain["extra_body"].keys() == {"chat_template_kwargs"}
    assert plain["extra_body"]["chat_template_kwargs"].keys() == {"message_attributes"}
    (unrated,) = backend.prepare(Conversation((Turn("user", "q"),)), [{}], 1)
    assert unrated["extra_body"].keys() == {"top_k"}


def test_many_requests_and_a_resumed_job(fake):
    backend = client(fake, workers=4)
    requests = [backend.prepare(CONVERSATION, [{"verbosity": n % 5}], 1) for n in range(20)]
    answers = list(backend.run(requests, 5))
    assert answers == [[Answer(f'{{"verbosity": {n % 5}}} 0', "length", 7)] for n in range(5, 20)]
    assert len(fake.bodies) == 15


def test_stream(fake):
    backend = client(fake)
    *pieces, answer = backend.stream(backend.prepare(CONVERSATION, [{"verbosity": 1}], 1))
    assert answer == Answer('{"verbosity": 1}', "stop", 9)
    assert "".join(pieces) == answer.text


@pytest.mark.parametrize(
    ("template", "text"), [(None, "an answer"), ("chatml", "an answer"), ("extra_id", "\n an answer ")]
)
def test_white_space_around_an_answer(fake, template, text):
    """As our own decoder leaves it; the newline of extra_id's end, "\\n<extra_id_1>", is no part of the answer."""
    fake.text = "\n an answer \n"
    backend = client(fake, template=template and TEMPLATES[template])
    *pieces, answer = backend.stream(backend.prepare(CONVERSATION, [{}], 1))
    assert (answer.text, "".join(pieces)) == (text, text)
    assert fake.bodies[0].get("stop") == (sorted(TEMPLATES[template].control_strings) if template else None)


@pytest.mark.parametrize("status", [503, 429, None])
def test_tried_again_while_the_server_is_away(fake, status):
    backend = client(fake, attempts=3)
    request = backend.prepare(CONVERSATION, [{}], 1)
    fake.status, fake.failures = status, 2
    assert next(backend.run([request], 0))[0].text == "null 0"
    fake.failures = 3
    with refused(ModelError, fake.url, str(status) if status else "Connection"):
        list(backend.run([request], 0))


def test_clear_errors(fake):
    backend = client(fake)
    request = backend.prepare(CONVERSATION, [{}], 1)
    fake.status, fake.failures = 400, 1
    with refused(ModelError, "400", "kindness"):
        list(backend.run([request], 0))
    assert len(fake.bodies) == 1  # not tried again
    fake.models = ["a", "b"]
    with refused(ModelError, "a, b", cure="--server-model"):
        client(fake)
    for url in ("http://127.0.0.1:9", "http://[::1", "localhost", "ftp://h"):
        with refused((ModelError, ConfigError), url):
            Server(url, None, HELPSTEER, Sampling(), attempts=2)


ANSWER = {"index": 0, "message": {"role": "assistant", "content": "x"}, "finish_reason": "stop"}
ODD = [
    b"", b"null", b"[]", b"7", b"<html>", b"{", b'"x"', b"\xff\xfe", b"[" * 5000, b'{"choices": [{"a": "\\ud83d"}]}',
    {}, {"choices": None}, {"choices": {}}, {"choices": [None]}, {"choices": []}, {"choices": [ANSWER] * 2},
    {"choices": [ANSWER | {"index": "a"}]}, {"choices": [ANSWER | {"index": None}]},
    {"choices": [ANSWER | {"message": None}]}, {"choices": [ANSWER | {"message": "x"}]},
    {"choices": [ANSWER | {"message": {"content": ["x"]}}]}, {"choices": [ANSWER | {"finish_reason": None}]},
    {"choices": [ANSWER | {"finish_reason": 3}]}, {"choices": [ANSWER], "usage": 3},
    {"choices": [ANSWER], "usage": USAGE | {"completion_tokens": "many"}}, {"error": "out of memory"},
]  # fmt: skip


@pytest.mark.parametrize("raw", ODD, ids=range(len(ODD)))
def test_an_odd_answer_is_an_error_of_ours(fake, raw):
    backend = client(fake)
    request = backend.prepare(CONVERSATION, [{}], 1)
    fake.raw = ABOUT | raw if isinstance(raw, dict) else raw
    with refused(ModelError, fake.url):
        list(backend.run([request], 0))


@pytest.mark.parametrize("raw", [b"", b"data: [DONE]\n\n", b"<html>", *(b"data: " + raw for raw in (
    b"{", b'{"error": "x"}', b'{"choices": 1}', b'{"choices": [{"delta": {"content": "half"}}]}'))])  # fmt: skip
def test_an_odd_stream_is_an_error_of_ours(fake, raw):
    backend = client(fake)
    fake.raw = raw
    with refused(ModelError, fake.url):
        list(backend.stream(backend.prepare(CONVERSATION, [{}], 1)))


def test_a_model_list_that_is_none(fake):
    for models in ({}, {"data": [{}]}, {"data": "m"}, []):
        fake.list = models
        with refused(ModelError, fake.url):
            client(fake)


def test_texts_of_any_characters_in_a_stream(fake):
    """U+2028 ends no event; a piece of the connection may end anywhere."""
    backend = client(fake)
    choice = {"index": 0, "delta": {"content": "a\u2028b é"}, "finish_reason": "stop"}
    event = json.dumps(ABOUT | CHUNK | {"choices": [choice]}, ensure_ascii=False)
    fake.raw = f": comment\r\n\r\ndata:{event}\r\n\r\ndata: [DONE]".encode()
    *_, answer = backend.stream(backend.prepare(CONVERSATION, [{}], 1))
    assert answer == Answer("a\u2028b é", "stop", None)


def test_the_key_is_sent_and_never_shown(fake, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "made-up-key\n")
    backend = client(fake)
    list(backend.run([backend.prepare(CONVERSATION, [{}], 1)], 0))
    assert fake.headers["Authorization"] == "Bearer made-up-key"
    for key in ("made\nup", "schlüssel"):
        monkeypatch.setenv("OPENAI_API_KEY", key)
        with pytest.raises(ConfigError, match="OPENAI_API_KEY") as caught:
            client(fake)
        assert key not in str(caught.value)
