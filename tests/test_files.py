"""One way to write: what is there is whole, whatever ends the writer, and the machine's refusals are one sentence."""

import errno
import os
import signal
import subprocess
import sys

import pytest

from steerjax.errors import WriteError
from steerjax.files import cannot_write, whole_file, whole_folder, write_text

# Writes half of a file or a folder, says so, and waits to be killed.
HALF = """
import sys, time
from pathlib import Path
from steerjax.files import whole_file, whole_folder
kind, path = sys.argv[1:]
with (whole_file if kind == "file" else whole_folder)(path) as opened:
    file = opened if kind == "file" else (opened / "a").open("w")
    file.write("half")
    file.flush()
    print("half", flush=True)
    time.sleep(60)
"""


def names(folder):
    return sorted(entry.name for entry in folder.iterdir())


def content(path):
    return (path / "a" if path.is_dir() else path).read_text()


def write(kind, path, text):
    if kind == "file":
        return write_text(path, text)
    with whole_folder(path) as folder:
        (folder / "a").write_text(text)


@pytest.mark.parametrize("kind", ["file", "folder"])
@pytest.mark.parametrize("name", ["plain", "[a]*?% 'ü\n", "x" * 250])
def test_written_whole_in_place_of_what_was_there(tmp_path, kind, name):
    path = tmp_path / "above" / name
    for text in ("one", "another"):
        write(kind, path, text)
        assert (names(path.parent), content(path)) == ([name], text)


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_an_error_leaves_what_was_there(tmp_path, kind):
    path = tmp_path / "it"
    write(kind, path, "old")
    with pytest.raises(ZeroDivisionError), (whole_file if kind == "file" else whole_folder)(path):
        raise ZeroDivisionError
    assert (names(tmp_path), content(path)) == (["it"], "old")


@pytest.mark.parametrize(("kind", "number"), [("file", signal.SIGKILL), ("folder", signal.SIGINT)])
def test_a_killed_writer_leaves_what_was_there_and_the_next_one_removes_its_part(tmp_path, kind, number):
    path = tmp_path / "[it]"
    write(kind, path, "old")
    run = subprocess.Popen([sys.executable, "-c", HALF, kind, str(path)], stdout=subprocess.PIPE, text=True)
    assert run.stdout.readline() == "half\n"
    assert len(names(tmp_path)) == 2
    write(kind, path, "new")  # a writer that lives keeps its part
    assert (len(names(tmp_path)), content(path)) == (2, "new")
    run.send_signal(number)
    run.wait(30)
    assert content(path) == "new"
    write(kind, path, "newer")
    assert (names(tmp_path), content(path)) == (["[it]"], "newer")


def test_a_link_stays_one_and_a_device_a_device(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "far" / "file")
    write_text(tmp_path / "link", "text")
    assert ((tmp_path / "link").is_symlink(), (tmp_path / "far" / "file").read_text()) == (True, "text")
    write_text("/dev/null", "text")
    assert not os.path.isfile("/dev/null")


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_refusals_of_the_machine_are_one_sentence_with_a_cure(tmp_path, kind):
    (tmp_path / "in_the_way").write_text("")
    with pytest.raises(WriteError, match=r"in_the_way/it' cannot be written: .*\n  cure: move the file away"):
        write(kind, tmp_path / "in_the_way" / "it", "text")
    with pytest.raises(WriteError, match=r"cannot be written: File name too long.*\n  cure: a shorter name"):
        write(kind, tmp_path / ("x" * 256), "text")
    with pytest.raises(WriteError, match=r"'out' cannot be written: No space left on device\n  cure: free"):  # noqa: SIM117
        with cannot_write("out"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
