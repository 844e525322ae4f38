"""A metrics.jsonl that is damaged stops no run."""

import json

import pytest

from steerjax.checksums import with_own
from steerjax.report.records import read_metrics
from steerjax.training.metrics import MetricsWriter

GOOD = [{"step": step, "split": "train", "loss": 1.0 / step, "grad_norm": None} for step in (1, 2, 3)]
GARBAGE = {
    "no JSON": b"garbage",
    "a list": b"[1]",
    "no step": b'{"split": "train", "loss": 1.0}',
    "a step that is none": b'{"step": true, "split": "train"}',
    "no split": b'{"step": 2}',
    "a text for a number": b'{"step": 2, "split": "train", "loss": "1.0"}',
    "a number that no float holds": b'{"step": 2, "split": "train", "loss": 1' + b"0" * 400 + b"}",
    "a figure that was changed": json.dumps(with_own(GOOD[1])).replace("0.5", "0.7").encode(),
    "NULs": b"\0" * 100,
    "NULs before a record": b'\0\0{"step": 2, "split": "train"}',
    "not UTF-8": b'{"step": 2, "split": "tr\xff"}',
    "too deep": b"[" * 100_000,
}


def lines(records) -> list[bytes]:
    return [json.dumps(record).encode() for record in records]


@pytest.mark.parametrize("name", GARBAGE)
@pytest.mark.parametrize("place", [0, 1, 3])
def test_a_line_that_is_no_record_is_left_out_said_and_kept_aside(tmp_path, name, place, capsys):
    path, found = tmp_path / "metrics.jsonl", lines(GOOD)
    damaged = b"\n".join([*found[:place], GARBAGE[name], *found[place:]]) + b"\n"
    path.write_bytes(damaged)
    assert read_metrics(path) == GOOD
    assert f"metrics.jsonl:{place + 1}: " in capsys.readouterr().err
    with MetricsWriter(tmp_path, 2, (), {}, active=True) as writer:
        writer.write(3, "train", {"loss": 7.0})
    assert [record["step"] for record in read_metrics(path)] == [1, 2, 3]
    assert capsys.readouterr().err.count("left out") == 1  # by the writer; what it wrote has none
    (aside,) = tmp_path.glob("metrics.*.jsonl")
    assert aside.read_bytes() == damaged


def test_only_the_process_that_writes_reads(tmp_path, capsys):
    """The others may come while it writes the file anew, and what they saw could differ."""
    evaluated = [json.dumps({"step": 2, "split": "validation", "loss": 1.0}).encode()]
    (tmp_path / "metrics.jsonl").write_bytes(b"\n".join([b"garbage", *evaluated]) + b"\n")
    assert not MetricsWriter(tmp_path, 2, (), {}, active=False).evaluated
    assert capsys.readouterr().err == ""
    with MetricsWriter(tmp_path, 2, (), {}, active=True) as writer:
        assert writer.evaluated


def test_a_half_last_line_is_left_out_without_a_word(tmp_path, capsys):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b"\n".join(lines(GOOD)) + b'\n{"step": 4, "spl')
    assert read_metrics(path) == GOOD
    assert capsys.readouterr().err == ""
