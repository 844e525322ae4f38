"""The server client against odd servers: each ends in one sentence of ours, soon, in bounded memory."""

import asyncio
import collections
import json
import os
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random

import pytest

from steerjax import generate
from steerjax.data.conversation import Conversation, Turn
from steerjax.errors import ConfigError, ModelError
from steerjax.inference.server import LARGEST, Server
from steerjax.inference.steering import Sampling
from steerjax.schema import HELPSTEER
from tests.faults.odd_servers import (
    GOOD,
    ODD,
    ODD_STREAMS,
    PASSING,
    endless,
    http,
    mutated_answers,
    odd_server,
    redirect,
    sends,
)
from tests.refusals import refused, says

ASKED = Conversation((Turn("user", "a secret question"),))
KEY = "sk-made-up-0123456789"
SOUND = sends(http(json.dumps(GOOD).encode()))


@pytest.fixture(autouse=True)
def key(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)


def client(server, attempts=1, timeout=1.0, **options):
    return Server(server.url, "m", HELPSTEER, Sampling(), attempts=attempts, timeout=timeout, **options)


def asked(write, other=0, streamed=False):
    """What one answer ends in: an error of ours, or an answer's text. Any other error goes through."""
    with odd_server(write, other=other) as server:
        backend, started = client(server), time.monotonic()
        request = backend.prepare(ASKED, [{}], 1)
        try:
            found = list(backend.stream(request))[-1] if streamed else next(backend.run([request]))[0]
        except ModelError as error:
            found = error
        if isinstance(found, ModelError):
            says(found, server.url)
            assert KEY not in str(found)
            assert len(str(found)) < 2000
        return found, time.monotonic() - started


def memory(field: str) -> int:
    """Bytes, of this process: VmRSS, or VmHWM, the most so far."""
    return 1024 * int(re.search(rf"{field}:\s+(\d+)", Path("/proc/self/status").read_text())[1])


def test_each_odd_answer_is_an_error_of_that_request(tried):
    Path("/proc/self/clear_refs").write_text("5")  # the most so far begins anew
    before = memory("VmRSS")
    every = [(name, write, False) for name, write in ODD.items()]
    every += [(name, write, True) for name, write in ODD_STREAMS.items()]
    with odd_server(SOUND) as trap, ThreadPoolExecutor(16) as pool:
        found = list(pool.map(lambda one: asked(one[1], trap.port, one[2]), every))
        assert not trap.requests  # no redirect is followed to another server
    results = list(zip(every, found, strict=True))
    assert [name for (name, _, _), (outcome, _) in results if not isinstance(outcome, ModelError)] == []
    assert [name for (name, _, _), (_, seconds) in results if seconds > 10] == []
    assert memory("VmHWM") - before < (200 << 20) + 10 * LARGEST
    tried("server answer", "odd: refused", len(every))


@pytest.mark.parametrize("name", PASSING)
def test_what_passes_is_tried_again(monkeypatch, name, capfd):
    monkeypatch.setattr("anyio.sleep", lambda _: asyncio.sleep(0))
    with odd_server(PASSING[name], PASSING[name], SOUND) as server:
        backend = client(server, attempts=3)
        assert next(backend.run([backend.prepare(ASKED, [{}], 1)]))[0].text == "x"
        assert len(server.requests) == 3
    assert "try 2 of 3" in capfd.readouterr().err


def test_a_pause_is_as_long_as_the_server_says(monkeypatch):
    pauses = []
    monkeypatch.setattr("anyio.sleep", lambda pause: asyncio.sleep(0, pauses.append(pause)))
    with odd_server(sends(http(b"", "429 X", retry_after="37")), SOUND) as server:
        backend = client(server, attempts=2)
        next(backend.run([backend.prepare(ASKED, [{}], 1)]))
    assert pauses == [37]


def test_a_redirect_within_the_server_is_followed():
    with odd_server(redirect("307", "/v1/chat/elsewhere"), SOUND) as server:
        backend = client(server)
        assert next(backend.run([backend.prepare(ASKED, [{}], 1)]))[0].text == "x"
        assert KEY.encode() in server.requests[1]


def test_a_key_that_the_server_says_is_not_repeated():
    said = {"error": {"message": f"Incorrect API key provided: {KEY}"}}
    for status, body in (("401 X", json.dumps(said)), ("200 OK", f'{{"id": "{KEY}"}}')):
        with odd_server(sends(http(body.encode(), status))) as server:
            backend = client(server)
            with refused(ModelError, "OPENAI_API_KEY") as _:
                list(backend.run([backend.prepare(ASKED, [{}], 1)]))
    with refused(ConfigError, cure="OPENAI_API_KEY"):
        Server("http://me:hidden@localhost:1", "m", HELPSTEER)


def test_the_answers_before_a_failure_are_kept(tmp_path):
    rows, out = tmp_path / "rows.jsonl", tmp_path / "out.jsonl"
    rows.write_text("".join(f'{{"prompt": "q{n}"}}\n' for n in range(5)))
    with odd_server(SOUND, SOUND, SOUND, ODD["content number"], SOUND) as server:
        words = ["--server", server.url, "--input", str(rows), "--output", str(out), "--batch-size", "1"]
        with pytest.raises(SystemExit):
            generate.main(words)
        partial = tmp_path / "out.jsonl.partial"
        assert len(partial.read_text().splitlines()) == 3
        generate.main(words)
        assert [json.loads(line)["id"] for line in out.read_text().splitlines()] == [f"{rows}:{n}" for n in range(1, 6)]
        assert KEY not in "".join(path.read_text() for path in tmp_path.iterdir())
        asked = [request.rpartition(b'"content":')[2][:4] for request in server.requests if b"POST" in request]
        assert asked[:4] == [b'"q0"', b'"q1"', b'"q2"', b'"q3"']
        assert asked[-2:] == [b'"q3"', b'"q4"']


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_ends_it_at_once(tmp_path, number):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "q"}\n' * 3)
    with odd_server(ODD["silence"]) as server:
        words = ["--server", server.url, "--input", rows, "--output", tmp_path / "out.jsonl"]
        process = subprocess.Popen([sys.executable, "-m", "steerjax", "generate", *map(str, words)], stderr=-1)
        while not any(request.startswith(b"POST") for request in server.requests):
            time.sleep(0.05)
            assert process.poll() is None
        started = time.monotonic()
        process.send_signal(number)
        said = process.communicate(timeout=10)[1].decode()
        assert time.monotonic() - started < 8  # of the 600 that it would wait
    assert process.returncode != 0
    assert "Traceback" not in said


def test_where_the_key_goes_is_said():
    for command in ("generate", "play"):
        words = [sys.executable, "-m", "steerjax", command, "--help"]
        said = subprocess.run(words, capture_output=True, text=True, env=os.environ | {"COLUMNS": "300"}).stdout
        assert "OPENAI_API_KEY" in said
        assert KEY not in said


@pytest.mark.faults
def test_mutated_answers(tried):
    """1,000 of them, seeded."""
    outcomes, longest = collections.Counter(), 0.0
    Path("/proc/self/clear_refs").write_text("5")
    before = memory("VmRSS")
    with ThreadPoolExecutor(8) as pool:
        for found, seconds in pool.map(lambda one: asked(one[1]), list(mutated_answers(Random(16), 1000))):
            outcomes[type(found).__name__] += 1
            longest = max(longest, seconds)
    for outcome, count in outcomes.items():
        tried("server answer", f"mutated: {outcome}", count)
    assert outcomes.keys() <= {"Answer", "ModelError", "RefusedRequest"}
    assert longest < 10
    assert memory("VmHWM") - before < (200 << 20) + 10 * LARGEST


@pytest.mark.faults
def test_gigabytes_are_not_kept():
    """Ten servers at a time that would send for ever."""
    before = memory("VmRSS")
    with ThreadPoolExecutor(10) as pool:
        writes = [endless(http(b"", content_length=None), b"[" * (1 << 20))] * 40
        assert all(isinstance(found, ModelError) for found, _ in pool.map(asked, writes))
    assert memory("VmRSS") - before < 200 << 20
