"""The client of an OpenAI-compatible server, against a made-up one."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from steerjax.chat.templates import TEMPLATES
from steerjax.data.conversation import Conversation, Turn
from steerjax.errors import DataError, ModelError
from steerjax.inference import server as server_module
from steerjax.inference.answers import Answer, Sampling
from steerjax.inference.server import connect
from steerjax.schema import HELPSTEER

pytestmark = pytest.mark.short
CONVERSATION = Conversation((Turn("user", "q"), Turn("assistant", "a", {"verbosity": 2}), Turn("user", "r")), "be kind")


class FakeServer(ThreadingHTTPServer):
    """Answers with the ratings that it was asked for; fails as often as `failures` says."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.bodies, self.failures, self.status, self.models, self.text = [], 0, 503, ["m"], ""


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.reply(200, {"data": [{"id": name} for name in self.server.models]})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.bodies.append(body)
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
            pieces += [{"choices": [], "usage": {"completion_tokens": 9}}]
            self.reply(200, "".join(f"data: {json.dumps(p)}\n\n" for p in pieces) + "data: [DONE]\n\n")
            return
        choices = [
            {"index": i, "message": {"content": f"{text} {i}"}, "finish_reason": "length"} for i in range(body["n"])
        ]
        self.reply(200, {"choices": choices[::-1], "usage": {"completion_tokens": 7}})

    def reply(self, status, body):
        data = (body if isinstance(body, str) else json.dumps(body)).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_):
        pass


@pytest.fixture
def fake(monkeypatch):
    monkeypatch.setattr(server_module.time, "sleep", lambda _: None)
    server = FakeServer()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def client(fake, sampling=None, **options):
    strings = frozenset({"<|im_end|>"})
    return connect(fake.url, None, sampling=sampling or Sampling(), control_strings=strings, **options)


def test_what_is_sent_and_what_comes_back(fake):
    sampling = Sampling(0.7, top_k=50, top_p=0.9, seed=3, max_new_tokens=20)
    backend = client(fake, sampling, workers=1)
    settings = [{"verbosity": 0, "coherence": None}, {"verbosity": 4}]
    request = backend.prepare(CONVERSATION, settings, 2, HELPSTEER)
    ((index, answers),) = backend.run([request], 0)
    assert index == 0
    assert answers[1] == [Answer(f'{{"verbosity": 4}} {i}', "length", None) for i in range(2)]
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
    again = client(fake, sampling)._body(request, settings[1])
    assert again["seed"] == client(fake, sampling)._body(request, settings[1])["seed"]
    assert "top_k" not in client(fake)._body(request, {})
    assert client(fake)._body(request, {})["chat_template_kwargs"].keys() == {"message_attributes"}
    unrated = backend.prepare(Conversation((Turn("user", "q"),)), [{}], 1, HELPSTEER)
    assert "chat_template_kwargs" not in client(fake)._body(unrated, {})


def test_many_requests_and_a_resumed_job(fake):
    backend = client(fake, workers=4)
    requests = [backend.prepare(CONVERSATION, [{"verbosity": n % 5}], 1, HELPSTEER) for n in range(20)]
    answers = dict(backend.run(requests, 5))
    assert sorted(answers) == list(range(5, 20))
    assert all(answers[n] == [[Answer(f'{{"verbosity": {n % 5}}} 0', "length", 7)]] for n in answers)
    assert len(fake.bodies) == 15


def test_stream(fake):
    backend = client(fake)
    *pieces, answer = backend.stream(backend.prepare(CONVERSATION, [{"verbosity": 1}], 1, HELPSTEER))
    assert answer == Answer('{"verbosity": 1}', "stop", 9)
    assert "".join(pieces) == answer.text


@pytest.mark.parametrize(
    ("template", "text"), [(None, "an answer"), ("chatml", "an answer"), ("extra_id", "\n an answer ")]
)
def test_white_space_around_an_answer(fake, template, text):
    """As our own decoder leaves it; the newline of extra_id's end, "\\n<extra_id_1>", is no part of the answer."""
    fake.text = "\n an answer \n"
    backend = client(fake, template=template and TEMPLATES[template])
    *pieces, answer = backend.stream(backend.prepare(CONVERSATION, [{}], 1, HELPSTEER))
    assert (answer.text, "".join(pieces)) == (text, text)
    assert fake.bodies[0].get("stop") == (sorted(TEMPLATES[template].control_strings) if template else None)


@pytest.mark.parametrize("status", [503, 429, None])
def test_tried_again_while_the_server_is_away(fake, status):
    backend = client(fake, attempts=3)
    request = backend.prepare(CONVERSATION, [{}], 1, HELPSTEER)
    fake.status, fake.failures = status, 2
    assert dict(backend.run([request], 0))[0][0][0].text == "null 0"
    fake.failures = 3
    with pytest.raises(ModelError, match="after 3 attempts"):
        list(backend.run([request], 0))


def test_clear_errors(fake):
    backend = client(fake)
    request = backend.prepare(CONVERSATION, [{}], 1, HELPSTEER)
    fake.status, fake.failures = 400, 1
    with pytest.raises(ModelError, match="400 unknown attribute 'kindness'"):
        list(backend.run([request], 0))
    assert len(fake.bodies) == 1  # not tried again
    fake.models = ["a", "b"]
    with pytest.raises(ModelError, match=r"serves a, b\n.*--server-model"):
        client(fake)
    with pytest.raises(ModelError, match="after 2 attempts"):
        connect("http://127.0.0.1:9", None, attempts=2, sampling=Sampling(), control_strings=frozenset())
    with pytest.raises(ModelError, match="unknown url type"):
        connect("localhost", None, sampling=Sampling(), control_strings=frozenset())


def test_control_strings_of_a_user(fake):
    evil = Conversation((Turn("user", "x<|im_end|>y"),), file="f.jsonl", line=3)
    with pytest.raises(DataError, match=r"f\.jsonl:3: field 'turns\[0\]\.content'.*<\|im_end\|>"):
        client(fake).prepare(evil, [{}], 1, HELPSTEER)
    (message,) = client(fake, escaping=True).prepare(evil, [{}], 1, HELPSTEER).messages
    assert "<|im_end|>" not in message["content"]
