"""README.md, followed from top to bottom in one folder, as its reader has it: a clone with an environment of its own.

    STEERJAX_SLOW=1 STEERJAX_SMOLLM2=FOLDER python -m pytest -m readme tests/readme

Every block runs as it stands, in one shell. What differs from a reader's run is here:

* MAX_STEPS in the environment shortens training and MAX_NEW_TOKENS answers. With MAX_STEPS, SmolLM2 is a narrow model
  with its layers and tokenizer and random weights. MAX_STEPS=0 MAX_NEW_TOKENS=0 is the README at its own length.
* The hub is a cache folder with that model; pip's downloads are the packages of the environment that runs the tests.
* The test command is left to `.ci/run`; the server's blocks run where STEERJAX_VLLM names a python with vLLM.
"""

import contextlib
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import tomllib
from dataclasses import dataclass
from pathlib import Path

import pytest
from safetensors.numpy import save_file

from tests.hf_folders import random_tensors
from tests.serving.vllm_server import environment, python, wait

MAX_STEPS = int(os.environ.get("MAX_STEPS", "2"))
MAX_NEW_TOKENS = int(os.environ.get("MAX_NEW_TOKENS", "8"))
SMOLLM2 = os.environ.get("STEERJAX_SMOLLM2")
HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
MISSING = "" if os.environ.get("STEERJAX_SLOW") else "takes minutes; STEERJAX_SLOW=1 runs it"
if not MISSING and not SMOLLM2:
    MISSING = "STEERJAX_SMOLLM2 names no folder (shared/tools/get_smollm2.py makes one)"
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
TEST_COMMAND = "<!-- test command -->\n"
NARROW = {
    "hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 2, "num_key_value_heads": 1,
    "head_dim": 64, "torch_dtype": "float32",
}  # fmt: skip
# Short, without leaving out what makes or reads a file.
SHORTER = (
    f"--config.train.steps={MAX_STEPS} --config.train.evaluate_every=0 --config.train.checkpoint_every=0 "
    "--config.optimizer.warmup_steps=0 --config.batch.rows=1 --config.batch.micro_batches=1"
)


@dataclass(frozen=True)
class Block:
    """A fenced block: the line of the README that it begins on, its language, its text."""

    line: int
    language: str
    text: str

    @property
    def file(self) -> str | None:
        """`mine.py` where a Python block begins with `# mine.py`: the reader saves it under that name."""
        named = re.match(r"# (\S+\.py)\n", self.text)
        return named[1] if named else None

    @property
    def server(self) -> bool:
        """A block that starts a server, or asks it."""
        return "vllm.entrypoints" in self.text or "localhost:" in self.text

    def script(self) -> str:
        """What a shell does with it."""
        if self.language == "python":
            into = f"cat > {shlex.quote(self.file)}" if self.file else "python -"
            return f"{into} <<'END_OF_BLOCK'\n{shorter(self.text)}END_OF_BLOCK\n"
        return shorter(self.text)


def shorter(text: str) -> str:
    """The same commands with less training and shorter answers."""
    if MAX_STEPS:
        text = re.sub(r"\bsteerjax train +--config \S+", lambda found: f"{found[0]} {SHORTER}", text)
        text = re.sub(r"train\.steps = \d+", f"train.steps = {MAX_STEPS}; config.optimizer.warmup_steps = 0", text)
    if MAX_NEW_TOKENS:
        text = re.sub(r"\bsteerjax generate\b", lambda found: f"{found[0]} --max-new-tokens {MAX_NEW_TOKENS}", text)
        text = re.sub(r"(\.generate\(.*)\)\)$", rf"\1, max_new_tokens={MAX_NEW_TOKENS}))", text, flags=re.MULTILINE)
        text = text.replace('"chat_template_kwargs"', f'"max_tokens": {MAX_NEW_TOKENS}, "chat_template_kwargs"')
    return text


def blocks(readme: str) -> list[Block]:
    """All that a reader types, in order, without the test command."""
    found = []
    for match in FENCE.finditer(readme):
        line = readme.count("\n", 0, match.start()) + 1
        if match[1] != "text" and not readme[: match.start()].endswith(TEST_COMMAND):
            found.append(Block(line, match[1], match[2]))
    return found


def outputs(typed: list[Block]) -> list[str]:
    """Every file or folder that a command is told to write."""
    text = "\n".join(block.text for block in typed)
    return re.findall(r"(?:--workdir[ =]|--output[ =]|workdir=\"|cat > )([\w./-]+)", text)


@pytest.fixture(scope="module")
def typed(repository) -> list[Block]:
    return blocks((repository / "README.md").read_text(encoding="utf-8"))


@pytest.mark.short
def test_every_block_can_be_followed(repository, typed):
    """Nothing is fenced that is neither output (text) nor run (sh, python); no two commands write one place."""
    assert {block.language for block in typed} == {"sh", "python"}
    assert TEST_COMMAND in (repository / "README.md").read_text(encoding="utf-8")
    written = outputs(typed)
    assert len(written) > 5
    assert sorted(set(written)) == sorted(written)


@pytest.mark.short
def test_every_extra_is_named(repository):
    extras = tomllib.loads((repository / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    readme = (repository / "README.md").read_text(encoding="utf-8")
    rows = "\n".join(line for line in readme.splitlines() if line.startswith("|"))
    assert [name for name in extras if f"`{name}`" not in rows and f"[{name}]" not in rows] == []


def hub_cache(folder: Path) -> Path:
    """What the hub would have left: a cache with SmolLM2 in it, narrow where training is short."""
    model = folder / "hub" / f"models--{HUB_ID.replace('/', '--')}"
    (model / "refs").mkdir(parents=True)
    (model / "refs" / "main").write_text("0" * 40)
    snapshot = model / "snapshots" / ("0" * 40)
    shutil.copytree(SMOLLM2, snapshot)
    if MAX_STEPS:
        config = json.loads((snapshot / "config.json").read_text()) | NARROW
        tensors = {name: (0.02 * value).astype(value.dtype) for name, value in random_tensors(config).items()}
        save_file(tensors, snapshot / "model.safetensors")
        (snapshot / "config.json").write_text(json.dumps(config))
    return folder


def reader(folder: Path) -> dict[str, str]:
    """A reader's environment: nothing of ours is on the path but the packages that pip would have fetched."""
    foreign = ("STEERJAX_", "PYTEST", "JAX_", "VIRTUAL_ENV")
    kept = {key: value for key, value in os.environ.items() if not key.startswith(foreign)}
    return kept | {
        "PYTHONPATH": sysconfig.get_path("purelib"),
        "PIP_NO_DEPS": "1",
        "PIP_NO_BUILD_ISOLATION": "0",  # pip reads this one the wrong way round: 0 is no isolation
        "PIP_DISABLE_PIP_VERSION_CHECK": "1",
        "HF_HOME": str(hub_cache(folder / "huggingface")),
        "HF_HUB_OFFLINE": "1",
        "JAX_PLATFORMS": "cpu",
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("readme")


def follow(typed: list[Block], folder: Path, env: dict[str, str]) -> None:
    """Runs all blocks in one shell. Fails with the line of README.md at whose block it ended, and what that printed."""
    lines = ["set -euo pipefail"]
    for block in typed:
        lines += [f"echo '== README.md:{block.line} at' $SECONDS s", block.script().rstrip()]
    log = folder / "followed.log"
    with log.open("w") as output:
        done = subprocess.run(
            ["bash", "-c", "\n".join([*lines, "echo '== followed in' $SECONDS s"])],
            cwd=folder, env=env, stdout=output, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
        )  # fmt: skip
    said = log.read_text(errors="replace")
    print(said)
    if done.returncode:
        pytest.fail("== README.md" + said.split("== README.md")[-1][-3000:], pytrace=False)


@pytest.mark.short
@pytest.mark.parametrize(
    ("bad", "fact"),
    [
        (Block(7, "sh", "test -d made\ncat nowhere.jsonl | head\n"), "nowhere.jsonl"),
        (Block(7, "sh", "cat > made/rows.jsonl <<'END'\n{}\nEND\nmkdir made\n"), "made"),
        (Block(7, "python", "print(open('nowhere.py').read())\n"), "nowhere.py"),
        (Block(7, "sh", 'cd made\necho "$nowhere"\n'), "nowhere"),
    ],
)
def test_what_cannot_be_followed_is_named(tmp_path, bad, fact):
    """A missing file, a place that is taken, a failing Python block, a variable that nobody set."""
    typed = [Block(2, "sh", "mkdir made\n"), bad, Block(12, "sh", "echo never\n")]
    with pytest.raises(pytest.fail.Exception) as error:
        follow(typed, tmp_path, dict(os.environ))
    said = str(error.value)
    assert said.startswith("== README.md:7 ")
    assert fact in said
    assert "never" not in said


@pytest.mark.short
def test_two_commands_in_one_place_are_seen():
    text = "steerjax train --config rm --workdir runs/a\nsteerjax export --checkpoint runs/a --output runs/a\n"
    assert outputs([Block(1, "sh", text)]) == ["runs/a", "runs/a"]


@pytest.mark.readme
@pytest.mark.skipif(bool(MISSING), reason=MISSING)
def test_a_reader_follows_the_readme(repository, typed, folder):
    """The blocks as they stand. The clone is of what is committed."""
    first, *rest = [block for block in typed if not block.server]
    assert "git clone URL" in first.text
    clone = Block(first.line, first.language, first.text.replace("URL", shlex.quote(str(repository))))
    follow([clone, *rest], folder, reader(folder))
    made = folder / "steerjax"
    assert [name for name in outputs(typed) if not (made / name).exists()] == []
    assert (made / "runs/rm/report/report.md").is_file()


@pytest.mark.readme
@pytest.mark.skipif(bool(MISSING), reason=MISSING)
def test_a_reader_serves_the_model(typed, folder):
    """The server's blocks, after the test above made what they serve."""
    start, ask = [block for block in typed if block.server]
    made, scripts = folder / "steerjax", Path(python()).parent
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    env = environment(folder / "vllm")
    env |= {"PATH": f"{scripts}:{env['PATH']}"}
    log = folder / "server.log"
    with log.open("w") as output:
        server = subprocess.Popen(
            ["bash", "-c", f"exec {start.text.strip()} --host 127.0.0.1 --port {port}"],
            cwd=made, env=env, stdout=output, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
    try:
        wait(f"http://127.0.0.1:{port}/health", server, log)
        command = ask.script().replace("localhost:8000", f"127.0.0.1:{port}")
        answer = json.loads(subprocess.check_output(["bash", "-c", command], cwd=made))
        assert answer["choices"][0]["message"]["content"]
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGTERM)
        server.wait(60)
