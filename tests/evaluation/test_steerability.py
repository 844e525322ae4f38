"""The suite through the command: answers of a file, and answered here over a grid; resumed, and refused."""

import contextlib
import io
import json
import sys
import threading

import pytest
from safetensors.numpy import load_file, save_file

from steerjax.annotate import main as annotate
from steerjax.evaluate import main
from steerjax.evaluation import steerability
from steerjax.evaluation.text_measures import flesch_kincaid, text_measures
from steerjax.schema import HELPSTEER
from tests.hf_folders import TINY, random_tensors, write_folder
from tests.inference.test_server import FakeServer
from tests.refusals import says
from tests.reward_models import killed, read_rows, reward_folder, some_conversations, write_rows


def evaluate(output, *words) -> dict:
    main(["--suite", "steerability", "--output", str(output), *(str(word) for word in words)])
    return json.loads((output / "results.json").read_text(), parse_constant=pytest.fail)  # which NaN would be


def refusal(output, *words) -> str:
    with pytest.raises(SystemExit) as caught, contextlib.redirect_stderr(io.StringIO()) as said:
        evaluate(output, *words)
    assert caught.value.code == 2
    return said.getvalue()


@pytest.fixture(scope="module")
def reward(tmp_path_factory):
    return reward_folder(tmp_path_factory.mktemp("reward") / "rm", context=256)


@pytest.fixture(scope="module")
def chat(tmp_path_factory):
    folder = write_folder(tmp_path_factory.mktemp("chat"), TINY, random_tensors(TINY))
    defaults = {"helpfulness": 4, "verbosity": 2}
    about = {"kind": "chat", "template": "extra_id", "attributes": HELPSTEER.to_json(), "default_ratings": defaults}
    (folder / "steerjax.json").write_text(json.dumps(about))
    return folder


@pytest.fixture
def prompts(tmp_path):
    return write_rows(tmp_path / "prompts.jsonl", [{"prompt": f"Name a prime above {n // 2}."} for n in range(8)])


@pytest.fixture
def answers(tmp_path):
    """What generate writes: longer answers for a higher verbosity, one of them empty."""
    rows = [
        {"system": None, "id": f"{prompt}/{value}", "turns": [
            {"role": "user", "content": f"Question {prompt}?"},
            {"role": "assistant", "content": "word " * (2 * value + prompt)}],
         "generation": {"attributes": {"helpfulness": 4.0, "verbosity": float(value)}, "sample": 0}}
        for prompt in range(4) for value in range(3)
    ]  # fmt: skip
    rows[0]["turns"][1]["content"] = ""
    return write_rows(tmp_path / "answers.jsonl", rows)


@pytest.mark.slow
def test_answers_of_a_file(answers, reward, tmp_path, capsys):
    plain = evaluate(tmp_path / "plain", "--input", answers)
    figures = plain["figures"]
    assert [figures[f"verbosity={n}/characters"]["count"] for n in range(3)] == [4, 4, 4]
    assert figures["verbosity/slope/characters"]["value"] == pytest.approx(10, abs=1)
    assert figures["verbosity/spearman/characters"]["value"] > 0.5
    assert figures["distance"] == {"value": None, "count": 0, "interval": None}
    assert plain["neutral"] == {"helpfulness": 4, "verbosity": 1}
    assert plain["attributes"]["verbosity"]["monotone"]["words"] is True
    said = capsys.readouterr().out
    assert "no answer has predicted ratings" in said
    assert "helpfulness: one rating alone was asked for" in said
    assert not (tmp_path / "plain/leakage.png").exists()

    rated = evaluate(tmp_path / "rated", "--input", answers, "--reward-model", reward, "--template", "extra_id")
    assert rated["figures"]["distance"]["count"] == 11  # there is nothing to rate in an empty answer
    assert rated["figures"]["steerbench/steering error"]["count"] == 7
    assert set(rated["goal_space"]) == set(HELPSTEER.names)
    assert "leakage/verbosity/coherence" in rated["figures"]
    written = {path.name for path in (tmp_path / "rated").iterdir()}
    assert {"curves.png", "leakage.png", "obtained.png", "side_by_side.html", "side_by_side.md"} <= written
    report = (tmp_path / "rated/report.md").read_text()
    assert all(f"({name})" in report for name in written - {"report.md", "report.html", "rows.jsonl.settings.json"})

    # Annotate first comes to the same; it leaves `generation` as it was.
    filled = write_rows(tmp_path / "filled.jsonl", read_rows(answers)[1:])
    annotate(["--model", str(reward), "--template", "extra_id", "--input", str(filled), "--output",
              str(tmp_path / "annotated.jsonl")])  # fmt: skip
    third = evaluate(tmp_path / "third", "--input", tmp_path / "annotated.jsonl", "--schema", "helpsteer")
    for name in ("verbosity=2/predicted", "verbosity/slope/predicted", "distance", "steerbench/steering error"):
        assert third["figures"][name]["value"] == pytest.approx(rated["figures"][name]["value"], abs=1e-4), name


@pytest.mark.slow
def test_a_grid_is_answered_rated_and_resumed(chat, reward, prompts, tmp_path, monkeypatch):
    output = tmp_path / "out"
    words = ("--model", chat, "--prompts", prompts, "--grid", "verbosity=0,2,4", "--grid", "complexity=0,4",
             "--limit", 3, "--max-new-tokens", 6, "--reward-model", reward, "--reward-template", "extra_id",
             "--schema", "helpsteer")  # fmt: skip
    whole = evaluate(output, *words)
    made, rows = read_rows(output / "answers.jsonl"), read_rows(output / "rows.jsonl")
    base = {"helpfulness": 4, "verbosity": 2}
    changes = ({}, {"verbosity": 0}, {"verbosity": 4}, {"complexity": 0}, {"complexity": 4})
    assert [row["generation"]["attributes"] for row in made] == 3 * [base | change for change in changes]
    assert len({row["turns"][0]["content"] for row in made}) == 3  # prompts that stand twice are answered once
    assert (whole["neutral"], [row["neutral"] for row in rows[:5]]) == (base, [True] + 4 * [False])
    assert whole["figures"]["verbosity=2/predicted"]["count"] == 3
    assert whole["figures"]["steerbench/orthogonality"]["count"] == sum(
        bool(row["predicted"]) and bool(rows[place // 5 * 5]["predicted"])
        for place, row in enumerate(rows) if not row["neutral"]
    )  # fmt: skip

    # Killed while it answered, then while it rated: the same figures, and nothing is done twice.
    kept = {name: (output / name).read_bytes() for name in ("answers.jsonl", "rows.jsonl")}
    for name, lines in kept.items():
        killed(output / name, b"".join(lines.splitlines(keepends=True)[:7]) + b'{"half')
    assert evaluate(output, *words)["figures"] == whole["figures"]
    assert {name: (output / name).read_bytes() for name in kept} == kept
    says(refusal(output, *words, "--seed", 3), "answers.jsonl", "seed")


def test_a_server_that_goes_down_half_way(prompts, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "steerjax.inference.answerer.of_server.__kwdefaults__", {"schema": None, "template": None, "attempts": 1}
    )
    with FakeServer() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        words = ("--server", server.url, "--prompts", prompts, "--grid", "verbosity=0,4", "--batch-size", 1)
        says(refusal(tmp_path / "out", *words[:4]), cure="--grid")
        taken = server.RequestHandlerClass.do_POST

        def fails_later(handler):
            server.failures = int(len(server.bodies) == 7)
            taken(handler)

        monkeypatch.setattr(server.RequestHandlerClass, "do_POST", fails_later)
        says(refusal(tmp_path / "out", *words), server.url)
        kept = read_rows(tmp_path / "out/answers.jsonl.partial")
        assert len(kept) == 6  # two prompts of three requests; the third was under way
        found = evaluate(tmp_path / "out", *words)
        asked = [body["messages"][0]["content"] for body in server.bodies]
        assert asked.count("Name a prime above 0.") == asked.count("Name a prime above 1.") == 3  # not asked again
        server.shutdown()
    assert read_rows(tmp_path / "out/answers.jsonl")[:6] == kept
    assert found["figures"]["verbosity=4/characters"]["count"] == 4
    assert found["neutral"] == {}  # a server does not say its model's default ratings
    assert found["figures"]["cut"]["value"] == 1


@pytest.mark.parametrize(("words", "facts", "cure"), [
    ((), (), "--input"),
    (("--input", "{answers}", "--grid", "verbosity"), ("--input",), "--grid"),
    (("--input", "{plain}"), ("{plain}:1", "row.generation"), "generate"),
    (("--input", "{empty}"), ("{empty}",), ""),
    (("--input", "{answers}x"), ("{answers}x",), ""),
    (("--input", "{answers}", "--attributes", "kindness=1"), ("kindness",), "verbosity"),
    (("--input", "{answers}", "--reward-model", "{chat}"), ("{chat}", "chat model"), "reward"),
    (("--input", "{wide}", "--schema", "oasst"), ("{wide}:1", "quality", "7", "0..4"), "--schema"),
    (("--model", "{reward}", "--template", "extra_id", "--prompts", "{prompts}"), ("{reward}", "reward model"), ""),
    (("--model", "{chat}", "--prompts", "{empty}"), ("{empty}",), "prompt"),
    (("--model", "{chat}", "--prompts", "{prompts}", "--grid", "verbosity=9"), ("verbosity", "9", "0..4"), "verbosity"),
    (("--model", "{chat}", "--prompts", "{prompts}", "--grid", "verbosity=2"), ("--grid", "neutral"), ""),
    (("--model", "{chat}", "--prompts", "{prompts}", "--limit", "0"), ("--limit",), ""),
])  # fmt: skip
def test_refusals(words, facts, cure, answers, prompts, chat, reward, tmp_path):
    wide = read_rows(answers)[:1]
    wide[0]["generation"]["attributes"] = {"quality": 7}
    files = {
        "plain": write_rows(tmp_path / "plain.jsonl", some_conversations(1)), "prompts": prompts, "chat": chat,
        "empty": write_rows(tmp_path / "empty.jsonl", []), "wide": write_rows(tmp_path / "wide.jsonl", wide),
        "answers": answers, "reward": reward,
    }  # fmt: skip
    message = refusal(tmp_path / "out", *(word.format(**files) for word in words))
    says(message, *(fact.format(**files) for fact in facts), cure=cure)
    assert not (tmp_path / "out/results.json").exists()


def test_a_reward_model_that_predicts_nan(answers, tmp_path):
    broken = reward_folder(tmp_path / "broken", context=256)
    tensors = load_file(broken / "model.safetensors")
    tensors["score.weight"][:] = 3e38  # finite, and no prediction is
    save_file(tensors, broken / "model.safetensors")
    message = refusal(tmp_path / "out", "--input", answers, "--reward-model", broken, "--template", "extra_id")
    says(message, f"{answers}:2", "helpfulness", "predicts", cure="model")


def test_own_attributes(tmp_path, capsys):
    rows = [
        {"system": None, "turns": [{"role": "user", "content": f"Question {prompt}?"},
                                   {"role": "assistant", "content": "word " * (value + prompt)}],
         "generation": {"attributes": {"warmth": value, "evidence": 10}}}
        for prompt in range(3) for value in (1, 5, 9)
    ]  # fmt: skip
    source = write_rows(tmp_path / "answers.jsonl", rows)
    found = evaluate(tmp_path / "out", "--input", source)
    assert found["ranges"] == {"warmth": [1, 9], "evidence": [10, 11]}
    assert found["figures"]["warmth/slope/words"]["value"] == pytest.approx(1)
    assert found["summary"]["ranges told from the answers"].startswith("warmth 1 to 9, evidence 10 to 11")
    given = evaluate(tmp_path / "given", "--input", source, "--attributes", "warmth=1")
    assert (found["neutral"]["warmth"], given["neutral"]["warmth"]) == (5, 1)


def test_rows_follow_from_settings_alone(answers, reward, tmp_path):
    """What a comparison reads is in rows.jsonl."""
    words = ("--input", answers, "--reward-model", reward, "--template", "extra_id")
    found = evaluate(tmp_path / "out", *words)["figures"]
    again = steerability.measure(steerability.columns(read_rows(tmp_path / "out/rows.jsonl")))
    assert {name: value for name, (value, _) in again.items() if value == value} == pytest.approx(
        {name: entry["value"] for name, entry in found.items() if entry["value"] is not None}
    )


@pytest.mark.short
def test_measures_of_a_text():
    assert text_measures("One two.\n three", None) == {"characters": 15, "words": 3, "grade": None}
    assert text_measures("", lambda text: 0.0) == {"characters": 0, "words": 0, "grade": None}
    assert text_measures("...", lambda text: 0.0)["grade"] is None
    assert text_measures("A word.", lambda text: 3.5)["grade"] == 3.5


@pytest.mark.short
@pytest.mark.parametrize("error", [ImportError, LookupError])
def test_textstat_that_cannot_be_used_is_said(error, monkeypatch):
    class Broken:
        def __getattr__(self, name):
            raise error(name)

    monkeypatch.setitem(sys.modules, "textstat", Broken())
    measure, which = flesch_kincaid()
    assert measure is None
    says(which, "textstat", cure="steerjax[evaluation]")


@pytest.mark.short
def test_the_grade_of_a_plain_text():
    """By hand: 0.39 x 6 words a sentence + 11.8 x 1 syllable a word - 15.59 (Kincaid and others, 1975)."""
    pytest.importorskip("textstat")
    measure, which = flesch_kincaid()
    assert which.startswith("textstat ")
    assert measure("The cat sat on the mat.") == pytest.approx(0.39 * 6 + 11.8 - 15.59, abs=0.06)


def test_help_names_both_forms(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["--suite", "steerability", "--help"])
    assert caught.value.code == 0
    said = capsys.readouterr().out
    assert "--reward-model" in said
    assert "--grid" in said
