"""Every reader on damaged files: a row is used, or an error of ours says what is wrong."""

import collections
import gzip
import io
import json
import os
import re
import time
from pathlib import Path
from random import Random

import pytest

from steerjax.chat.render import Renderer
from steerjax.chat.templates import TEMPLATES
from steerjax.chat.tokenizer import load_tokenizer
from steerjax.data.loading import prompt_key
from steerjax.data.oasst import read_threads
from steerjax.data.readers import iter_rows, read_conversations
from steerjax.errors import DataError
from steerjax.inference.job import carried
from steerjax.schema import STEERLM
from tests import SHARED
from tests.faults.mutate import mutated_bytes, mutated_json, odd_json
from tests.refusals import refused, says

TURNS = [{"role": "user", "content": "q", "id": "1"}, {"role": "assistant", "content": "a", "ratings": {"humor": 3}}]
ROWS = [
    {"turns": TURNS, "system": "s", "id": "x", "rejected": [TURNS[0], TURNS[1] | {"content": "b"}], "strength": 2},
    {"messages": [{"role": "user", "content": [{"type": "text", "text": "q"}]}, TURNS[1]], "helpfulness": 3, "id": 7},
    {"conversations": [{"from": "User", "value": "q\n<extra_id_1>Assistant\na\n<extra_id_1>User\nr", "label": None},
                       {"from": "Assistant", "value": "a", "label": "helpfulness:4"}], "mask": "User"},
    {"prompt": "p", "response": "r", "helpfulness": [3, 4, 3], "verbosity": 1},
    {"instruction": "i", "input": "j", "output": "o", "history": []}, {"prompt": "p", "completion": "c"},
    {"prompt": "p", "chosen": "a", "rejected": "b", "margin": 0.5},
    {"chosen": "\n\nHuman: q\n\nAssistant: a", "rejected": "\n\nHuman: q\n\nAssistant: b"},
    {"prompt": "p", "response_1": "a", "response_2": "b", "preference_strength": -2},
    {"context": [TURNS[0]], "response1": "a", "response2": "b", "overall_preference": 1},
]  # fmt: skip
REPLY = {"message_id": "n", "parent_id": "m", "role": "assistant", "text": "a", "lang": "en",
         "labels": {"quality": {"value": 0.5}, "humor": {"value": 0.1}}, "replies": []}  # fmt: skip
ROOT = {"message_id": "m", "parent_id": None, "role": "prompter", "text": "q", "deleted": False, "replies": [REPLY]}
TREES = [{"prompt": ROOT}, ROOT, {key: value for key, value in ROOT.items() if key != "replies"},
         REPLY | {"labels": {"name": ["quality", "humor"], "value": [0.5, 0.1]}}]  # fmt: skip


def memory(field: str) -> int:
    """Bytes: VmRSS, or VmHWM, the most so far."""
    return 1024 * int(re.search(rf"{field}:\s+(\d+)", Path("/proc/self/status").read_text())[1])


def read(path, render, counts, reader=read_conversations):
    """Counts what becomes of a file and its rows; any other error than ours goes through."""
    started = time.monotonic()
    try:
        for line, found in reader(str(path), STEERLM):
            error = found if isinstance(found, DataError) else rendered(found, render)
            counts["refused rows" if error else "rows used"] += 1
            if error:
                assert str(error).startswith(f"{path}:{line}:"), error
                str(error).encode("utf-8", "backslashreplace")
    except DataError as error:
        says(error, str(path))
        counts["refused files"] += 1
    assert time.monotonic() - started < 10


def rendered(conversation, render):
    try:
        carried(conversation.to_json())
        prompt_key(conversation)
        render.render(conversation, [turn.ratings for turn in conversation.turns])
    except DataError as error:
        return error


def table(kind, rows):
    import pyarrow as pa
    import pyarrow.parquet

    found, file = pa.table({key: [row.get(key) for row in rows] for key in rows[0]}), io.BytesIO()
    if kind == "parquet":
        pyarrow.parquet.write_table(found, file)
    else:
        with (pa.ipc.new_file if kind == "file" else pa.ipc.new_stream)(file, found.schema) as writer:
            writer.write_table(found)
    return file.getvalue()


def fuzz(folder, count, random, tried):
    """`count` mutated rows and more, in files of every kind."""
    counts = collections.Counter()
    render = Renderer(load_tokenizer("embedded"), TEMPLATES["extra_id"], STEERLM)
    real = ROWS + [row for name in ("helpsteer", "helpsteer2") for _, row in list(iter_rows(f"embedded:{name}"))[:5]]
    if SHARED.is_dir():
        cases = sorted((SHARED / "cases").glob("*.jsonl"))
        real += [row for path in cases for _, row in list(iter_rows(str(path)))[:3] if isinstance(row, dict)]
    plain = [{"prompt": 'p, "x"\n', "response": "r", "helpfulness": 3.0}] * 10
    cells = "prompt,response,helpfulness\n" + '"p, ""x""",r,3\n' * 10
    tables = {"parquet": table("parquet", plain), "arrow": table("file", plain), "stream.arrow": table("stream", plain),
              "csv": cells.encode(), "tsv": cells.encode("utf-16"), "json": json.dumps(ROWS).encode()}  # fmt: skip
    for number in range(count // 30):
        rows = [odd_json(mutated_json(random.choice(real), random)) for _ in range(20)]
        data = b"[" + b",".join(rows) + b"]" if number % 10 == 3 else b"\n".join(rows)
        data = mutated_bytes(data, random) if number % 3 == 1 else data
        data = mutated_bytes(gzip.compress(data, 1), random) if number % 10 == 2 else data
        path = folder / "rows.jsonl"
        path.write_bytes(data)
        read(path, render, counts)
        path.write_bytes(b"\n".join(odd_json(mutated_json(random.choice(TREES), random)) for _ in range(10)))
        read(path, render, counts, read_threads)
        for name, whole in tables.items() if number % 10 == 0 else ():
            path = folder / f"rows.{name}"
            path.write_bytes(mutated_bytes(whole, random))
            read(path, render, counts)
    for outcome, times in counts.items():
        tried("row read", outcome, times)
    return counts


def test_mutated_rows(tmp_path, tried):
    counts = fuzz(tmp_path, 1200, Random(8), tried)
    assert min(counts["rows used"], counts["refused rows"], counts["refused files"]) > 0


@pytest.mark.faults
def test_mutated_rows_by_the_thousands(tmp_path, tried):
    """40,000."""
    before = memory("VmRSS")
    assert sum(fuzz(tmp_path, 60_000, Random(16), tried).values()) > 40_000
    assert memory("VmHWM") - before < 400 << 20


def good(**keys):
    return odd_json({"prompt": "p", "response": "r", "helpfulness": 3} | keys)


ODD_ROWS = {
    "huge list": good(helpfulness=[10**400]), "huge": good(helpfulness=10**400), "id": good(id="\ud800"),
    "text": good(prompt="a\ud800"),
    "NaN": good(helpfulness=float("nan")),
    "digits": b'{"prompt": ' + b"9" * 10_000 + b"}",
    "deep": b'{"prompt": ' + b"[" * 100_000, "closed": b'{"prompt": ' + b"[" * 20_000 + b"]" * 20_000 + b"}",
    "nul": b"\0" * 100, "twice": b'{"prompt": "a", "prompt": "b"}', "key": odd_json({"\ud800": 1}), "list": b"7",
    "bytes": b"\xff\xfa", "long": b'{"prompt": "' + b"x" * (17 << 20) + b'"}', "no end": b"{" * (17 << 20),
}  # fmt: skip


@pytest.mark.parametrize("name", ODD_ROWS)
def test_an_odd_row_is_refused_and_the_next_one_read(tmp_path, name):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(good() + b"\n" + ODD_ROWS[name] + b"\n" + good() + b"\n")
    first, odd, last = (found for _, found in read_conversations(str(path), STEERLM))
    assert first.turns == last.turns
    assert isinstance(odd, DataError)
    assert str(odd).startswith(f"{path}:2:")
    assert len(str(odd)) < 1000


@pytest.mark.parametrize("name", ["name", "message_id", "parent_id", "role", "text", "lang", "labels", "replies"])
def test_lists_in_a_tree(tmp_path, name):
    path = tmp_path / "trees.jsonl"
    odd = REPLY | ({"labels": {"name": [["quality"]], "value": [[1]]}} if name == "name" else {name: [["x"]]})
    path.write_bytes(b"\n".join(map(odd_json, [ROOT | {"replies": [odd]}, odd, {"prompt": ROOT}])))
    found = [one for _, one in read_threads(str(path), STEERLM)]
    assert any(not isinstance(one, DataError) for one in found)


def test_a_packed_bomb_is_refused(tmp_path):
    Path("/proc/self/clear_refs").write_text("5")
    before = memory("VmRSS")
    for name, head in (("a.jsonl.gz", b"{"), ("b.json.gz", b"["), ("c.csv.gz", b"a,b\n"), ("d.parquet.gz", b"PAR1")):
        path = tmp_path / name
        with gzip.open(path, "wb", 1) as file:
            file.write(head)
            for _ in range(200):
                file.write(b" " * (1 << 20))
        with refused(DataError, name, cure="gunzip"):
            list(read_conversations(str(path), STEERLM))
    assert memory("VmHWM") - before < 400 << 20


def test_what_is_no_file(tmp_path):
    os.mkfifo(tmp_path / "pipe.jsonl")
    (tmp_path / "empty.jsonl").write_bytes(b"")
    for path in (tmp_path, tmp_path / "pipe.jsonl", tmp_path / "none.jsonl", "nul\0.jsonl", "/dev/null", "/dev/zero"):
        with refused(DataError):
            list(read_conversations(str(path), STEERLM))
    assert list(read_conversations(str(tmp_path / "empty.jsonl"), STEERLM)) == []
