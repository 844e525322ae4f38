"""The command: any format in, the same rows with predictions out, whatever happens on the way."""

import contextlib
import datetime
import io
import json
import math
import os
import random
import re
import signal
import subprocess
import sys
import time

import pyarrow.parquet
import pytest

from steerjax.annotate import main, parse_part
from steerjax.data.conversation import Conversation, Sample, Turn
from steerjax.data.readers import read_conversations
from steerjax.errors import ConfigError, DataError
from steerjax.inference.scorer import Scorer
from steerjax.schema import STEERLM
from tests.refusals import refused, says
from tests.reward_models import read_rows, reward_folder, some_conversations, write_rows

LABELS = ("helpfulness", "correctness", "coherence", "complexity", "verbosity")
LISTED = ".skipped.jsonl"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return reward_folder(tmp_path_factory.mktemp("reward"), context=256)


def arguments(model, source, output, *options) -> list[str]:
    named = {"--model": model, "--template": "extra_id", "--input": source, "--output": output}
    return [*(str(word) for pair in named.items() for word in pair), *map(str, options)]


def annotate(*words) -> None:
    main(arguments(*words))


def refusal(*words) -> str:
    with pytest.raises(SystemExit) as caught, contextlib.redirect_stderr(io.StringIO()) as said:
        annotate(*words)
    assert caught.value.code == 2
    return said.getvalue()


def ascii_rows(path, rows):
    """With half surrogates as JSON's escapes."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def predictions(path) -> list:
    return [turn.get("predicted_ratings") for row in read_rows(path) for turn in row["turns"]]


FORMATS = {
    "conversation": {
        "system": "s", "id": "a", "note": {"kept": [1, None]}, "turns": [
            {"role": "user", "content": "p"},
            {"role": "assistant", "content": "r", "ratings": {"quality": 2, "humor": None},
             "predicted_ratings": {"toxicity": 7.5}, "predicted_label": "toxicity:4"},
            {"role": "user", "content": "grün"}]},
    "helpsteer": {"prompt": "p", "response": "r", "helpfulness": 4},
    "unrated": {"prompt": "p", "response": "r"},
    "messages": {"messages": [{"role": "user", "content": "p"}, {"role": "assistant", "content": "r"}]},
    "sharegpt": {"conversations": [{"from": "human", "value": "p"}, {"from": "gpt", "value": "r"}]},
    "alpaca": {"instruction": "p", "output": "r"},
    "reference": {
        "conversations": [{"from": "User", "value": "p"}, {"from": "Assistant", "value": "r", "label": "humor:1"}]
    },
}  # fmt: skip


def test_every_format_and_all_that_stays_as_it_was(model, tmp_path):
    source = write_rows(tmp_path / "in.jsonl", FORMATS.values())
    annotate(model, source, tmp_path / "out.jsonl")
    rows = read_rows(tmp_path / "out.jsonl")
    for row in rows:
        user, answer, *rest = row["turns"]
        assert user == {"role": "user", "content": "p"}
        assert list(answer["predicted_ratings"]) == list(LABELS)
        assert answer["predicted_label"].startswith("helpfulness:")
        assert not any("predicted_ratings" in turn for turn in rest)
    own, first = dict(zip(FORMATS, rows, strict=True)), FORMATS["conversation"]
    kept = own["conversation"]
    assert {key: kept[key] for key in ("system", "id", "note")} == {key: first[key] for key in ("system", "id", "note")}
    assert kept["turns"][1]["ratings"] == first["turns"][1]["ratings"]
    assert kept["turns"][2] == first["turns"][2]
    assert own["helpsteer"]["turns"][1]["ratings"] == {"helpfulness": 4}
    assert "ratings" not in own["unrated"]["turns"][1]
    assert own["reference"]["turns"][1]["ratings"] == {"humor": 1}
    assert own["unrated"]["id"] == f"{source}:3"
    read = [row for _, row in read_conversations(str(tmp_path / "out.jsonl"), STEERLM)]
    assert [c.turns[1].predicted_ratings for c in read] == [row["turns"][1]["predicted_ratings"] for row in rows]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "out.jsonl", "out.jsonl.settings.json"]


def test_the_last_turn_only(model, tmp_path):
    source = write_rows(tmp_path / "in.jsonl", some_conversations(5, longest=8))
    annotate(model, source, tmp_path / "all.jsonl")
    annotate(model, source, tmp_path / "last.jsonl", "--turns", "last")
    for whole, last in zip(read_rows(tmp_path / "all.jsonl"), read_rows(tmp_path / "last.jsonl"), strict=True):
        assert "predicted_ratings" in last["turns"][-1]
        assert not any("predicted_ratings" in turn for turn in last["turns"][:-1])
        both = zip(LABELS, whole["turns"][-1]["predicted_ratings"].values(), strict=True)
        assert last["turns"][-1]["predicted_ratings"] == pytest.approx(dict(both), abs=1e-5)


def test_long_conversations_are_listed_and_written(model, tmp_path, capsys):
    rows = some_conversations(7, longest=8)
    long = {"turns": [{"role": "user", "content": "short"}, {"role": "assistant", "content": "yes", "ratings": {}},
                      {"role": "user", "content": "long " * 300},
                      {"role": "assistant", "content": "no", "predicted_ratings": {"humor": 1.0}}]}  # fmt: skip
    source = write_rows(tmp_path / "in.jsonl", [*rows, long])
    annotate(model, source, tmp_path / "out.jsonl", "--chunk-rows", 3)
    written = read_rows(tmp_path / "out.jsonl")
    assert len(written) == 8
    assert "predicted_ratings" in written[7]["turns"][1]
    assert written[7]["turns"][3] == {"role": "assistant", "content": "no"}
    (entry,) = read_rows(tmp_path / ("out.jsonl" + LISTED))
    assert (entry["file"], entry["line"]) == (str(source), 8)
    assert entry["reason"].startswith("turns[3]: ")
    assert "out.jsonl.skipped.jsonl" in capsys.readouterr().out


def test_bad_rows_stop_the_job_or_are_listed(model, tmp_path):
    good = {"prompt": "p", "response": "r", "id": 7}
    control = {"prompt": "p <extra_id_1>", "response": "r"}
    half = {"prompt": "p", "response": "half \ud83d"}
    source = ascii_rows(tmp_path / "in.jsonl", [good, {"prompt": "p"}, control, half, good])
    assert re.search(f"(?s){source}:2: .*'response'.*on_bad_row", refusal(model, source, tmp_path / "a.jsonl"))
    annotate(model, source, tmp_path / "out.jsonl", "--on-bad-row", "skip", "--chunk-rows", 1)
    rows = read_rows(tmp_path / "out.jsonl")
    assert [row["id"] for row in rows] == ["7", f"{source}:3", "7"]
    assert rows[1]["turns"][0]["content"] == control["prompt"]
    assert rows[1]["turns"][1]["predicted_ratings"] != rows[0]["turns"][1]["predicted_ratings"]
    assert [entry["line"] for entry in read_rows(tmp_path / ("out.jsonl" + LISTED))] == [2, 4]


def test_what_passes_through(model, tmp_path):
    """What JSON can carry is kept; what it cannot names the row and the key, and can be skipped."""
    turns = [{"role": "user", "content": "p", "id": "m1"}, {"role": "assistant", "content": "r", "id": "m2"}]
    rows = [{"turns": turns, "score": math.nan, "half": "\ud83d", "n": 10**30}, {"turns": turns, "score": -math.inf}]
    source = ascii_rows(tmp_path / "in.jsonl", rows)
    says(refusal(model, source, tmp_path / "out.jsonl"), f"{source}:2", "score")
    annotate(model, source, tmp_path / "out.jsonl", "--on-bad-row", "skip")
    (row,) = read_rows(tmp_path / "out.jsonl")
    assert (row["score"], row["half"], row["n"]) == (None, "\ud83d", 10**30)
    assert [turn["id"] for turn in row["turns"]] == ["m1", "m2"]
    table = {"turns": [turns], "when": [datetime.datetime(2024, 1, 2)], "raw": [b"\xff"]}
    pyarrow.parquet.write_table(pyarrow.table({key: table[key] for key in ("turns", "when")}), tmp_path / "a.parquet")
    annotate(model, tmp_path / "a.parquet", tmp_path / "dates.jsonl")
    assert read_rows(tmp_path / "dates.jsonl")[0]["when"].startswith("2024-01-02")
    pyarrow.parquet.write_table(pyarrow.table(table), tmp_path / "b.parquet")
    says(refusal(model, tmp_path / "b.parquet", tmp_path / "b.jsonl"), "b.parquet:1", "raw")


def test_a_bad_row_is_found_before_the_model_is_loaded(model, tmp_path, monkeypatch):
    good = {"prompt": "p", "response": "r"}
    source = write_rows(tmp_path / "in.jsonl", [*[good] * 300, {"prompt": "p"}])
    with monkeypatch.context() as patch:
        patch.setattr("steerjax.inference.annotation.open_scorer", lambda *_: pytest.fail("loaded"))
        says(refusal(model, source, tmp_path / "out.jsonl"), f"{source}:301", "response")
        talk = Conversation((Turn("user", "p"),), asked={"humor": 1}, samples=(Sample("r", -1, -2, -3),) * 2)
        sampled = write_rows(tmp_path / "sampled.jsonl", [talk])
        says(refusal(model, sampled, tmp_path / "out.jsonl"), f"{sampled}:1", "sampled responses", cure="messages")
        bad = write_rows(tmp_path / "bad.jsonl", [{"prompt": "p", "response_0": "r"}] * 2)
        says(refusal(model, bad, tmp_path / "out.jsonl", "--on-bad-row", "skip"), str(bad), "line 1", "response")
    assert not list(tmp_path.glob("out*"))


def test_a_job_that_was_stopped_goes_on_with_skip(model, tmp_path, monkeypatch):
    """The cure of an error in the middle of a job is one that can be resumed."""
    rows = [row.to_json() for row in some_conversations(9, longest=8)]
    source, output = write_rows(tmp_path / "in.jsonl", rows), tmp_path / "out.jsonl"
    prepare, seen = Scorer.prepare, []

    def stopping(scorer, conversations, turns, *, skip):
        seen.append(conversations[0].line)
        if conversations[0].line == 7 and not skip:
            raise DataError("cannot be rendered", file=conversations[0].file, line=7)
        return prepare(scorer, conversations, turns, skip=skip)

    monkeypatch.setattr(Scorer, "prepare", stopping)
    assert f"{source}:7: " in refusal(model, source, output, "--chunk-rows", 3)
    seen.clear()
    annotate(model, source, output, "--chunk-rows", 3, "--on-bad-row", "skip")
    assert seen == [7]
    assert len(read_rows(output)) == 9


def test_nothing_to_do(model, tmp_path):
    empty = write_rows(tmp_path / "in.jsonl", [])
    says(refusal(model, empty, tmp_path / "out.jsonl"), str(empty))
    says(refusal(model, tmp_path / "missing.jsonl", tmp_path / "out.jsonl"), str(tmp_path / "missing.jsonl"))
    says(refusal(model, empty, tmp_path / "out.jsonl", "--chunk-rows", -1), "--chunk-rows -1")
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]


def test_predictions_that_are_no_numbers_stop_the_job(tmp_path):
    broken = reward_folder(tmp_path / "broken", context=256)
    from safetensors.numpy import load_file, save_file

    tensors = load_file(broken / "model.safetensors")
    tensors["score.weight"][2] = 3e38  # finite, and no prediction is
    save_file(tensors, broken / "model.safetensors")
    source = write_rows(tmp_path / "in.jsonl", [{"prompt": "p", "response": "r"}])
    says(refusal(broken, source, tmp_path / "out.jsonl"), f"{source}:1", "coherence", "predicts")


@pytest.mark.parametrize("order", [(1, 2, 3), (3, 1, 2)])
def test_parts_together_are_the_whole(model, tmp_path, order):
    rows = [row.to_json() for row in some_conversations(23, longest=8)]
    rows[4]["turns"][0]["content"] = "long " * 300
    rows[20]["turns"][0]["content"] = ""
    source = write_rows(tmp_path / "in.jsonl", rows)
    options = ("--on-bad-row", "skip", "--chunk-rows", 4)
    annotate(model, source, tmp_path / "whole.jsonl", *options)
    output = tmp_path / "out.jsonl"
    for number in order:
        annotate(model, source, output, *options, "--part", f"{number}/3")
    assert not output.exists()
    for name in ("", LISTED):
        parts = [tmp_path / f"out.part-{number}-of-3.jsonl{name}" for number in (1, 2, 3)]
        joined = b"".join(part.read_bytes() for part in parts if part.exists())
        assert joined == (tmp_path / f"whole.jsonl{name}").read_bytes()
    assert {entry["line"] for entry in read_rows(tmp_path / ("whole.jsonl" + LISTED))} == {5, 21}
    annotate(model, source, output, *options, "--part", "2/3")  # there is nothing left to do
    said = refusal(model, source, tmp_path / "whole.jsonl", *options, "--rows", 16)
    says(said, str(tmp_path / "whole.jsonl"), "rows", "16")


def test_parts_of_a_short_file(model, tmp_path):
    source = write_rows(tmp_path / "in.jsonl", some_conversations(3, longest=8))
    found = []
    for number in (1, 2, 3, 4):
        annotate(model, source, tmp_path / "out.jsonl", "--chunk-rows", 2, "--part", f"{number}/4")
        found += [row["id"] for row in read_rows(tmp_path / f"out.part-{number}-of-4.jsonl")]
    assert found == ["row 1", "row 2", "row 3"]


@pytest.mark.short
def test_part_numbers():
    assert parse_part("2/8") == (2, 8)
    for wrong in ("0/2", "3/2", "2", "a/b", "-1/2", ""):
        with refused(ConfigError, f"--part {wrong}", cure="2/8"):
            parse_part(wrong)


# Imports once, then forks a process for each list of arguments; says its id, and in the end its status.
SERVER = """
import json, os, sys
import jax, steerjax.bundle, steerjax.inference.scorer
from steerjax.annotate import main
for line in sys.stdin:
    child = os.fork()
    if not child:
        os.dup2(2, 1)
        try:
            main(json.loads(line))
        finally:
            os._exit(sys.exc_info()[1] is not None)
    print(child, flush=True)
    print(os.waitpid(child, 0)[1], flush=True)
"""


@pytest.fixture
def processes(repository, tmp_path):
    """Starts annotate with these arguments: (process id, a function that waits for its status)."""
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(repository), os.environ.get("PYTHONPATH", "")]),
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "cache"), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }  # fmt: skip
    with (
        (tmp_path / "log").open("w") as log,
        subprocess.Popen([sys.executable, "-c", SERVER], env=environment, text=True,
                         stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log) as server,
    ):  # fmt: skip

        def start(words: list[str]):
            print(json.dumps(words), file=server.stdin, flush=True)
            child = int(server.stdout.readline())
            return child, lambda: int(server.stdout.readline())

        yield start
        server.stdin.close()


@pytest.mark.slow
def test_killed_ten_times_it_writes_the_same_bytes(model, tmp_path, processes):
    """SIGKILL at random moments: while it starts, reads, computes and writes."""
    rows = [row.to_json() for row in some_conversations(400, longest=20)]
    for index in range(7, 400, 60):
        rows[index]["turns"][0]["content"] = "long " * 300
    source = write_rows(tmp_path / "in.jsonl", rows)
    whole, output = tmp_path / "whole.jsonl", tmp_path / "out.jsonl"

    def start(path):
        return processes(arguments(model, source, path, "--chunk-rows", 4))

    assert start(whole)[1]() == 0, (tmp_path / "log").read_text()
    partial, moments = output.with_name("out.jsonl.partial"), random.Random(0)
    size, reached = whole.stat().st_size, []
    for kill in range(10):
        (child, status), begun = start(output), time.monotonic()
        goal = (reached or [0])[-1] + moments.randrange(1, size // 20)
        while not partial.exists() or partial.stat().st_size < goal:
            assert time.monotonic() - begun < 120, (tmp_path / "log").read_text()
            if kill % 4 == 1 and time.monotonic() - begun > moments.random() / 2:
                break  # while it starts
            time.sleep(0.001)
        time.sleep(moments.random() * 0.02)
        os.kill(child, signal.SIGKILL)
        assert status() == signal.SIGKILL
        reached.append(partial.stat().st_size if partial.exists() else 0)
    assert len(set(reached)) > 5
    assert reached[-1] > size / 10
    assert not output.exists()
    assert start(output)[1]() == 0, (tmp_path / "log").read_text()
    for name in ("", LISTED, ".settings.json"):
        assert (tmp_path / f"out.jsonl{name}").read_bytes() == (tmp_path / f"whole.jsonl{name}").read_bytes()


@pytest.mark.short
def test_help_is_quick():
    probe = "import sys, steerjax.annotate, steerjax.evaluate; print('jax' in sys.modules, 'matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True).stdout == "False False\n"
