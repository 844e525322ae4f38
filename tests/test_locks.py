"""One writer at a time, whoever starts when; a lock goes with its owner."""

import os
import signal
import socket
import subprocess
import sys

import pytest

from steerjax import locks
from steerjax.errors import LockedError
from steerjax.locks import only_writer
from tests.refusals import refused

# Writes while nobody else does, so many times; says how often it was refused.
WRITER = """
import sys, time
from pathlib import Path
from steerjax.errors import LockedError
from steerjax.locks import only_writer
output, done, refused = Path(sys.argv[1]), 0, 0
while done < 15:
    try:
        with only_writer(output):
            with output.open("a") as file:
                file.write("begin\\n"); file.flush(); time.sleep(0.002); file.write("end\\n")
        done += 1
    except LockedError as error:
        assert "process" in str(error), error
        refused += 1
        time.sleep(0.001)
print(refused)
"""
HOLDER = """
import sys, time
from pathlib import Path
from steerjax.locks import only_writer
with only_writer(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def start(code, path):
    return subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE, text=True)


def test_processes_that_start_at_once_write_one_after_the_other(tmp_path):
    output = tmp_path / "it"
    writers = [start(WRITER, output) for _ in range(4)]
    said = [writer.communicate(timeout=120)[0] for writer in writers]
    assert [writer.returncode for writer in writers] == [0] * 4
    assert sum(map(int, said)) > 0
    assert output.read_text() == "begin\nend\n" * 60
    assert [entry.name for entry in tmp_path.iterdir()] == ["it"]


def test_the_owner_is_named_and_frees_the_lock_when_it_is_killed(tmp_path):
    output = tmp_path / "it"
    owner = start(HOLDER, output)
    assert owner.stdout.readline() == "held\n"
    with refused(LockedError, str(output), f"process {owner.pid}", socket.gethostname(), cure="wait"):  # noqa: SIM117
        with only_writer(output):
            pass
    owner.send_signal(signal.SIGKILL)
    owner.wait()
    with only_writer(output):
        pass


@pytest.mark.parametrize(
    ("owner", "free"),
    [
        ("", True),
        (f"process 999999999 on {socket.gethostname()}", True),
        (f"process {os.getppid()} on {socket.gethostname()}", False),
        ("process 1 on elsewhere", False),
    ],
)
def test_without_locks_the_owners_name_decides(tmp_path, monkeypatch, capsys, owner, free):
    def none(*_):
        raise OSError(95, "not supported")

    monkeypatch.setattr(locks.fcntl, "flock", none)
    (tmp_path / ".it.lock").write_text(owner)
    if free:
        with only_writer(tmp_path / "it"):
            assert f"process {os.getpid()}" in (tmp_path / ".it.lock").read_text()
    else:
        with refused(LockedError, owner, cure=f"{tmp_path}/.it.lock"), only_writer(tmp_path / "it"):
            pass
    assert "no locks" in capsys.readouterr().err
