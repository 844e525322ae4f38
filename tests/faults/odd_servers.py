"""A server in this process that gives odd answers; `ODD` names them."""

import contextlib
import json
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from random import Random

from tests.faults.mutate import mutated_bytes, mutated_json

Write = Callable[["OddServer", socket.socket], None]

ABOUT = {"id": "x", "created": 1, "model": "m", "object": "chat.completion"}
CHOICE = {"index": 0, "message": {"role": "assistant", "content": "x"}, "finish_reason": "stop"}
USAGE = {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}
GOOD = ABOUT | {"choices": [CHOICE], "usage": USAGE}
MODELS = {"object": "list", "data": [{"id": "m", "object": "model", "created": 1, "owned_by": "x"}]}


def http(body: bytes, status: str = "200 OK", **headers: str) -> bytes:
    """A whole answer; a header of None is left out."""
    given = {"content_type": "application/json", "content_length": str(len(body)), "connection": "close"} | headers
    lines = "".join(f"{name.replace('_', '-')}: {value}\r\n" for name, value in given.items() if value is not None)
    return f"HTTP/1.1 {status}\r\n{lines}\r\n".encode() + body


def sends(data: bytes) -> Write:
    return lambda server, connection: connection.sendall(data)


def endless(head: bytes, piece: bytes, pause: float = 0) -> Write:
    """As long as somebody listens and the server lives."""

    def write(server: "OddServer", connection: socket.socket) -> None:
        connection.sendall(head)
        while not server.closed.wait(pause) if pause else not server.closed.is_set():
            connection.sendall(piece)

    return write


def reset(server: "OddServer", connection: socket.socket) -> None:
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def says(status: str, body: bytes = b"", **headers: str) -> Write:
    return sends(http(body, f"{status} X", **headers))


def changed(**keys) -> Write:
    return sends(http(json.dumps(GOOD | keys).encode()))


def choice(**keys) -> Write:
    return changed(choices=[CHOICE | keys])


def message(**keys) -> Write:
    return choice(message=CHOICE["message"] | keys)


def redirect(status: str, to: str) -> Write:
    """`{port}` and `{other}` in `to`: this server's, and the other's that must not be asked."""

    def write(server: "OddServer", connection: socket.socket) -> None:
        place = to.format(port=server.port, other=server.other)
        connection.sendall(http(b"", f"{status} Moved", location=place))

    return write


def _raw(**bodies: bytes) -> dict[str, Write]:
    return {name.replace("_", " "): sends(http(body)) for name, body in bodies.items()}


CUT = http(json.dumps(GOOD).encode())[:-20]
CHUNKED = http(b"", transfer_encoding="chunked", content_length=None)

# Those that a client cannot use, each an error of that request.
ODD: dict[str, Write] = {
    **_raw(
        empty=b"", null=b"null", a_list=b"[]", a_number=b"7", html=b"<html>", half=b"{", a_text=b'"x"', true=b"true",
        not_utf8=b"\xff\xfe", latin1=json.dumps(GOOD).replace('"x"', '"\xe9"').encode("latin-1"), nul=b"\0" * 100,
        deep_lists=b"[" * 100_000, deep_objects=b'{"a":' * 100_000, closed_lists=b"[" * 5000 + b"]" * 5000,
        deep_in_choice=json.dumps(GOOD).encode().replace(b'"x"', b"[" * 3000 + b"]" * 3000),
        long_number=b'{"choices": ' + b"9" * 100_000 + b"}", huge_index=json.dumps(GOOD).encode().replace(
            b'"index": 0', b'"index": ' + b"9" * 400), two_values=b"{}{}", infinite=b'{"choices": Infinity}',
        half_a_pair=json.dumps(GOOD).encode().replace(b'"content": "x"', b'"content": "\\ud83d"'),
        no_keys=b"{}", many_lists=b"[" + b"[]," * 300_000 + b"[]]", error=b'{"error": "out of memory"}',
    ),
    "choices null": changed(choices=None), "choices object": changed(choices={}), "no choices": changed(choices=[]),
    "choice null": changed(choices=[None]), "choice text": changed(choices=["x"]),
    "choices twice": changed(choices=[CHOICE] * 2), "choices many": changed(choices=[CHOICE] * 10_000),
    "index text": choice(index="a"), "index null": choice(index=None), "index NaN": choice(index=float("nan")),
    "message null": choice(message=None), "message text": choice(message="x"), "message list": choice(message=[]),
    "content null": message(content=None), "content number": message(content=5), "content list": message(content=["x"]),
    "content object": message(content={"text": "x"}), "content true": message(content=True),
    "role number": message(role=7), "finish null": choice(finish_reason=None), "finish 3": choice(finish_reason=3),
    "finish unknown": choice(finish_reason="exploded"), "usage number": changed(usage=3),
    "usage text": changed(usage=USAGE | {"completion_tokens": "many"}),
    "usage NaN": changed(usage=USAGE | {"completion_tokens": float("nan")}), "created text": changed(created="x"),
    "logprobs NaN": choice(logprobs={"content": [{"token": "x", "logprob": float("nan"), "top_logprobs": 0}]}),
    "logprobs text": choice(logprobs="x"), "id null": changed(id=None),
    "html page": sends(http(b"<html>", content_type="text/html")),
    "no type": sends(http(b"hello", content_type=None)),
    "gzip that is none": sends(http(b"xx", content_encoding="gzip")),
    "gzip": sends(http(b"\x1f\x8b\x08" + b"\0" * 100, content_encoding="gzip")),
    "two codings": sends(http(b"xx", content_encoding="gzip, br, zstd")),
    "cut": sends(CUT), "cut to nothing": sends(CUT[:10]), "cut headers": sends(CUT[:40]),
    "chunk cut": sends(CHUNKED + b"5\r\nab"), "chunk size": sends(CHUNKED + b"zz\r\nab"),
    "chunk negative": sends(CHUNKED + b"-5\r\nab"), "length negative": sends(http(b"{}", content_length="-1")),
    "length text": sends(http(b"{}", content_length="many")),
    "length huge": sends(http(b"{}", content_length="9" * 30)),
    "no http": sends(b"hello\r\n\r\n"), "binary": sends(bytes(range(256)) * 20),
    "http 9": sends(b"HTTP/9.9 200 OK\r\n\r\n"),
    "status 1000": says("1000"), "status text": says("abc"), "status 0": says("000"),
    "hangs up": sends(b""), "resets": reset, "204": says("204"), "304": says("304"),
    **{code: says(code, b'{"error": {"message": "no"}}') for code in (
        "400", "401", "403", "404", "405", "408", "409", "413", "418", "422", "429", "500", "501", "502", "503",
        "504")},
    "400 empty": says("400"), "400 binary": says("400", b"\xff\xfe\0\x1b[31m"),
    "400 deep": says("400", b"[" * 100_000), "400 list": says("400", b"[1]"),
    "retry never": says("429", retry_after="1e308"), "retry NaN": says("503", retry_after="nan"),
    "retry words": says("503", retry_after="soon"), "retry past": says("503", retry_after="-5"),
    "to another port": redirect("307", "http://127.0.0.1:{other}/v1/x"),
    "301": redirect("301", "http://localhost:{other}/"),
    "to another host": redirect("308", "http://localhost:{port}/v1/chat/completions"),
    "to https": redirect("307", "https://127.0.0.1:{port}/"), "to a file": redirect("302", "file:///etc/passwd"),
    "to nowhere": redirect("307", "http://"), "to garbage": redirect("307", "http://[::1"),
    "in a circle": redirect("307", "/v1"),
    "without a scheme": redirect("307", "//localhost:{other}/"),
    "with a password": redirect("307", "http://a:b@127.0.0.1:{other}/"),
    "endless body": endless(http(b"", content_length=None), b" " * 65536),
    "endless chunks": endless(CHUNKED, b"10000\r\n" + b"x" * 65536 + b"\r\n"),
    "endless error": endless(http(b"", "400 X", content_length=None), b" " * 65536),
    "endless headers": endless(b"HTTP/1.1 200 OK\r\n", b"a: " + b"b" * 1000 + b"\r\n"),
    "endless continue": endless(b"", b"HTTP/1.1 100 Continue\r\n\r\n", 0.01),
    "drips": endless(http(b"", content_length=None), b" ", 0.2),
    "drips headers": endless(b"HTTP/1.1 200 OK\r\nx: ", b"b", 0.2),
    "silence": endless(b"", b"", 0.2),
}  # fmt: skip

EVENT = ABOUT | {"object": "chat.completion.chunk"}


def event(**keys) -> bytes:
    one = {"index": 0, "delta": {"content": "a"}, "finish_reason": None} | keys
    return f"data: {json.dumps(EVENT | {'choices': [one]})}\n\n".encode()


def stream(*events: bytes) -> Write:
    return sends(http(b"".join(events), content_type="text/event-stream"))


OPEN = http(b"", content_type="text/event-stream", content_length=None)
ODD_STREAMS: dict[str, Write] = {
    "empty": stream(), "done": stream(b"data: [DONE]\n\n"), "no events": stream(b"<html>"), "half": stream(event()),
    "broken": stream(b"data: {\n\n"), "null": stream(b"data: null\n\n"), "error": stream(b'data: {"error": "x"}\n\n'),
    "deep": stream(b"data: " + b"[" * 100_000 + b"\n\n"), "content number": stream(event(delta={"content": 5})),
    "delta null": stream(event(delta=None)), "half a pair": stream(event(delta={"content": "\ud83d"})),
    "finish unknown": stream(event(finish_reason="exploded")), "not utf8": stream(b"data: \xff\xfe\n\n"),
    "choices null": stream(f"data: {json.dumps(EVENT | {'choices': None})}\n\n".encode()),
    "cut": sends(http(event(), content_type="text/event-stream", content_length="99999")),
    "endless events": endless(OPEN, event() * 200), "endless comments": endless(OPEN, b": x\n\n" * 10_000),
    "an endless line": endless(OPEN, b"data: " + b"x" * 65536), "drips": endless(OPEN, event(), 0.2),
}  # fmt: skip

# Those that a later try cures.
PASSING = {
    name: ODD[name]
    for name in ("hangs up", "resets", "cut", "cut headers", "chunk cut", "408", "409", "429", "500", "503")
}


@dataclass
class OddServer:
    """Asked for models, it has "m". `answers` are taken in turn by what asks for text, the last one for good."""

    answers: list[Write] = field(default_factory=list)
    other: int = 0  # the port of a server that nobody may be sent to
    closed: threading.Event = field(default_factory=threading.Event)
    requests: list[bytes] = field(default_factory=list)

    def __post_init__(self):
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.port = self._socket.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                threading.Thread(target=self._serve, args=(self._socket.accept()[0],), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        with contextlib.suppress(OSError), connection:
            request = self._request(connection)
            self.requests.append(request)
            if request.startswith(b"GET /v1/models"):
                connection.sendall(http(json.dumps(MODELS).encode()))
            elif request:
                write = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
                write(self, connection)

    def _request(self, connection: socket.socket) -> bytes:
        data = b""
        while b"\r\n\r\n" not in data:
            if not (more := connection.recv(65536)):
                return data
            data += more
        head, _, body = data.partition(b"\r\n\r\n")
        sizes = [line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")]
        size = int(sizes[0].split(b":")[1]) if sizes else 0
        while len(body) < size and (more := connection.recv(65536)):
            body += more
        return head + b"\r\n\r\n" + body

    def close(self) -> None:
        self.closed.set()
        self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()


@contextlib.contextmanager
def odd_server(*answers: Write, other: int = 0) -> Iterator[OddServer]:
    server = OddServer(list(answers), other)
    try:
        yield server
    finally:
        server.close()


def mutated_answers(random: Random, count: int) -> Iterator[tuple[str, Write]]:
    """(name, answer): whole answers of a sound server with values changed, bytes damaged. Some stay usable."""
    for number in range(count):
        body = json.dumps(mutated_json(GOOD, random)).encode("utf-8", "backslashreplace")
        whole = http(mutated_bytes(body, random) if number % 3 == 1 else body)
        yield f"mutation {number}", sends(mutated_bytes(whole, random) if number % 3 == 2 else whole)
