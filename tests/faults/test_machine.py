"""What the machine refuses: no space, no right, too many files, a file where a folder belongs. One sentence, status 2,
nothing earlier is lost, and the same command goes on when the cause is gone.

The 20 sizes of full disk: STEERJAX_SLOW=1 python -m pytest tests/faults/test_machine.py
"""

import contextlib
import errno
import json
import os
import resource
import shutil
import subprocess
import sys

import pytest

from steerjax import annotate, export, generate, merge, prepare
from steerjax.collect import main as collect
from steerjax.errors import machine_refusal
from steerjax.training.trackers import Trackers
from steerjax.training.train import train
from tests.faults.full_disk import experiment, same, saved, status_of
from tests.refusals import says
from tests.reward_models import chat_folder, reward_folder, some_conversations, write_rows

pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # "Event loop is closed"
faults = pytest.mark.faults
SIZES = (
    0,
    16,
    40,
    80,
    300,
    500,
    700,
    900,
    1000,
    1100,
    1200,
    1300,
    1400,
    1500,
    1600,
    1700,
    1900,
    2100,
    2400,
    2700,
)  # KiB


@contextlib.contextmanager
def limit(kind: int, most: int):
    """No file grows past so many bytes (RLIMIT_FSIZE), or no more files are open (RLIMIT_NOFILE), in this process."""
    before = resource.getrlimit(kind)
    resource.setrlimit(kind, (most, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(kind, before)


def one_sentence(said: str) -> None:
    """What and a cure, no more."""
    errors = [line for line in said.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, said
    assert "Traceback" not in said
    says(said)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    train(experiment(folder), folder / "run")
    return folder / "run"


@pytest.mark.slow
@pytest.mark.parametrize("most", [300, *(pytest.param(most, marks=faults) for most in (30_000, 200_000, 700_000))])
def test_a_run_whose_files_may_not_grow(tmp_path, whole, most):
    """Of the first kilobyte on: the config, the tokenizer, an array of the checkpoint, a later one."""
    run = experiment(whole.parent)
    with limit(resource.RLIMIT_FSIZE, most):
        status, said, seconds = status_of(train, run, tmp_path / "run")
    if most == 700_000:  # enough for all
        assert status == 0, said
    else:
        assert status == 2
        one_sentence(said)
        assert seconds < 60
        saved(tmp_path / "run")
        assert status_of(train, run, tmp_path / "run")[:2] == (0, "")
    assert same(tmp_path / "run", whole)


@pytest.mark.slow
def test_an_earlier_checkpoint_outlives_a_full_disk(tmp_path, whole):
    """Two are there; the third cannot be written."""
    half, run = experiment(whole.parent, steps=4), experiment(whole.parent)
    train(half, tmp_path / "run")
    with limit(resource.RLIMIT_FSIZE, 20_000):
        status, said, _ = status_of(train, run, tmp_path / "run")
    assert status == 2
    one_sentence(said)
    assert saved(tmp_path / "run") == [2, 4]
    assert status_of(train, run, tmp_path / "run")[0] == 0
    assert same(tmp_path / "run", whole)


def test_a_tracker_without_space_costs_itself_only(tmp_path, capsys):
    """tensorboardX's own thread would die of it, and the run would wait for it for ever."""
    trackers = Trackers(("tensorboard",), tmp_path, 0, {})
    with limit(resource.RLIMIT_FSIZE, 500):
        for step in range(1, 30):  # more than its queue holds
            trackers.log(step, "train", {"loss": 1.0})
    trackers.close(failed=False)
    assert "tensorboard failed" in capsys.readouterr().out


@pytest.fixture(scope="module")
def commands(tmp_path_factory):
    """Name -> a function of the output that calls a command."""
    folder = tmp_path_factory.mktemp("commands")
    reward, chat = reward_folder(folder / "reward"), chat_folder(folder / "chat")
    rows = write_rows(folder / "rows.jsonl", some_conversations(4, longest=8))
    rated = write_rows(folder / "rated.jsonl", [{"prompt": "Q?", "response": "a", "helpfulness": 1}])
    asked = write_rows(folder / "asked.jsonl", [{"prompt": "Why?"}])
    answers = [{"prompt": "Why?", "response": text} for text in ("a", "b")]
    given = write_rows(folder / "answers.jsonl", answers)
    template = ("--template", "extra_id")
    found = {
        "annotate": (annotate.main, "out.jsonl", "--model", reward, *template, "--input", rows),
        "generate": (
            generate.main, "out.jsonl", "--model", chat, *template, "--input", asked, "--max-new-tokens", 2,
            "--schema", "helpsteer",
        ),
        "export": (export.main, "out", "--checkpoint", chat, *template),
        "merge": (merge.main, "out", chat, chat, *template),
        "collect": (collect, "out", "tasks", "--answers", given),
        "prepare": (prepare.main, "out.jsonl", "helpsteer", "--input", rated),
    }  # fmt: skip
    return {
        name: (output, lambda path, main=main, words=words: main([*map(str, words), "--output", str(path)]))
        for name, (main, output, *words) in found.items()
    }


NAMES = ("annotate", "generate", "export", "merge", "collect", "prepare")


def what_is_left(folder) -> list[str]:
    return sorted(path.name for path in folder.rglob("*") if "partial-" in path.name)


@pytest.mark.parametrize("name", NAMES)
def test_a_command_whose_output_cannot_be_written(name, commands, tmp_path, tried):
    """A file may not grow; a file lies where the folder belongs; a folder where a file. Then it works."""
    output, command = commands[name]
    with limit(resource.RLIMIT_FSIZE, 20):
        status, said, seconds = status_of(command, tmp_path / output)
    assert status == 2, said
    one_sentence(said)
    assert seconds < 60
    assert not what_is_left(tmp_path)
    (tmp_path / "file").write_text("mine")
    status, said, _ = status_of(command, tmp_path / "file" / output)
    assert status == 2
    one_sentence(said)
    assert (tmp_path / "file").read_text() == "mine"
    assert status_of(command, tmp_path / output)[0] == 0
    assert not what_is_left(tmp_path)
    tried("output refused", name, 2)


@pytest.mark.parametrize("name", [NAMES[0], *(pytest.param(name, marks=faults) for name in NAMES[1:])])
def test_a_command_that_may_open_few_files(name, commands, tmp_path, tried):
    output, command = commands[name]
    now = len(os.listdir("/proc/self/fd"))
    for more in (1, 3, 6):
        with limit(resource.RLIMIT_NOFILE, now + more):
            status, said, seconds = status_of(command, tmp_path / f"{more}{output}")
        if status:
            assert status == 2, said
            one_sentence(said)
        assert seconds < 60
        tried("output refused", "too many open files")
    assert status_of(command, tmp_path / output)[0] == 0


def test_what_is_printed_to_a_full_disk():
    """With a status, though Python writes only when it ends."""
    program = "from steerjax.errors import reported_errors\nwith reported_errors():\n    print('a figure')"
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-c", program], stdout=full, stderr=subprocess.PIPE, text=True, check=False
        )
    assert (done.returncode, "No space left on device" in done.stderr) == (2, True), done.stderr
    one_sentence(done.stderr)


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (OSError(errno.ENOSPC, "no", "file"), "No space left on device"),
        (ValueError("RESOURCE_EXHAUSTED: Error writing: No space left on device [source]"), "No space left on device"),
        (RuntimeError("I/O error: Too many open files (os error 24)"), "Too many open files"),
        (FileNotFoundError(errno.ENOENT, "no", "file"), None),  # a bug of ours, which is shown whole
        (ValueError("Permission denied"), None),
    ],
)
def test_what_the_machine_refuses_is_told_from_a_bug(error, reason):
    assert (machine_refusal(error) or (None,))[0] == reason


def mounts() -> list[str] | None:
    """The command under which a process may mount; None where there is none."""
    for command in (["unshare", "--mount"], ["unshare", "--user", "--map-root-user", "--mount"]):
        tried = [*command, "mount", "-t", "tmpfs", "tmpfs", "/mnt"]
        if shutil.which("unshare") and subprocess.run(tried, capture_output=True, check=False).returncode == 0:
            return command
    return None


@faults
def test_full_disks_of_many_sizes(tmp_path, repository, tried):
    if (alone := mounts()) is None:
        pytest.skip("nothing may be mounted here")
    command = [*alone, sys.executable, "-m", "tests.faults.full_disk", str(tmp_path), *map(str, SIZES)]
    done = subprocess.run(command, cwd=repository, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    full = [one for one in found if one["status"]]
    for one in full:
        assert one["status"] == 2, one
        one_sentence(one["said"])
        assert one["seconds"] < 60, one
    assert len(full) >= 15
    assert len({len(one["saved"]) for one in full}) > 1  # before and after the first checkpoint
    assert [(one["size"], one["again"], one["same"]) for one in found] == [(one["size"], 0, True) for one in found]
    tried("full disk", "sizes", len(found))


def test_a_read_only_folder(tmp_path, repository):
    """Root writes where it may not, so the folder is mounted so."""
    if (alone := mounts()) is None:
        pytest.skip("nothing may be mounted here")
    program = (
        "import sys; from pathlib import Path; from steerjax.errors import reported_errors\n"
        "from steerjax.training.workdir import claim_workdir; from tests.faults.full_disk import experiment, mount\n"
        "disk = Path(sys.argv[1]); (disk / 'disk').mkdir(); run = experiment(disk); mount(disk / 'disk', 'ro')\n"
        "with reported_errors(): claim_workdir(disk / 'disk' / 'run', run)"
    )
    command = [*alone, sys.executable, "-c", program, str(tmp_path)]
    done = subprocess.run(command, cwd=repository, capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    one_sentence(done.stderr)
    assert "Read-only file system" in done.stderr
