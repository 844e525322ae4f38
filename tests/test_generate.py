"""`python -m steerjax.generate` on a tiny random model."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import contextmanager

import pytest

from steerjax.bundle import open_bundle
from steerjax.data.conversation import Conversation, Sample, Turn
from steerjax.data.formats import conversation_from_row
from steerjax.errors import DataError
from steerjax.generate import main, parse_arguments
from steerjax.inference.answerer import of_bundle
from steerjax.inference.session import prompt_of, sampling_of
from steerjax.inference.steering import Sampling
from steerjax.schema import HELPSTEER, STEERLM
from tests.hf_folders import CLASSIFIER, TINY, random_tensors, write_folder
from tests.refusals import refused, says
from tests.reward_models import killed

DEFAULTS = {"helpfulness": 4, "coherence": 4}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A chat model's folder that knows its template and attributes."""
    folder = write_folder(tmp_path_factory.mktemp("model"), TINY, random_tensors(TINY))
    about = {"kind": "chat", "template": "extra_id", "attributes": HELPSTEER.to_json(), "default_ratings": DEFAULTS}
    (folder / "steerjax.json").write_text(json.dumps(about))
    return str(folder)


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    """Twelve rows: prompts, and conversations that end with a user turn."""
    file = tmp_path_factory.mktemp("data") / "prompts.jsonl"
    rows = [{"prompt": f"Name a prime above {n}.", "id": f"p{n}"} for n in range(6)]
    history = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello", "ratings": {"verbosity": 1}},
        {"role": "user", "content": "Name a prime. " * 5},
    ]
    rows += [{"system": "Be kind.", "turns": history, "topic": n} for n in range(6)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@contextmanager
def stopped(capsys, *facts: str, cure: str = ""):
    """The command ends with status 2 and an error that says these."""
    with pytest.raises(SystemExit) as caught:
        yield
    assert caught.value.code == 2
    says(capsys.readouterr().err, *facts, cure=cure)


def generate(model, *arguments):
    main(["--model", model, "--max-new-tokens", "6", *map(str, arguments)])


def test_file_to_file(model, prompts, tmp_path, capsys):
    output = tmp_path / "out.jsonl"
    arguments = ("--input", prompts, "--output", output, "--attributes", "verbosity=1,coherence=none",
                 "--sweep", "complexity=0,4", "--samples", 2, "--seed", 5)  # fmt: skip
    generate(model, *arguments)
    rows = rows_of(output)
    assert len(rows) == 12 * 2 * 2
    assert [row["id"] for row in rows[:5]] == ["p0/0", "p0/1", "p0/2", "p0/3", "p1/0"]
    assert rows[-1]["id"] == f"{prompts}:12/3"
    assert rows[-1]["topic"] == 5
    for row in rows:
        conversation = conversation_from_row(row, HELPSTEER)  # the rows are the conversation format
        assert conversation.turns[-1].role == "assistant"
        assert conversation.turns[-1].ratings is None  # what was asked for is no rating
    assert rows[-1]["turns"][1]["ratings"] == {"verbosity": 1}
    made = rows[3]["generation"]
    assert made["attributes"] == {"helpfulness": 4, "verbosity": 1, "complexity": 4}
    assert made["sampling"] == {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "seed": 5, "max_new_tokens": 6}
    assert (made["sample"], made["model"]) == (1, model)
    assert made["finish"] in ("stop", "length")
    assert "48 answers" in capsys.readouterr().out

    before = output.read_bytes()
    generate(model, *arguments)  # done already
    assert output.read_bytes() == before
    with stopped(capsys, str(output), "sampling", "seed"):
        generate(model, *arguments[:-1], 6)

    # Stopped after 17 rows and in the middle of a line, another batch size: the same file.
    lines = before.splitlines(keepends=True)
    killed(output, b"".join(lines[:17]) + lines[17][:9])
    generate(model, *arguments, "--batch-size", 1)
    assert output.read_bytes() == before


def test_bootstrapping(model, tmp_path):
    """Combinations of the best rows, drawn by row; each prompt once; the old answers are gone."""
    data, output = tmp_path / "rated.jsonl", tmp_path / "out.jsonl"
    best = [(4, 0), (4, 3)]
    rows = []
    for n in range(10):
        for helpfulness, verbosity in [*best, (1, 4)]:
            rated = {"helpfulness": helpfulness, "verbosity": verbosity, "correctness": None}
            rows.append({"prompt": f"Question {n}?", "response": f"old {verbosity}", **rated})
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    generate(model, "--input", data, "--output", output, "--combinations", data, "--replace-answer", "--samples", 2)
    made = rows_of(output)
    assert len(made) == 20
    assert len(rows_of(tmp_path / "out.jsonl.skipped.jsonl")) == 20
    asked = [
        (row["generation"]["attributes"]["helpfulness"], row["generation"]["attributes"]["verbosity"]) for row in made
    ]
    assert set(asked) == set(best)
    assert asked[::2] == asked[1::2]  # the samples of a row share it
    assert all(row["generation"]["attributes"].keys() == {"helpfulness", "verbosity"} for row in made)
    assert made[0]["generation"]["sampling"]["top_k"] == 50
    assert not any(re.search(r"old \d", turn["content"]) for row in made for turn in row["turns"])


def test_prompt_to_the_terminal(model, capsys):
    generate(model, "--prompt", "Name a prime.", "--attributes", "verbosity=1")
    streamed = capsys.readouterr().out
    assert streamed.strip()
    generate(model, "--prompt", "Name a prime.", "--sweep", "verbosity=0..2")
    out = capsys.readouterr().out
    assert out.count("--- helpfulness=4 coherence=4 verbosity=") == 3
    assert f"verbosity=1: {len(streamed.split())} words, " in out
    assert streamed.strip() in out
    generate(model, "--prompt", "Name a prime.", "--sweep", "verbosity=2..1")
    assert re.findall(r"--- .*verbosity=(\d)", capsys.readouterr().out) == ["2", "1"]


@pytest.mark.slow
def test_killed_and_resumed_is_uninterrupted(model, prompts, tmp_path):
    """SIGKILL while rows are written; the last run finishes, and the bytes are those of one run."""
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
                                "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "cache")}  # fmt: skip

    def start(name):
        command = [sys.executable, "-m", "steerjax.generate", "--model", model, "--input", prompts, "--output",
                   tmp_path / name, "--temperature", "1", "--max-new-tokens", "100", "--batch-size", "1"]  # fmt: skip
        return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)

    assert start("whole.jsonl").wait(300) == 0
    partial, lines = tmp_path / "killed.jsonl.partial", 0
    for wanted in (2, 7):
        child = start("killed.jsonl")
        while child.poll() is None and not (partial.exists() and partial.read_bytes().count(b"\n") >= wanted):
            time.sleep(0.002)
        child.send_signal(signal.SIGKILL)
        child.wait()
        lines = partial.read_bytes().count(b"\n")
        assert wanted <= lines < 12
    assert start("killed.jsonl").wait(300) == 0
    assert (tmp_path / "killed.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


@pytest.mark.parametrize(("arguments", "facts"), [
    (["--prompt", "x"], ("--model", "--server")),
    (["--model", "m"], ("--prompt", "--input")),
    (["--model", "m", "--input", "f"], ("--input", "--output")),
    (["--model", "m", "--prompt", "x", "--samples", "2", "--temperature", "0"], ("--samples", "--temperature 0")),
    (["--model", "m", "--prompt", "x", "--combinations", "f"], ("--combinations",)),
    (["--model", "m", "--prompt", "x", "--top-p", "2"], ("top_p", "2")),
])  # fmt: skip
def test_options_that_do_not_fit(arguments, facts, capsys):
    with stopped(capsys, *facts):
        main(arguments)


def test_refusals_name_what_is_wrong(model, prompts, tmp_path, capsys):
    for arguments, facts in (
        (["--prompt", "x", "--attributes", "kindness=4"], ["--attributes", "kindness"]),
        (["--prompt", "x", "--attributes", "verbosity=9"], ["--attributes", "verbosity", "9", "0..4"]),
        (["--prompt", "x", "--sweep", "verbosity=0..9"], ["--sweep", "verbosity", "9", "0..4"]),
        (["--prompt", "half \ud83d"], ["prompt", "surrogate"]),
        (["--prompt", "long " * 600], ["512", "--max-new-tokens"]),
        (["--prompt", "x", "--mesh", "depth=2"], ["--mesh.depth"]),
        (["--prompt", "x", "--template", "chatml"], ["extra_id", "chatml"]),
        (
            ["--input", "embedded:helpsteer", "--output", tmp_path / "o.jsonl"],
            ["embedded:helpsteer:1", "--replace-answer"],
        ),
    ):
        with stopped(capsys, *facts):
            generate(model, *arguments)
    plain = write_folder(tmp_path / "plain", TINY, random_tensors(TINY))
    with stopped(capsys, "attributes", cure="--schema"):
        generate(str(plain), "--template", "extra_id", "--prompt", "x", "--attributes", "verbosity=1")
    reward = write_folder(tmp_path / "reward", TINY | CLASSIFIER, random_tensors(TINY | CLASSIFIER))
    with stopped(capsys, str(reward), "reward model"):
        generate(str(reward), "--template", "extra_id", "--prompt", "x")


def test_bad_rows_are_listed(model, tmp_path, capsys):
    data, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    asked = {"turns": [{"role": "user", "content": "b"}]}
    rows = [{"prompt": "a <extra_id_1>Assistant"}, {"prompt": ["?"]}, asked | {"n": float("inf")},
            asked | {"n": float("nan"), "half": "\ud83d"}, {"prompt": "c", "id": 7}]  # fmt: skip
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with stopped(capsys, f"{data}:2", "prompt"):
        generate(model, "--input", data, "--output", output)
    assert not list(tmp_path.glob("out*"))
    generate(model, "--input", data, "--output", output, "--on-bad-row", "skip")
    made = rows_of(output)
    assert [row["turns"][0]["content"] for row in made] == ["a <extra_id_1>Assistant", "b", "c"]
    assert (made[1]["n"], made[1]["half"], made[2]["id"]) == (None, "\ud83d", "7")
    skipped = rows_of(tmp_path / "out.jsonl.skipped.jsonl")
    assert [row["line"] for row in skipped] == [2, 3]
    assert "'n'" in skipped[1]["reason"]


def test_rows_to_answer():
    chat = {"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "q"}]}
    assert prompt_of(chat, STEERLM, False).turns[-1].content == "q"
    several = {"prompt": "a\n<extra_id_1>Assistant\nb\n<extra_id_1>User\nc", "response": "d", "helpfulness": 4}
    assert [turn.content for turn in prompt_of(several, STEERLM, True).turns] == [several["prompt"]]
    assert [turn.content for turn in prompt_of(several, STEERLM, True, "helpsteer2").turns] == ["a", "b", "c"]
    with refused(DataError, "turns", cure="--replace-answer"):
        prompt_of(several, STEERLM, False)
    talk = Conversation((Turn("user", "q"),), id="7", asked={"humor": 1.0}, samples=(Sample("r", -1.0, -2.0, -3.0),))
    assert prompt_of(talk.to_json(), STEERLM, False) == Conversation((Turn("user", "q"),), id="7")
    pair = Conversation((Turn("user", "q"), Turn("assistant", "good")), id="7", strength=2.0,
                        rejected=(Turn("user", "q"), Turn("assistant", "bad")))  # fmt: skip
    assert prompt_of(pair.to_json(), STEERLM, True) == Conversation((Turn("user", "q"),), id="7")


def test_a_new_answer_is_not_paired_with_an_old_one(model, tmp_path):
    data, output = tmp_path / "pairs.jsonl", tmp_path / "out.jsonl"
    sides = [[{"role": "user", "content": "q"}, {"role": "assistant", "content": text}] for text in ("good", "bad")]
    row = {"turns": sides[0], "rejected": sides[1], "strength": 2.0, "topic": "t"}
    data.write_text(json.dumps(row) + "\n")
    generate(model, "--input", data, "--output", output, "--replace-answer")
    (made,) = rows_of(output)
    assert made.keys() == {"system", "turns", "id", "topic", "generation"}


def test_labels_of_earlier_answers(tmp_path):
    """As the answer's own: of a model that does not name its attributes, where --schema does."""
    bundle = open_bundle(write_folder(tmp_path / "plain", TINY, random_tensors(TINY)), template="extra_id")
    talk = Conversation((Turn("user", "q"), Turn("assistant", "r", {"verbosity": 1.0}), Turn("user", "why?")))

    def prompt(schema, setting):
        backend = of_bundle(bundle, schema).backend.drawing(Sampling(max_new_tokens=1), 1)
        return bundle.description.tokenizer.decode(backend.prepare(talk, [setting], 1).prompts[0].tolist())

    said = prompt("helpsteer", {"verbosity": 3})
    assert said.index("verbosity:1") < said.index("why?") < said.index("verbosity:3")
    assert "verbosity" not in prompt(None, {})


def test_what_asks_to_sample():
    def temperature(*arguments):
        return sampling_of(parse_arguments(["--prompt", "x", *arguments])).temperature

    assert temperature() == 0
    assert temperature("--samples", "2") == temperature("--top-k", "5") == temperature("--top-p", "0.9") == 1
    assert temperature("--top-k", "5", "--temperature", "0.5") == 0.5
