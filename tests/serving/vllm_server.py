"""vLLM as users start it, in an environment of its own: STEERJAX_VLLM is the path of its python."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

START = 420  # seconds; 40 to 60 on two idle cores


def python() -> str:
    return os.environ.get("STEERJAX_VLLM") or pytest.skip("STEERJAX_VLLM names no python with vLLM")


def environment(cache: Path) -> dict[str, str]:
    """Offline, with a small key-value cache; nothing of it changes what is computed."""
    kept = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    return kept | {
        "HF_HUB_OFFLINE": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",  # GB
        "VLLM_CACHE_ROOT": str(cache),
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # LLM() in a script wants it; a server takes no notice
    }


@dataclass(frozen=True)
class Server:
    """A running server of one model."""

    url: str

    def post(self, path: str, **body) -> dict:
        data = json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=300) as response:
            return json.load(response)

    def refusal(self, path: str, **body) -> str:
        """The message of a 400."""
        with pytest.raises(urllib.error.HTTPError) as error:
            self.post(path, **body)
        assert error.value.code == 400
        return json.load(error.value)["error"]["message"]


@contextlib.contextmanager
def serving(model: Path, cache: Path, *options: str) -> Iterator[Server]:
    """The model behind HTTP, as `vllm serve MODEL --dtype float32 OPTIONS` does it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [python(), "-m", "vllm.entrypoints.openai.api_server", "--model", str(model), "--dtype", "float32"]
    command += ["--host", "127.0.0.1", "--port", str(port), *options]
    log = cache / f"{model.name}.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, env=environment(cache), stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        url = f"http://127.0.0.1:{port}"
        wait(url + "/health", process, log)
        yield Server(url)
    finally:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(60)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # its engine is a process of its own


def wait(url: str, process: subprocess.Popen, log: Path) -> None:
    end = time.monotonic() + START
    while process.poll() is None and time.monotonic() < end:
        with contextlib.suppress(OSError):
            urllib.request.urlopen(url, timeout=5).close()
            return
        time.sleep(1)
    pytest.fail(f"no server after {START} s, or it ended:\n" + "\n".join(log.read_text().splitlines()[-40:]))
