"""A resumable output: in order, never a line twice or lost, whatever the moment of the kill."""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import textwrap

import pytest

from steerjax.data.loading import Skipped
from steerjax.errors import DataError, LockedError, WriteError
from steerjax.inference.job import appended, beside, carried, resumable
from tests.refusals import refused

pytestmark = pytest.mark.short

SETTINGS = {"model": "m", "seed": 1, "attributes": ("a", "b")}
ROWS = [{"id": i, "text": "é\u2028\n" * i} for i in range(30)]


class Stopped(Exception):
    """What ends a job before its end."""


def run(path, until=30, settings=SETTINGS):
    """Writes rows up to `until`, and stops there if they are not all."""
    with contextlib.suppress(Stopped), resumable(path, settings) as output:
        begun = output.done
        for index in range(begun, until):
            output.add(index, ROWS[index : index + 1])
        if until < 30:
            raise Stopped
    return begun


def read(path):
    return [json.loads(line) for line in path.read_bytes().split(b"\n")[:-1]]


def test_rows_in_order_and_nothing_called_output_before_the_end(tmp_path):
    path = tmp_path / "new" / "out.jsonl"
    with resumable(path, SETTINGS) as output:
        for first in (0, 0, 3, 5, 10, 20):  # some of them a second time
            output.add(first, ROWS[first : first + 10])
            assert read(path.with_name("out.jsonl.partial")) == ROWS[: first + 10]
            assert not path.exists()
    assert read(path) == ROWS
    assert sorted(p.name for p in path.parent.iterdir()) == ["out.jsonl", "out.jsonl.settings.json"]


@pytest.mark.parametrize("cut", [0, 1, 5, 40])
def test_goes_on_after_a_last_line_that_is_not_whole(tmp_path, cut):
    path, partial = tmp_path / "out.jsonl", tmp_path / "out.jsonl.partial"
    assert run(path, until=12) == 0
    if cut:  # as an older steerjax left it, which recorded no checksums
        settings = path.with_name("out.jsonl.settings.json")
        settings.write_text(json.dumps({k: v for k, v in json.loads(settings.read_text()).items() if k != "written"}))
    data = partial.read_bytes()
    partial.write_bytes(data[: len(data) - cut] if cut else data + b'{"id": 12, "te')
    assert run(path) == (12 if cut == 0 else data[: len(data) - cut].count(b"\n"))
    assert read(path) == ROWS


@pytest.mark.parametrize("until", [12, 30])
def test_an_output_that_was_changed_is_refused(tmp_path, until):
    """A flipped bit, a line that was removed, doubled or added: of rows and of what was left out."""
    path = tmp_path / "out.jsonl"
    with contextlib.suppress(Stopped), resumable(path, SETTINGS) as output:
        output.skip([Skipped("in.jsonl", line, "why") for line in range(5)])
        output.add(0, ROWS[:until])
        if until < 30:
            raise Stopped
    files = [path if until == 30 else beside(path, "partial"), beside(path, "skipped.jsonl")]
    for file in files:
        whole = file.read_bytes()
        lines = whole.splitlines(keepends=True)
        flipped = bytearray(whole)
        flipped[len(whole) // 2] ^= 1
        changed = [bytes(flipped), b"".join(lines[:3] + lines[4:]), b"".join([lines[1], *lines]), b"".join(lines[:-1])]
        for content in changed:
            file.write_bytes(content)
            with refused(DataError, file.name, "checksum", cure="remove"):
                run(path)
        file.write_bytes(whole)
    assert run(path) == until
    assert read(path) == ROWS


def test_damage_to_what_is_recorded_is_refused_and_the_rows_stay(tmp_path):
    path = tmp_path / "out.jsonl"
    run(path, until=12)
    partial, settings = beside(path, "partial"), beside(path, "settings.json")
    before, said = partial.read_bytes(), settings.read_text()
    for old, new in ((f"{len(before)},", f"{len(before) - 9},"), ('"rows"', '"rowt"'), ('"written"', '"writtdn"')):
        assert said.count(old) == 1
        settings.write_text(said.replace(old, new))
        with refused(DataError, "out.jsonl"):
            run(path)
        assert partial.read_bytes() == before
    settings.write_text(said)
    assert run(path) == 12


def test_a_changed_line_of_a_file_that_is_added_to_is_refused(tmp_path):
    path = tmp_path / "judgments.jsonl"
    for row in ROWS[:3]:
        with appended(path) as (_, add):
            add(row)
    with appended(path) as (rows, _):
        assert rows == [*enumerate(ROWS[:3], start=1)]
    path.write_text(path.read_text().replace('"id": 1', '"id": 3'))
    with refused(DataError, f"{path}:2", "checksum", cure="remove"), appended(path):
        pass


def test_a_finished_output_is_left_alone(tmp_path):
    path = tmp_path / "out.jsonl"
    run(path)
    before = path.stat().st_mtime_ns
    with resumable(path, SETTINGS) as output:
        assert output.finished
        assert output.done == 30
    assert path.stat().st_mtime_ns == before


def test_other_settings_are_refused_by_name(tmp_path):
    path = tmp_path / "out.jsonl"
    run(path, until=3)
    for _ in range(2):
        with refused(DataError, str(path), "seed", "1", "2"):
            run(path, settings=SETTINGS | {"seed": 2})
        run(path)
    for broken in ("[1]", "{", None):
        settings = tmp_path / "out.jsonl.settings.json"
        settings.unlink() if broken is None else settings.write_text(broken)
        with refused(DataError, str(settings)):
            run(path)


def test_what_json_can_carry(tmp_path):
    row = {"score": float("nan"), "half": "\ud83d", "deep": [{"n": 7}]}
    assert carried(row) == {"score": None, "half": "\ud83d", "deep": [{"n": 7}]}
    with resumable(tmp_path / "out.jsonl", SETTINGS) as output:
        output.add(0, [carried(row)])
    assert read(tmp_path / "out.jsonl") == [carried(row)]
    for value in (b"x", float("inf"), {1}):
        with refused(DataError, "deep"):
            carried({"deep": [{"n": value}]})


def test_settings_alone_are_no_output(tmp_path):
    """Killed after the settings and before the first line: other settings may follow."""
    path = tmp_path / "out.jsonl"
    run(path, until=0)
    run(path, settings=SETTINGS | {"seed": 2})
    assert read(path) == ROWS


def test_refusals(tmp_path):
    path = tmp_path / "out.jsonl"
    with resumable(path, SETTINGS) as output:
        with refused(LockedError, str(path), f"process {os.getpid()} on", cure="another place"):
            run(path)
        with pytest.raises(ValueError):
            output.add(0, [{"score": float("nan")}])
    with refused(DataError, str(path) + ".gz", cure=".jsonl"):
        run(tmp_path / "out.jsonl.gz")
    (tmp_path / "file").write_text("")
    with refused(WriteError, str(tmp_path / "file" / "out.jsonl"), cure="move the file away"):
        run(tmp_path / "file" / "out.jsonl")


def test_killed_at_random_moments_the_bytes_are_the_same(tmp_path):
    program = textwrap.dedent("""
        import pathlib, sys, time
        from steerjax.inference.job import resumable
        with resumable(pathlib.Path(sys.argv[1]), {}) as output:
            print("ready", flush=True)
            for i in range(output.done, 60):
                output.add(i, [{"i": i, "text": "x" * 2000}])
                time.sleep(0.004)
    """)
    path = tmp_path / "out.jsonl"
    dice, kills = random.Random(0), 0
    while not path.exists():
        child = subprocess.Popen([sys.executable, "-c", program, str(path)], stdout=subprocess.PIPE)
        child.stdout.readline()
        try:
            child.wait(timeout=dice.uniform(0, 0.06) if kills < 10 else 60)
        except subprocess.TimeoutExpired:
            os.kill(child.pid, signal.SIGKILL)
            kills += 1
        child.wait()
    assert kills >= 5
    expected = "".join(json.dumps({"i": i, "text": "x" * 2000}) + "\n" for i in range(60))
    assert path.read_bytes() == expected.encode()
