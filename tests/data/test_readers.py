"""Good rows of every format and file type, read to the letter."""

import codecs
import csv
import gzip
import io
import json
import re
from dataclasses import replace
from datetime import date, datetime
from decimal import Decimal
from pathlib import Path

import pytest

from steerjax.chat.labels import label_line
from steerjax.data.conversation import Conversation, Sample, Turn
from steerjax.data.formats import prompt_turns, unread_numbers
from steerjax.data.readers import conversation_from_row, iter_rows, read_conversations, source_format
from steerjax.errors import ConfigError, DataError
from steerjax.schema import HELPSTEER, OASST, make_schema
from tests import needs_shared
from tests.refusals import refused

DOCUMENTATION = Path(__file__).parents[2] / "docs/formats.md"
HERE = Path(__file__).parent

ROWS = [
    {"prompt": 'Say "hi", twice.\nNow.', "response": "hi\u2028hi", "helpfulness": 4, "correctness": None},
    {"prompt": "  Grüße? 😀", "response": "ja\n", "helpfulness": 2.5, "correctness": 0},
]
TURNS = [
    (Turn("user", 'Say "hi", twice.\nNow.'), Turn("assistant", "hi\u2028hi", {"helpfulness": 4.0})),
    (Turn("user", "  Grüße? 😀"), Turn("assistant", "ja\n", {"helpfulness": 2.5, "correctness": 0.0})),
]


def as_jsonl(rows):
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def as_json(rows):
    return json.dumps(rows, indent=1).encode()


def as_csv(rows):
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def as_parquet(rows):
    import pyarrow
    import pyarrow.parquet

    sink = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), sink)
    return sink.getvalue()


def converted(path, schema=HELPSTEER, format="auto"):
    return [conversation for _, conversation in read_conversations(str(path), schema, format)]


@pytest.mark.parametrize("compressed", [False, True], ids=["plain", "gz"])
@pytest.mark.parametrize(
    ("extension", "encode", "lines"),
    [
        ("jsonl", as_jsonl, [1, 2]),
        ("json", as_json, [1, 2]),
        ("csv", as_csv, [2, 4]),  # the first record spans two lines
        ("parquet", as_parquet, [1, 2]),
    ],
)
def test_every_file_type_gives_the_same_conversations(tmp_path, extension, encode, lines, compressed):
    path = tmp_path / f"rows.{extension}{'.gz' if compressed else ''}"
    path.write_bytes(gzip.compress(encode(ROWS)) if compressed else encode(ROWS))
    got = converted(path)
    assert [conversation.turns for conversation in got] == TURNS
    assert [conversation.line for conversation in got] == lines
    assert [conversation.id for conversation in got] == [f"{path}:{line}" for line in lines]
    assert all(conversation.file == str(path) and conversation.system is None for conversation in got)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
@pytest.mark.parametrize(("extension", "encode"), [("jsonl", as_jsonl), ("json", as_json), ("csv", as_csv)])
def test_byte_order_mark_is_tolerated(tmp_path, extension, encode, encoding):
    path = tmp_path / f"rows.{extension}"
    path.write_bytes(encode(ROWS).decode().encode(encoding))
    assert [conversation.turns for conversation in converted(path)] == TURNS


def test_lists_and_lines_are_told_by_the_first_character(tmp_path):
    for name, content in (("rows.json", as_jsonl(ROWS)), ("rows.jsonl", b" \n" + as_json(ROWS))):
        (tmp_path / name).write_bytes(content)
        assert [conversation.turns for conversation in converted(tmp_path / name)] == TURNS


def test_blank_lines_count_and_crlf_is_no_content(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\r\n" + as_jsonl(ROWS[:1]).replace(b"\n", b"\r\n") + b"  \n" + as_jsonl(ROWS[1:]).rstrip())
    assert [(line, row["prompt"]) for line, row in iter_rows(str(path))] == [
        (2, ROWS[0]["prompt"]),
        (4, ROWS[1]["prompt"]),
    ]


def test_a_broken_row_of_jsonl_does_not_end_the_file(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"prompt": \n{"a": "\xff"}\n[1]\n{"a": 1, "a": 2}\n' + as_jsonl(ROWS))
    rows = list(iter_rows(str(path)))
    assert "".join("e" if isinstance(row, DataError) else "r" for _, row in rows) == "eeeerr"
    assert all(row.line == line for line, row in rows if isinstance(row, DataError))


@pytest.mark.parametrize("broken", ['"a,b,1\n', '"a"b,c,1\n', "a\nb,c,1\n", "a,b,1,2\n"])
def test_after_a_broken_record_of_csv_nothing_is_read(tmp_path, broken):
    path = tmp_path / "rows.csv"
    path.write_text("prompt,response,verbosity\ngood,good,1\n" + broken + 'c,d,2\n"e",f,3\n', encoding="utf-8")
    read = []
    with pytest.raises(DataError) as caught:
        read.extend(iter_rows(str(path)))
    assert read == []
    assert caught.value.file == str(path)
    assert caught.value.line >= 3
    assert caught.value.cure


def test_csv_parses_numbers_only_in_columns_that_are_no_text(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_bytes(b"id,prompt,response,system,helpfulness,verbosity,note\r\n7,1+1?,2,,3,,4a\r\n")
    texts = {"id": "7", "prompt": "1+1?", "response": "2", "system": None}
    assert list(iter_rows(str(path))) == [(2, texts | {"helpfulness": 3.0, "verbosity": None, "note": "4a"})]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-be"])
@pytest.mark.parametrize("separator", [",", "\t", ";"])
def test_csv_as_spreadsheets_write_it(tmp_path, separator, encoding):
    path = tmp_path / "rows.csv"
    text = separator.join(["prompt", "response", "verbosity"]) + "\r\n" + separator.join(["Größe?", '"a\nb"', "3"])
    path.write_bytes((codecs.BOM_UTF16_BE if encoding == "utf-16-be" else b"") + text.encode(encoding))
    assert [dict(row) for _, row in iter_rows(str(path))] == [
        {"prompt": "Größe?", "response": "a\nb", "verbosity": 3.0}
    ]


def test_csv_leaves_the_module_as_it_was(tmp_path):
    path, limit = tmp_path / "rows.csv", csv.field_size_limit()
    path.write_text("prompt,response\n" + "x" * 2 * limit + ",r\n", encoding="utf-8")
    assert len(list(iter_rows(str(path)))) == 1
    assert csv.field_size_limit() == limit


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz"])
@pytest.mark.parametrize("compressed", [False, True], ids=["plain", "gz"])
def test_bytes_tell_gzip_and_not_the_name(tmp_path, name, compressed):
    path = tmp_path / name
    path.write_bytes(gzip.compress(as_jsonl(ROWS)) if compressed else as_jsonl(ROWS))
    assert [conversation.turns for conversation in converted(path)] == TURNS


def test_values_that_json_has_no_form_for(tmp_path):
    row = {"day": date(2026, 1, 2), "at": datetime(2026, 1, 2, 3, 4), "list": [Decimal("2.5")], "raw": b"x"}
    path = tmp_path / "rows.parquet"
    path.write_bytes(as_parquet([row]))
    assert list(iter_rows(str(path))) == [
        (1, {"day": "2026-01-02", "at": "2026-01-02 03:04:00", "list": [2.5], "raw": b"x"})
    ]


def test_arrow_as_datasets_stores_it(tmp_path, monkeypatch):
    import datasets
    import pyarrow

    monkeypatch.chdir(tmp_path)
    datasets.Dataset.from_list(ROWS).save_to_disk("stored")
    (path,) = Path("stored").glob("*.arrow")
    assert [conversation.turns for conversation in converted(path)] == TURNS
    table = pyarrow.Table.from_pylist(ROWS)
    with pyarrow.OSFile("file.arrow", "wb") as sink, pyarrow.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    assert [conversation.turns for conversation in converted("file.arrow")] == TURNS
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file.arrow", "stored"]


def test_hub_rows(monkeypatch):
    import datasets

    asked = []

    def load_dataset(name, *, split, **options):
        asked.append((name, split, options))
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert [conversation.turns for conversation in converted("hub:nvidia/HelpSteer")] == TURNS
    assert converted("hub:nvidia/HelpSteer2:validation")[1].id == "hub:nvidia/HelpSteer2:validation:2"
    assert len(converted("hub:nvidia/HelpSteer2/disagreements")) == 2
    assert asked == [
        ("nvidia/HelpSteer", "train", {}),
        ("nvidia/HelpSteer2", "validation", {}),
        ("nvidia/HelpSteer2", "train", {"data_dir": "disagreements"}),
    ]


@pytest.mark.parametrize(("name", "count", "prompts"), [("helpsteer", 429, 120), ("helpsteer2", 80, 40)])
def test_embedded_sample(name, count, prompts):
    got = converted(f"embedded:{name}")
    assert len(got) == count
    assert len({conversation.turns[0].content for conversation in got}) == prompts
    assert all(set(conversation.turns[-1].ratings) == set(HELPSTEER.names) for conversation in got)
    assert got[0].id == f"embedded:{name}:1"


def test_helpsteer_ignores_other_columns_and_keeps_a_system_text():
    row = {"prompt": "p", "response": "r", "system": "", "quality": 9, "annotator": "x", "coherence": 1, "extra": [1]}
    assert conversation_from_row(row, HELPSTEER) == Conversation(
        (Turn("user", "p"), Turn("assistant", "r", {"coherence": 1.0})), system=""
    )


def test_helpsteer_row_may_be_unrated():
    row = {"prompt": "p", "response": "r", **dict.fromkeys(HELPSTEER.names)}
    assert conversation_from_row(row, HELPSTEER).turns[1].ratings is None


@pytest.mark.parametrize(
    ("prompt", "contents"),
    [
        ("a\n\n<extra_id_1>Assistant\nb\n\nc\n<extra_id_1>User\nd", ["a\n", "b\n\nc", "d"]),
        (
            "a\n<extra_id_1>Assistant\nb\n<extra_id_1>User\nc\n<extra_id_1>Assistant\nd\n<extra_id_1>User\ne",
            ["a", "b", "c", "d", "e"],
        ),
        # What follows is no thread: it stays text.
        ("a\n<extra_id_1>Assistant\nb", ["a\n<extra_id_1>Assistant\nb"]),
        ("a\n<extra_id_1>User\nb", ["a\n<extra_id_1>User\nb"]),
        ("a\n<extra_id_1>User\nb\n<extra_id_1>Assistant\nc", ["a\n<extra_id_1>User\nb\n<extra_id_1>Assistant\nc"]),
        ("a <extra_id_1>Assistant\nb\n<extra_id_1>user\nc", ["a <extra_id_1>Assistant\nb\n<extra_id_1>user\nc"]),
        ("a\n<extra_id_1>Assistant\nb<extra_id_2>\n<extra_id_1>User\nc", ["a", "b<extra_id_2>", "c"]),
    ],
)
def test_helpsteer2_prompt_is_split_into_turns(prompt, contents):
    row = {"prompt": prompt, "response": "r", "verbosity": 3}
    turns = conversation_from_row(row, HELPSTEER, "helpsteer2").turns
    assert [turn.content for turn in turns] == [*contents, "r"]
    assert [turn.role for turn in turns] == [("user", "assistant")[index % 2] for index in range(len(turns))]
    assert [turn.ratings for turn in turns] == [None] * len(contents) + [{"verbosity": 3.0}]


def test_markers_in_other_formats_are_text():
    prompt = "a\n<extra_id_1>Assistant\nb\n<extra_id_1>User\nc"
    row = {"prompt": prompt, "response": "r", "verbosity": 3}
    assert conversation_from_row(row, HELPSTEER).turns[0] == Turn("user", prompt)
    entries = [{"from": "User", "value": prompt}, {"from": "Assistant", "value": "r", "label": "verbosity:3"}]
    turns = conversation_from_row({"conversations": entries}, HELPSTEER).turns
    assert [turn.content for turn in turns] == ["a", "b", "c", "r"]
    turns = conversation_from_row({"conversations": entries}, HELPSTEER, "sharegpt").turns
    assert [turn.content for turn in turns] == [prompt, "r"]


def test_the_helpsteer2_sample_is_read_as_helpsteer2(monkeypatch):
    row = {"prompt": "a\n<extra_id_1>Assistant\nb\n<extra_id_1>User\nc", "response": "r", "verbosity": 3}
    monkeypatch.setattr("steerjax.data.readers.iter_rows", lambda source: iter([(1, row)]))
    assert len(converted("embedded:helpsteer2")[0].turns) == 4
    assert len(converted("hub:nvidia/HelpSteer2:validation")[0].turns) == 4
    assert len(converted("hub:nvidia/HelpSteer")[0].turns) == 2


OWN = make_schema("helpsteer", [("clarity", 1, 5), ("depth", 1, 10)])


def test_columns_may_be_absent_where_ratings_are_not_asked_for():
    row = {"prompt": "p", "response": "r"}
    assert conversation_from_row(row, OWN, rated=False).turns == (Turn("user", "p"), Turn("assistant", "r"))
    assert conversation_from_row(row | {"depth": 2}, OWN, rated=False).turns[1].ratings == {"depth": 2.0}
    with refused(DataError, "clarity", cure="data.attributes"):
        conversation_from_row(row, OWN)


@pytest.mark.parametrize(
    ("source", "format", "expected"),
    [
        ("embedded:helpsteer2", "auto", "helpsteer2"),
        ("hub:nvidia/HelpSteer2/disagreements", "auto", "helpsteer2"),
        ("hub:nvidia/HelpSteer", "auto", "auto"),
        ("embedded:helpsteer2", "helpsteer", "helpsteer"),
    ],
)
def test_format_of_a_source(source, format, expected):
    assert source_format(source, format) == expected


def test_own_attributes_are_columns():
    row = {"prompt": "p", "response": "r", "clarity": 5, "depth": None, "helpfulness": "n/a"}
    assert conversation_from_row(row, OWN).turns[1].ratings == {"clarity": 5.0}
    del row["clarity"], row["depth"]
    with refused(DataError, "clarity", cure="data.attributes"):
        conversation_from_row(row, OWN)


def test_ratings_beside_messages_belong_to_the_last_assistant_turn():
    messages = [{"role": role, "content": role} for role in ("assistant", "user", "assistant", "user")]
    row = {"messages": messages, "clarity": 2, "depth": [7, 8], "annotator": "x"}
    got = conversation_from_row(row, OWN).turns
    assert [turn.ratings for turn in got] == [None, None, {"clarity": 2.0, "depth": 7.5}, None]
    assert conversation_from_row({"messages": messages, "clarity": None}, OWN).turns[2].ratings is None
    with refused(DataError, "messages", "assistant"):
        conversation_from_row(row | {"messages": messages[1:2]}, OWN)
    with refused(DataError, "clarity", "0", "1..5"):
        conversation_from_row(row | {"clarity": 0}, OWN)


@pytest.mark.parametrize("key", ["messages", "turns"])
def test_the_assistant_may_open(key):
    row = {key: [{"role": role, "content": role} for role in ("assistant", "user", "assistant")]}
    assert [turn.role for turn in conversation_from_row(row, OWN).turns] == ["assistant", "user", "assistant"]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "p", "response": "r", "verbosity": 1},
        {"turns": [{"role": "user", "content": "c"}]},
        {"messages": [{"role": "user", "content": "c"}]},
        {"conversations": [{"from": "human", "value": "c"}]},
        {"conversations": [{"from": "User", "value": "c"}]},
        {"instruction": "i", "output": "o"},
    ],
    ids=lambda row: next(iter(row)),
)
def test_every_reader_takes_ids_that_are_numbers(row):
    assert conversation_from_row({"id": 7, **row}, HELPSTEER).id == "7"
    assert conversation_from_row({"id": 0, **row}, HELPSTEER).id == "0"
    assert conversation_from_row({"id": "x", **row}, HELPSTEER).id == "x"
    with refused(DataError, "id", "list"):
        conversation_from_row({"id": [7], **row}, HELPSTEER)


@pytest.mark.parametrize(
    ("name", "names", "high", "count"),
    [
        ("asap/asap3_train", ("overall", "content", "prompt_adherence", "language", "narrativity"), 3, 1035),
        ("llm_rubric/dialogues", tuple(f"Q{i}" for i in range(9)), 4, 223),
    ],
)
def test_real_ratings_of_other_attributes(name, names, high, count):
    path = needs_shared(f"data/{name}.jsonl")
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    got = converted(path, make_schema("helpsteer", [(name, 0 if high == 3 else 1, high) for name in names]))
    assert len(got) == count
    for conversation, row in zip(got, rows, strict=True):
        rated = {name: row[name] for name in names if row[name] is not None}
        assert [turn.ratings for turn in conversation.turns][-1] == rated
        texts = [m["content"] for m in row.get("messages", ())] or [row["prompt"], row["response"]]
        assert [turn.content for turn in conversation.turns] == texts


def test_helpsteer2_disagreements_are_averaged():
    row = {"prompt": "p", "response": "r", "helpfulness": [3, 3, 4], "verbosity": [2, 1], "coherence": None}
    assert conversation_from_row(row, HELPSTEER).turns[1].ratings == {"helpfulness": 10 / 3, "verbosity": 1.5}


CHAT = (Turn("user", "u"), Turn("assistant", "a"), Turn("user", "v"), Turn("assistant", "b"))


def chat_row(list_key, role_key, content_key, user, assistant, system=None, **fields):
    turns = [(system, "s")] * bool(system) + [(user, "u"), (assistant, "a"), (user, "v"), (assistant, "b")]
    return {list_key: [{role_key: role, content_key: content} for role, content in turns], **fields}


@pytest.mark.parametrize(
    ("row", "format", "system", "name"),
    [
        (chat_row("messages", "role", "content", "user", "assistant"), "messages", None, ""),
        (chat_row("messages", "role", "content", "user", "assistant", "system", id="n"), "messages", "s", "n"),
        (chat_row("messages", "role", "content", "user", "assistant", "developer"), "messages", "s", ""),
        (chat_row("messages", "role", "content", "user", "assistant", system=None, source="x"), "messages", None, ""),
        (chat_row("conversations", "from", "value", "human", "gpt", id=17), "sharegpt", None, "17"),
        (chat_row("conversations", "from", "value", "human", "gpt", "system", id="x_0"), "sharegpt", "s", "x_0"),
        (chat_row("conversations", "from", "value", "user", "chatgpt"), "sharegpt", None, ""),
        (chat_row("conversations", "from", "value", "User", "Assistant"), "reference", None, ""),
        (chat_row("conversations", "from", "value", "human", "assistant", mask="human"), "reference", None, ""),
    ],
)
def test_chat_formats_of_others(row, format, system, name):
    assert conversation_from_row(row, OASST) == Conversation(CHAT, system, name)
    assert conversation_from_row(row, OASST, format) == Conversation(CHAT, system, name)


def test_message_of_parts():
    parts = [{"type": "text", "text": "u"}, {"type": "text", "text": "v"}]
    row = {"messages": [{"role": "user", "content": parts, "name": "x", "tool_calls": None, "weight": 1}]}
    assert conversation_from_row(row, OASST).turns == (Turn("user", "uv"),)


def test_trls_prompt_and_completion():
    """Texts or messages, rated or not; beside a response a completion is a column like any other."""
    turns = Turn("user", "p"), Turn("assistant", "r", {"humor": 3.0})
    messages = {"prompt": [{"role": "user", "content": "p"}], "completion": [{"role": "assistant", "content": "r"}]}
    for row in (messages, {"prompt": "p", "completion": "r"}, messages | {"prompt": "p"}):
        for format in ("auto", "completion"):
            assert conversation_from_row(row | {"humor": 3}, OASST, format) == Conversation(turns)
        assert conversation_from_row(row, OASST).turns[1].ratings is None
        assert list(unread_numbers(row | {"humor": 3, "fun": 2}, OASST)) == ["fun"]
    assert conversation_from_row({"prompt": "p", "response": "r", "humor": 3, "completion": 7}, OASST).turns == turns
    with refused(DataError, "completion", cure="row"):
        conversation_from_row({"prompt": "p", "completion": ""}, OASST)


def test_alpaca_joins_instruction_and_input():
    row = {"instruction": "Add.", "input": "1+1", "output": "2", "system": "", "history": []}
    turns = Turn("user", "Add.\n1+1"), Turn("assistant", "2")
    assert conversation_from_row(row, OASST) == conversation_from_row(row, OASST, "alpaca") == Conversation(turns)


def test_reference_conversations():
    row = {
        "conversations": [
            {"from": "user", "value": "Hi", "label": None},
            {"from": "ASSISTANT", "value": "Yo", "label": "verbosity:0,helpfulness:4"},
            {"from": "Human", "value": "More"},
            {"from": "Assistant", "value": "OK", "label": ""},
        ],
        "system": "",
        "mask": "User, Human",
        "type": "VALUE_TO_TEXT",
        "dataset": "made up",
    }
    rated = Turn("assistant", "Yo", {"verbosity": 0.0, "helpfulness": 4.0})
    turns = (Turn("user", "Hi"), rated, Turn("user", "More"), Turn("assistant", "OK"))
    assert conversation_from_row(row, HELPSTEER) == Conversation(turns, "")
    del row["system"]
    assert conversation_from_row(row, HELPSTEER, "reference").system is None


@pytest.mark.parametrize("name", ["dialogues.jsonl", "dummy-sft.jsonl"])
def test_reference_golden_file(name):
    path = HERE / name if name == "dialogues.jsonl" else needs_shared(f"data/nemo_aligner/{name}")
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    got = converted(path)
    assert len(got) == len(rows) > 0
    for conversation, row in zip(got, rows, strict=True):
        assert conversation.system == row["system"]
        turns = [(turn.role.capitalize(), turn.content) for turn in conversation.turns]
        assert turns == [(entry["from"], entry["value"]) for entry in row["conversations"]]
        labels = [entry.get("label") for entry in row["conversations"]]
        assert [
            label_line(turn.ratings, HELPSTEER, "numbers") if turn.ratings else None for turn in conversation.turns
        ] == labels


def test_conversation_round_trip():
    conversation = Conversation(
        (
            Turn("user", "Hi", id="m0"),
            Turn("assistant", "Yo", {"quality": 4.0}, {"quality": 4.25, "humor": -0.5}),  # a prediction may overshoot
            Turn("user", "More"),
        ),
        system=None,
        id="thread 7",
    )
    row = json.loads(json.dumps(conversation.to_json()))
    assert conversation_from_row(row, OASST) == conversation
    assert conversation_from_row(Conversation(conversation.turns[:1]).to_json(), OASST).id == ""


def test_sampled_groups_round_trip():
    """The reference's rows (its documents show log-probabilities as text), with an id."""
    logs = {"log(P(a|x,y))": "-1.5", "log(P(y|x))": -10, "log(Q(y|a,x))": -9.25}
    row = {
        "system": "s", "prompt_turns": [{"from": "User", "value": "p"}], "label": "verbosity:2,helpfulness:3.5",
        "responses": [{"from": "Assistant", "value": value} | logs for value in ("r", "")], "id": "7",
    }  # fmt: skip
    samples = tuple(Sample(text, -1.5, -10.0, -9.25) for text in ("r", ""))
    asked = {"verbosity": 2.0, "helpfulness": 3.5}
    expected = Conversation((Turn("user", "p"),), "s", "7", asked=asked, samples=samples)
    assert conversation_from_row(row, HELPSTEER) == conversation_from_row(row, HELPSTEER, "steerlm2") == expected
    again = expected.to_json()
    assert again == row | {"responses": [one | {"log(P(a|x,y))": -1.5} for one in row["responses"]]}
    assert conversation_from_row(json.loads(json.dumps(again)), HELPSTEER) == expected
    assert (
        len({repr(replace(expected, **change).content()) for change in ({}, {"asked": {}}, {"samples": samples[:1]})})
        == 3
    )


def test_conversations_in_parquet(tmp_path):
    rows = [
        {"turns": [{"role": "user", "content": "a", "ratings": None}], "system": "s"},
        {
            "turns": [
                {"role": "user", "content": "b", "ratings": None},
                {"role": "assistant", "content": "c", "ratings": {"humor": 1, "quality": None, "verbosity": None}},
            ],
            "system": None,
        },
    ]
    path = tmp_path / "rows.parquet"
    path.write_bytes(as_parquet(rows))
    got = converted(path, OASST)
    assert [conversation.system for conversation in got] == ["s", None]
    assert got[1].turns == (Turn("user", "b"), Turn("assistant", "c", {"humor": 1.0}))


@pytest.mark.parametrize("example", re.findall(r"```json\n(.*?)```", DOCUMENTATION.read_text(encoding="utf-8"), re.S))
def test_documented_example(example):
    row = json.loads(example)
    if row.keys() == {"prompt"}:  # to answer
        assert prompt_turns(row) == (Turn("user", "Name a prime."),)
        return
    conversation = conversation_from_row(row, HELPSTEER)
    answer = conversation.turns[-1]
    rated = {"helpfulness": 4.0, "verbosity": 2.0}
    if conversation.samples:
        assert (conversation.asked, conversation.samples[0].content) == (rated, "7")
        return
    unrated = {"instruction", "generation", "chosen"} & row.keys() or "gpt" in example
    assert answer == Turn("assistant", "7", None if unrated else rated, answer.predicted_ratings)


def test_documented_csv(tmp_path):
    (example,) = re.findall(r"```text\n(prompt,.*?)```", DOCUMENTATION.read_text(encoding="utf-8"), re.S)
    (tmp_path / "rows.csv").write_text(example, encoding="utf-8")
    assert [c.turns[-1].ratings for c in converted(tmp_path / "rows.csv")] == [
        {"helpfulness": 4.0, "verbosity": 2.0},
        {"helpfulness": 1.0},
    ]


def test_forced_format_settles_an_ambiguous_row():
    row = {"prompt": "p", "response": "r", "instruction": "note", "verbosity": 1}
    with refused(DataError, "helpsteer, alpaca", cure="format"):
        conversation_from_row(row, HELPSTEER)
    assert conversation_from_row(row, HELPSTEER, "helpsteer").turns[1].content == "r"


def test_unknown_format_names_the_known_ones():
    with refused(ConfigError, "helpster", cure="helpsteer"):
        conversation_from_row({}, HELPSTEER, "helpster")


@pytest.mark.parametrize(("row", "unread"), [
    ({"prompt": "p", "response": "r", "verbosity": 3, "stars": 4, "score": [1, 2], "votes": {"up": 3}, "id": 7},
     ["stars", "score", "votes"]),
    ({"prompt": "p", "response": "r", "verbosity": 3, "ok": True, "note": "4", "list": [], "at": None, "margin": 2},
     []),
    ({"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "score": 4}],
      "ratings": {"verbosity": 3}}, ["messages[].score"]),
    # Beside turns, and beside a pair, not even the attributes' own names are read.
    ({"turns": [{"role": "assistant", "content": "a", "ratings": {"verbosity": 3}}], "verbosity": 3,
      "ratings": {"coherence": 4}, "stars": 4, "generation": {"tokens": 3, "model": "m"}},
     ["verbosity", "ratings", "stars"]),
    ({"prompt": "p", "chosen": "a", "rejected": "b", "score_chosen": 9.0, "verbosity": 4, "margin": 1.0},
     ["score_chosen", "verbosity"]),
])  # fmt: skip
def test_numbers_that_nothing_reads(row, unread):
    conversation_from_row(row, HELPSTEER)
    assert list(unread_numbers(row, HELPSTEER)) == unread


def test_hub_configs_and_splits(monkeypatch, tmp_path):
    """What `datasets` says itself, of a folder with two configs in place of the hub."""
    import datasets

    (tmp_path / "README.md").write_text(
        "---\nconfigs:\n- config_name: first\n  data_files:\n  - {split: dev, path: a.jsonl}\n"
        "- config_name: second\n  data_files:\n  - {split: train, path: a.jsonl}\n---\n"
    )
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    load, options = datasets.load_dataset, {"cache_dir": str(tmp_path / "cache")}
    monkeypatch.setattr(datasets, "load_dataset", lambda path, **given: load(str(tmp_path), **given, **options))
    with refused(DataError, "'first'", "'second'", cure="hub:o/n@CONFIG:dev"):
        converted("hub:o/n:dev")
    with refused(DataError, "'dev'", cure="hub:o/n@first:SPLIT"):
        converted("hub:o/n@first")
    with refused(DataError, "'first'", cure="hub:o/n@CONFIG"):
        converted("hub:o/n@third")
    assert len(converted("hub:o/n@first:dev")) == len(converted("hub:o/n@second")) == len(ROWS)
