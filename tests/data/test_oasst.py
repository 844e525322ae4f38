"""Message trees against the rules of the reference, written down a second time as a plain recursion."""

import gzip
import json
import zlib
from collections import Counter

import pytest

from steerjax.data.formats import conversation_from_row
from steerjax.data.oasst import read_threads
from steerjax.data.statistics import statistics_of
from steerjax.errors import ConfigError, DataError
from steerjax.schema import HELPSTEER, OASST, STEERLM, Attribute, Schema
from tests import needs_shared
from tests.refusals import refused


def message(name, role, *replies, **fields):
    return {"message_id": name, "role": role, "text": f"text {name}", "replies": list(replies), **fields}


def quality(value):
    return {"quality": {"value": value, "count": 3}}


def tree():
    """p -> a -> (q -> (b, c), d), with a, b and d rated."""
    q = message("q", "prompter", message("b", "assistant", labels=quality(1.0)), message("c", "assistant"))
    a = message("a", "assistant", q, message("d", "prompter"), labels=quality(0.5))
    return message("p", "prompter", a, message("e", "assistant", labels=quality(0.25)), labels=quality(1.0))


def write(path, *rows):
    text = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(text) if path.suffix == ".gz" else text)
    return str(path)


def read(path, schema=OASST, **options):
    dropped = Counter()
    got = [row for _, row in read_threads(path, schema, dropped=dropped, **options)]
    return [row if isinstance(row, DataError) else shown(row) for row in got], dict(dropped)


def shown(conversation):
    return [(turn.role, turn.content, dict(turn.ratings) if turn.ratings else None) for turn in conversation.turns]


def short(threads):
    """Names of the messages; with its quality where it is rated."""
    return [" ".join(c[5:] + (f":{r['quality']:g}" if r else "") for _, c, r in thread) for thread in threads]


def test_every_thread_with_all_its_ratings_and_ids(tmp_path):
    path = write(tmp_path / "t.jsonl.gz", {"prompt": tree()})
    threads, dropped = read(path)
    assert short(threads) == ["p a:2 q b:4", "p a:2 q c", "p a:2 d", "p e:1"]
    assert dropped == {}
    got = [conversation for _, conversation in read_threads(path, OASST)]
    assert [conversation.id for conversation in got] == ["b", "c", "d", "e"]
    assert [(conversation.file, conversation.line) for conversation in got] == [(path, 1)] * 4
    assert ["".join(turn.id for turn in conversation.turns) for conversation in got] == ["paqb", "paqc", "pad", "pe"]


def test_shared_turns_count_once_in_statistics(tmp_path):
    path = write(tmp_path / "t.jsonl", {"prompt": tree()})
    rows = [conversation.to_json() for _, conversation in read_threads(path, OASST)]  # ids travel in the format
    got = statistics_of((conversation_from_row(row, OASST) for row in rows), OASST)
    assert (got["rows"], got["turns"], got["assistant_turns"], got["rated_turns"]) == (4, 7, 4, 3)
    assert got["values"]["quality"]["mean"] == (2 + 4 + 1) / 3


@pytest.mark.parametrize(
    ("value", "rating"), [(0.125, 0), (0.375, 2), (0.625, 2), (0.875, 4), (0.0, 0), (0.9166, 4), (0.13, 1), (1, 4)]
)
def test_labels_are_scaled_and_rounded_half_to_even(tmp_path, value, rating):
    root = message("p", "prompter", message("a", "assistant", labels=quality(value)))
    threads, _ = read(write(tmp_path / "t.jsonl", root))
    assert threads[0][1][2] == {"quality": rating}


def test_labels_follow_the_range_of_the_schema(tmp_path):
    root = message("p", "prompter", message("a", "assistant", labels=quality(0.5)))
    threads, _ = read(write(tmp_path / "t.jsonl", root), Schema((Attribute("quality", 1, 9),)))
    assert threads[0][1][2] == {"quality": 5}


def test_only_the_four_attributes_are_taken(tmp_path):
    labels = {name: {"value": 0.5} for name in ("spam", "helpfulness", "humor", "quality", "violence")}
    labels["toxicity"] = None
    path = write(tmp_path / "t.jsonl", message("p", "prompter", message("a", "assistant", labels=labels)))
    for schema in (OASST, STEERLM):  # STEERLM has HelpSteer's helpfulness, which OASST's is not
        assert read(path, schema)[0][0][1][2] == {"quality": 2, "humor": 2}
    with refused(ConfigError, "quality", cure="oasst"):
        read(path, HELPSTEER)


def test_deleted_messages_and_other_languages_take_their_replies_along(tmp_path):
    german = message("q", "prompter", message("b", "assistant", lang="de", labels=quality(1)), lang="de")
    gone = message("g", "assistant", message("h", "prompter", lang="en"), lang="en", deleted=True)
    root = message("p", "prompter", message("a", "assistant", german, lang="en", labels=quality(1)), gone, lang="en")
    path = write(tmp_path / "t.jsonl", root, message("x", "prompter", lang="en"))
    assert short(read(path)[0]) == ["p a:4 q b:4"]
    assert read(path)[1] == {"deleted messages": 1, "replies to such messages": 1, "threads of one message": 1}
    assert short(read(path, keep_deleted=True)[0]) == ["p a:4 q b:4", "p g h"]
    threads, dropped = read(path, lang="en")
    assert short(threads) == ["p a:4"]
    assert dropped["messages not in 'en'"] == 1
    assert dropped["replies to such messages"] == 2
    with refused(DataError, path, "2", "de", cure="--lang"):
        read(path, lang="de")


def flat(root, parent=None):
    fields = {name: value for name, value in root.items() if name != "replies"}
    return [{**fields, "parent_id": parent}, *(row for r in root["replies"] for row in flat(r, root["message_id"]))]


def hub_labels(row):
    labels = row.get("labels") or {}
    values = {"name": list(labels), "value": [label["value"] for label in labels.values()], "count": [3] * len(labels)}
    return {**row, "labels": values if labels else None}


def test_every_layout_gives_the_same_threads(tmp_path):
    expected, _ = read(write(tmp_path / "t.jsonl", {"message_tree_id": "p", "prompt": tree()}))
    rows = flat(tree())
    for name, content in {"roots": [tree()], "messages": rows, "hub": [hub_labels(row) for row in rows]}.items():
        assert read(write(tmp_path / f"{name}.jsonl", *content))[0] == expected


def test_a_reply_may_stand_before_its_parent(tmp_path):
    backwards, _ = read(write(tmp_path / "t.jsonl", *flat(tree())[::-1]))
    assert short(backwards) == ["p e:1", "p a:2 d", "p a:2 q c", "p a:2 q b:4"]


def broken(**fields):
    return message("p", "prompter", {**message("a", "assistant", labels=quality(1)), **fields})


BAD = {  # name -> (row, field, part of the message)
    "role": (broken(role="system"), "message a.role", "'system'"),
    "role twice": (broken(role="prompter"), "message a, turns[1]", "alternate"),
    "id missing": (broken(message_id=None), "message_id", "missing"),
    "text missing": (broken(text=None), "message a.text", "missing"),
    "text blank": (broken(text=" "), "message a.text", "empty"),
    "label beyond range": (broken(labels=quality(1.5)), "message a.labels.quality", "1.5"),
    "label without value": (broken(labels={"humor": {}}), "message a.labels.humor", "None"),
    "label a number": (broken(labels={"humor": 0.5}), "message a.labels.humor", "object"),
    "hub labels of other lengths": (
        broken(labels={"name": ["quality", "humor"], "value": [1.0]}),
        "message a.labels.value",
        "2 names",
    ),
    "labels a list": (broken(labels=[0.5]), "message a.labels", "list"),
    "replies no list": (broken(replies={}) | {"replies": {"a": 1}}, "message p.replies", "list"),
    "no tree": ({"question": "q"}, "", "['question']"),
    "orphan": ({"message_id": "a", "parent_id": "z", "role": "assistant", "text": "t"}, "parent_id", "root"),
}


@pytest.mark.parametrize(("row", "field", "fragment"), BAD.values(), ids=BAD)
def test_a_bad_tree_is_one_error_with_its_place(tmp_path, row, field, fragment):
    path = write(tmp_path / "t.jsonl", {"prompt": tree()}, row)
    *threads, error = read(path)[0]
    assert short(threads) == ["p a:2 q b:4", "p a:2 q c", "p a:2 d", "p e:1"]
    assert (error.file, error.line, error.field) == (path, 2, field)
    assert fragment in error.message
    assert error.cure


def test_message_twice(tmp_path):
    rows = flat(tree())
    path = write(tmp_path / "t.jsonl", *rows, rows[-1])
    found = [(line, row.field) for line, row in read_threads(path, OASST) if isinstance(row, DataError)]
    assert found == [(7 + 1, "message_id")]


# The sample of 100 trees carries no labels: they are made up from the ids, so that all cases occur.


def made_up_labels(root):
    seed = zlib.crc32(root["message_id"].encode())
    names = [name for bit, name in enumerate((*OASST.names, "helpfulness")) if seed >> bit & 1]
    if seed % 7:
        root["labels"] = {name: {"value": (seed >> 8) % (9 + i) / (8 + i), "count": 2} for i, name in enumerate(names)}
    for reply in root["replies"]:
        made_up_labels(reply)


def recursion(node):
    """The reference's threads: [role, text, ratings, id] from the root to each leaf."""
    ratings = None
    if node["role"] == "assistant":
        labels = node.get("labels", {})
        ratings = {k: round(labels[k]["value"] * 4) for k in OASST.names if k in labels} or None
    entry = [{"prompter": "user", "assistant": "assistant"}[node["role"]], node["text"], ratings, node["message_id"]]
    if not node["replies"]:
        return [[entry]]
    return [[entry, *thread] for reply in node["replies"] for thread in recursion(reply)]


def test_sample_equals_the_recursion(tmp_path):
    sample = needs_shared("data/oasst/trees_en_100.jsonl")
    roots = [json.loads(line)["prompt"] for line in sample.open(encoding="utf-8")]
    for root in roots:
        made_up_labels(root)
    path = write(tmp_path / "t.jsonl", *({"prompt": root} for root in roots))
    expected = [thread for root in roots for thread in recursion(root)]
    assert len(expected) == 626

    threads, dropped = read(path)
    assert threads == [[tuple(entry[:3]) for entry in thread] for thread in expected]
    assert (sum(map(len, threads)), dropped) == (2198, {})


def test_the_two_exports_of_the_sample_agree():
    files = (needs_shared(f"data/oasst/{name}_en_100.jsonl") for name in ("trees", "messages"))
    first, second = (read(str(file))[0] for file in files)
    assert first == second
