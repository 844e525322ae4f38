"""Commands that write long outputs, sent a signal at random moments: the status that is promised, no traceback, nothing
half left behind, and the same command goes on to the same output."""

import os
import random
import signal
import subprocess
import sys

import pytest

from tests.interrupts import with_ctrl_c
from tests.reward_models import chat_folder, reward_folder, some_conversations, write_rows

ENDED = {signal.SIGINT: (130, -signal.SIGINT), signal.SIGTERM: (143, -signal.SIGTERM)}


@pytest.fixture(scope="module")
def commands(tmp_path_factory):
    folder = tmp_path_factory.mktemp("interrupted")
    reward, chat = reward_folder(folder / "reward"), chat_folder(folder / "chat")
    rows = write_rows(folder / "rows.jsonl", some_conversations(60, longest=30))
    asked = write_rows(folder / "asked.jsonl", [{"prompt": f"Why {i}?"} for i in range(40)])
    template = ("--template", "extra_id")
    return {
        "annotate": ("annotate", "--model", reward, *template, "--input", rows, "--chunk-rows", 1),
        "generate": (
            "generate", "--model", chat, *template, "--input", asked, "--max-new-tokens", 8, "--schema", "helpsteer",
            "--batch-size", 2,
        ),
        "export": ("export", "--checkpoint", chat, *template),
        "prepare": ("prepare", "helpsteer", "--input", "embedded:helpsteer2"),
    }  # fmt: skip


def run(words, output, repository, number=None, pause=0.0) -> tuple[int, str]:
    command = [sys.executable, "-m", "steerjax", *map(str, words), "--output", str(output)]
    environment = os.environ | {"PYTHONPATH": str(repository), "JAX_PLATFORMS": "cpu"}
    process = subprocess.Popen(
        with_ctrl_c(command), env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        return process.wait(timeout=pause if number else 300), process.stdout.read()
    except subprocess.TimeoutExpired:
        process.send_signal(number)
        return process.wait(timeout=60), process.stdout.read()
    finally:
        process.kill()


def content(output):
    """Of a file or of a folder's files, but for where they lie."""
    files = [output] if output.is_file() else sorted(path for path in output.rglob("*") if path.is_file())
    return {path.name: path.read_bytes() for path in files if path.suffix not in (".md",)}


@pytest.mark.faults
@pytest.mark.parametrize("name", ["annotate", "generate", "export", "prepare"])
def test_an_interrupted_command_goes_on_to_the_same_output(name, commands, tmp_path, repository, tried):
    words, draw = commands[name], random.Random(name)
    whole = tmp_path / "whole" / ("out" if name == "export" else "out.jsonl")
    again = tmp_path / "again" / whole.name
    begun = os.times().elapsed
    assert run(words, whole, repository)[0] == 0
    seconds = os.times().elapsed - begun
    for _ in range(6):
        number = draw.choice(list(ENDED))
        status, said = run(words, again, repository, number, draw.uniform(0.1, seconds))
        tried("command interrupted", name)
        if name == "export" and "is there already" in said:  # the last signal came when it was done
            status = 0
        if status == 0:
            break
        assert status in ENDED[number], said
        assert "Traceback" not in said or "steerjax/" not in said, said  # Python's own start is not ours
        assert not [path for path in tmp_path.rglob("*") if "partial-" in path.name]
    if status:
        assert run(words, again, repository)[0] == 0
    assert content(again) == content(whole)
