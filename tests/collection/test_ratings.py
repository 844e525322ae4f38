"""Label Studio's export -> rows and a report. `label_studio/` is what scripts/label_studio_round_trip.py --save left of
Label Studio 1.23.2: the key, the export, and what its simulated raters gave."""

import copy
import json
import shutil
from pathlib import Path

import pytest

from steerjax.collect import main
from steerjax.collection.export import read_exports
from steerjax.collection.tasks import read_key
from steerjax.data.loading import load_conversations
from steerjax.errors import DataError
from steerjax.evaluation.attributes import _raters
from tests.refusals import refused, says
from tests.reward_models import read_rows

REAL = Path(__file__).with_name("label_studio")
KEY = read_key(REAL / "key.json")
EXPORT = json.loads((REAL / "export.json").read_text())
GIVEN = json.loads((REAL / "given.json").read_text())


@pytest.fixture(scope="module")
def collected(tmp_path_factory):
    """The command's folder, without a rule."""
    folder = tmp_path_factory.mktemp("collected")
    main(["ratings", "--key", str(REAL / "key.json"), "--export", str(REAL / "export.json"), "--output", str(folder)])
    return folder


def test_every_rating_comes_back_under_its_rater(collected):
    rows = {row["id"]: row for row in read_rows(collected / "ratings.jsonl")}
    assert rows.keys() == GIVEN.keys()
    for name, row in rows.items():
        for attribute in KEY.schema.names:
            back = dict(zip(row["raters"][attribute], row[attribute], strict=True))
            assert back == {rater: ratings[attribute] for rater, ratings in GIVEN[name].items()}
        assert row["sources"] == KEY.tasks[name].sources
        assert row["messages"][-1]["content"] == KEY.tasks[name].conversation["turns"][-1]["content"]
    assert {row["source"] for row in rows.values()} <= {"model A", "model B", "model A = model B"}
    assert sum(row["system"] == "Be kind." for row in rows.values()) == 2


def test_readers_and_the_suite_take_the_rows(collected):
    file = str(collected / "ratings.jsonl")
    for conversation in load_conversations([file], KEY.schema).conversations:
        for attribute, mean in conversation.turns[-1].ratings.items():
            theirs = [ratings[attribute] for ratings in GIVEN[conversation.id].values()]
            assert mean == pytest.approx(sum(theirs) / len(theirs))
    raters = _raters([file], KEY.schema)
    assert len(raters) == len(GIVEN)
    assert max(len(each["clarity"]) for each in raters.values()) == 3


def test_report_says_what_was_found_and_what_was_not_used(collected):
    results = json.loads((collected / "results.json").read_text())
    summary = results["summary"]
    assert summary["annotations that raters skipped"] == "1"
    assert summary["annotations by a rater who had rated the task before"] == "1"
    assert summary["tasks without ratings"] == "1"
    assert len(results["pairs"]) == 12  # three pairs of raters, four attributes
    assert results["figures"]["clarity/alpha"]["count"] == sum(len(ratings) for ratings in GIVEN.values())
    assert results["disagreements"][0]["share"] == max(each["share"] for each in results["disagreements"])
    numbers = {task["data"]["task"]: task["id"] for task in EXPORT}
    assert all(each["task"] == numbers[each["id"]] for each in results["disagreements"])
    assert set(results["sources"]) == {f"model {m}: {a}" for m in "AB" for a in KEY.schema.names}
    report = (collected / "report.md").read_text()
    assert "NaN" not in (collected / "results.json").read_text()
    assert "Rater 4" in report  # who was made harsh
    assert "agreement.png" in report
    assert (collected / "agreement.png").stat().st_size > 10_000


def test_helpsteer2s_rule(tmp_path):
    shutil.copy(REAL / "export.json", tmp_path / "export.json")
    given = ["--key", str(REAL / "key.json"), "--export", str(tmp_path / "export.json"), "--helpsteer2"]
    main(["ratings", *given, "--output", str(tmp_path / "out")])
    rows = {row["id"]: row["helpfulness"] for row in read_rows(tmp_path / "out" / "ratings.jsonl")}
    values = {name: [each["helpfulness"] for each in ratings.values()] for name, ratings in GIVEN.items()}
    assert rows == {name: v for name, v in values.items() if len(v) == 3 and max(v) - min(v) <= 2}
    more = json.loads((tmp_path / "out" / "results.json").read_text())["more_raters"]
    assert len(more) == len(GIVEN) - len(rows) > 0


def edited(folder: Path, edit) -> str:
    """The export with a task that all three have rated once changed."""
    tasks = copy.deepcopy(EXPORT)
    full = (n for n, t in enumerate(tasks) if [a["was_cancelled"] for a in t["annotations"]] == [False] * 3)
    place = next(full)
    edit(tasks[place])
    file = folder / "export.json"
    file.write_text(json.dumps(tasks))
    return str(file)


def set_result(attribute: str, **value):
    def edit(task):
        next(r for r in task["annotations"][0]["result"] if r["from_name"] == attribute).update(value)

    return edit


BAD = {
    "out of range": (set_result("depth", value={"number": 250}), ("depth", "250")),
    "no choice of ours": (set_result("clarity", value={"choices": ["good"]}), ("clarity", "good")),
    "two choices": (set_result("clarity", value={"choices": ["1", "2"]}), ("clarity",)),
    "no value": (set_result("clarity", value={}), ("clarity",)),
    "another kind": (set_result("clarity", type="taxonomy"), ("clarity",)),
    "one attribute twice": (set_result("clarity", from_name="helpfulness"), ("helpfulness",)),
    "nobody": (lambda task: task["annotations"][0].update(completed_by=None), ("completed_by",)),
    "another project": (lambda task: task["data"].update(task="0123abcd-01"), ("data.task", "0123abcd-01")),
    "a task of somebody": (lambda task: task["data"].pop("task"), ("data.task",)),
    "another answer": (lambda task: task["data"].update(response="x"), ("data.response",)),
    "JSON-MIN": (lambda task: task.pop("annotations"), ("annotations",)),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_tasks_are_refused_or_listed(name, tmp_path):
    edit, facts = BAD[name]
    file = edited(tmp_path, edit)
    tasks = json.loads(Path(file).read_text())
    (number,) = (new["id"] for new, old in zip(tasks, EXPORT, strict=True) if new != old)
    line = [task["id"] for task in tasks].index(number) + 1
    with refused(DataError, f"{file}:{line}", f"task {number}", *facts):
        read_exports([file], KEY)
    found = read_exports([file], KEY, on_bad_row="skip")
    (skipped,) = found.skipped
    assert (skipped.file, skipped.line) == (file, line)
    assert str(number) in skipped.reason
    assert len(found.ratings) == len(GIVEN) - 1


def test_what_is_counted(tmp_path):
    def edit(task):
        task["annotations"][0]["result"].append({"from_name": "comment", "type": "textarea", "value": {"text": ["hm"]}})
        task["annotations"][1]["result"] = []
        task["annotations"][2]["completed_by"] = {"id": 9, "email": "somebody@example.com"}

    found = read_exports([edited(tmp_path, edit)], KEY)
    assert found.counts["results of 'comment', which is no attribute"] == 1
    assert found.counts["annotations without a rating"] == 1
    raters = {rater for each in found.ratings.values() for rater in each}
    assert "9" in raters
    assert not any("@" in rater for rater in raters)


def test_of_two_annotations_of_one_rater_the_later_counts():
    """Whatever their order; an export that is given twice changes nothing."""
    file = str(REAL / "export.json")
    once, twice = read_exports([file], KEY), read_exports([file, file], KEY)
    assert once.ratings == twice.ratings == {name: dict(ratings) for name, ratings in GIVEN.items()}


@pytest.mark.parametrize(
    ("text", "facts"),
    [
        ("[]", ("export.json",)),
        ("{", ("export.json", "JSON")),
        ('[{"id": 1, "clarity": "3"}]', ("task 1", "annotations")),
        (json.dumps([{**task, "annotations": []} for task in EXPORT]), ("export.json", "no rating")),
        (json.dumps([{**t, "annotations": [{**a, "was_cancelled": True} for a in t["annotations"]]} for t in EXPORT]),
         ("export.json", "no rating", "skipped")),
    ],
)  # fmt: skip
def test_exports_without_ratings(text, facts, tmp_path, capsys):
    (tmp_path / "export.json").write_text(text)
    given = ["--key", str(REAL / "key.json"), "--export", str(tmp_path / "export.json")]
    with pytest.raises(SystemExit) as ended:
        main(["ratings", *given, "--output", str(tmp_path / "out")])
    assert ended.value.code == 2
    says(capsys.readouterr().err, *facts)


@pytest.mark.parametrize(
    ("arguments", "facts"),
    [
        (["--by", "wit"], ("wit", "clarity")),
        (["--agreeing", "1"], ("--agreeing",)),
        (["--least-raters", "9"], ("few",)),
    ],
)
def test_rules_that_do_not_fit(arguments, facts, tmp_path, capsys):
    given = ["--key", str(REAL / "key.json"), "--export", str(REAL / "export.json"), "--output", str(tmp_path / "out")]
    with pytest.raises(SystemExit):
        main(["ratings", *given, *arguments])
    error = capsys.readouterr().err
    says(error, *(fact for fact in facts if fact != "few"))
