"""MT-Bench against FastChat's prompts, ratings and means; the whole command against made-up servers that fail."""

import asyncio
import contextlib
import hashlib
import importlib
import io
import json
import os
import shutil
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

from steerjax.evaluate import main
from steerjax.evaluation import mt_bench
from steerjax.evaluation.mt_bench import CATEGORIES, columns, measure, plot_compared
from steerjax.evaluation.mt_bench_answers import read_questions
from steerjax.evaluation.mt_bench_judge import parse_rating, prompted_call, prompts
from steerjax.inference.job import Output
from steerjax.report.figures import figures
from tests.hf_folders import TINY, random_tensors, write_folder
from tests.refusals import says
from tests.reward_models import read_rows, reward_folder, write_rows

# Of FastChat's judge_prompts.jsonl (commit 0e6d3e4): sha256 of system prompt, zero byte, template.
GOLDEN = {
    "single-v1": "7d276fe1d4b3f18f09cee44c27895d39be8ee425fdb364476fa66171dc5c5180",
    "single-math-v1": "226191a3df0fe7a9bc4c09ff94caefec3a8dc2ee418df85210c1080932bb0122",
    "single-v1-multi-turn": "a91a5b4266b4e3774f6408c1b0b05de1202843b72b58925710a9efa56b3fa636",
    "single-math-v1-multi-turn": "572e5843611206971e4b74650e66420ea57fef99e1f59d180c5e64e8442eb9b3",
}
# What FastChat's run_judge_single makes of a judgment; None: it ends with an error.
RATINGS = {
    "Rating: [[7]]": 7, "Rating: [[7.5]]": 7.5, "Rating: [[7.]]": 7.0, "Rating: [7]": 7, "Rating: 7": -1,
    "[[10]]": 10, "[[100]]": 100, "[[0]]": 0, "[[-1]]": -1, "[[7/10]]": -1, "[[ 7 ]]": -1, "[[7]] no, [[8]]": 7,
    "see [1]. Rating: [[9]]": 9, "see [1]. Rating: 9": 1, "$ERROR$": -1, "": -1, "[[rating]]": -1, "[[.5]]": -1,
    "[[7,8]]": -1, "[[07]]": None, "[[٧]]": None, f"[[{'9' * 400}]]": None, f"[[{'9' * 5000}]]": None,
}  # fmt: skip
ABOUT = {"id": "x", "created": 1, "object": "chat.completion"}


def test_prompts_are_fastchats_byte_for_byte():
    made = {
        name: hashlib.sha256(f"{row['system_prompt']}\0{row['prompt_template']}".encode()).hexdigest()
        for name, row in prompts().items()
    }
    assert made == GOLDEN


def test_a_prompt_written_out():
    """Texts with braces, as code has them, are put in as they are."""
    call = prompted_call(111, ("Q1 {a}", "Q2"), ("A1 {0}", "A2"), ("R1", "R2"))
    assert call.prompt == "single-math-v1-multi-turn"
    assert call.system.startswith("Please act as an impartial judge")
    assert call.system.endswith('"Rating: [[5]]".\n\n')
    assert call.user == (
        "<|The Start of Reference Answer|>\n\n### User:\nQ1 {a}\n\n### Reference answer:\nR1\n\n"
        "### User:\nQ2\n\n### Reference answer:\nR2\n\n<|The End of Reference Answer|>\n\n\n"
        "<|The Start of Assistant A's Conversation with User|>\n\n### User:\nQ1 {a}\n\n### Assistant A:\nA1 {0}\n\n"
        "### User:\nQ2\n\n### Assistant A:\nA2\n\n<|The End of Assistant A's Conversation with User|>"
    )
    first = prompted_call(81, ("Q1", "Q2"), ("A1",), None)
    assert (first.prompt, first.turn, first.system) == ("single-v1", 1, "You are a helpful assistant.")
    assert first.user.endswith(
        "[Question]\nQ1\n\n[The Start of Assistant's Answer]\nA1\n[The End of Assistant's Answer]"
    )


@pytest.mark.parametrize(("judgment", "rating"), RATINGS.items(), ids=[text[:24] for text in RATINGS])
def test_ratings(judgment, rating):
    found = parse_rating(judgment)
    assert (found, type(found)) == ((-1, int) if rating is None else (rating, type(rating)))


def scored(*pairs, categories=CATEGORIES):
    return [
        {"question_id": n, "category": categories[n % len(categories)], "scores": {"MT-Bench": list(pair)}}
        for n, pair in enumerate(pairs)
    ]


def test_means_as_fastchats_show_result():
    """Over judgments, not over turns: with some missing the average is not the mean of the two turns'."""
    found = measure(columns(scored((7, 7.5), (None, 3), (10, 1), categories=("math", "stem"))))
    assert found["MT-Bench/turn 1"] == (8.5, 2)
    assert found["MT-Bench/turn 2"] == (pytest.approx(11.5 / 3), 3)
    assert found["MT-Bench/average"] == (pytest.approx(28.5 / 5), 5)
    assert found["MT-Bench/math"] == (pytest.approx(25.5 / 4), 4)
    assert found["MT-Bench/stem"] == (3, 1)
    value, count = found["MT-Bench/stem/turn 1"]
    assert np.isnan(value)
    assert count == 0


def test_radars_of_several(tmp_path):
    random, results = np.random.default_rng(0), []
    for judge in ("gpt-4", "gpt-4", "another"):
        pairs = [(*random.integers(1, 11, 2).tolist(),) for _ in range(16)]
        found = figures(measure, columns(scored(*pairs)))
        results.append({"judge": judge, "figures": {name: figure.to_json() for name, figure in found.items()}})
    results[0]["figures"]["MT-Bench/math"]["value"] = None
    for count in (1, 3):
        path = tmp_path / f"{count}.png"
        plot_compared([Path("a/x"), Path("b/x"), Path("c")][:count], results[:count], path)
        assert path.read_bytes().startswith(b"\x89PNG")


class FakeServer(ThreadingHTTPServer):
    """A model, which says how many messages it sees, and a judge: `judge(user, number of its call)` -> text, bytes of a
    reply, status, or None, which hangs up."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.answers, self.judgments, self.lock = [], [], threading.Lock()
        self.judge = lambda user, number: "Good. Rating: [[7]]"
        self.model = lambda body, number: f"answer {len(body['messages'])}"

    def handle_error(self, *_):
        pass


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        model = {"id": "fake", "object": "model", "created": 1, "owned_by": "x"}
        self.reply(200, {"data": [model], "object": "list"})

    def do_POST(self):
        body, server = json.loads(self.rfile.read(int(self.headers["Content-Length"]))), self.server
        user = body["messages"][-1]["content"]
        judging = "The Start of Assistant" in user
        with server.lock:
            (server.judgments if judging else server.answers).append(body)
            number = len(server.judgments if judging else server.answers)
        said = server.judge(user, number) if judging else server.model(body, number)
        if said is None:
            self.close_connection = True
        elif isinstance(said, bytes):
            self.reply(200, said)
        elif isinstance(said, int):
            self.reply(said, {"error": {"message": "maximum context length is 9 tokens"}})
        else:
            choice = {"index": 0, "message": {"role": "assistant", "content": said}, "finish_reason": "stop"}
            self.reply(200, ABOUT | {"model": "fake", "choices": [choice]})

    def reply(self, status, body):
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_):
        pass


@pytest.fixture
def fake(monkeypatch):
    monkeypatch.setattr("anyio.sleep", lambda _: asyncio.sleep(0))  # between two tries
    server = FakeServer()
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


QUESTIONS = [
    {"question_id": 81 + n, "category": category, "turns": [f"first {n}", f"second {n}"]}
    for n, category in enumerate(("writing", "math", "stem", "humanities"))
]
REFERENCES = [{"question_id": 82, "model_id": "gpt-4", "choices": [{"index": 0, "turns": ["right 1", "right 2"]}]}]


@pytest.fixture
def files(tmp_path):
    questions = write_rows(tmp_path / "question.jsonl", QUESTIONS)
    return "--questions", questions, "--references", write_rows(tmp_path / "gpt-4.jsonl", REFERENCES)


def evaluate(*words) -> None:
    main(["--suite", "mt_bench", *map(str, words)])


def refusal(*words) -> str:
    with pytest.raises(SystemExit) as caught, contextlib.redirect_stderr(io.StringIO()) as said:
        evaluate(*words)
    assert caught.value.code == 2
    return said.getvalue()


def test_a_whole_run(fake, files, tmp_path, capsys):
    """What is sent, what is kept, what comes out; run again, nothing is asked."""
    fake.judge = lambda user, number: {"first 0": "[[8]]", "first 1": "none"}.get(user.split("\n")[4], "[[07]] [9]")
    words = [
        *files,
        "--server",
        fake.url,
        "--attributes",
        "verbosity=1",
        "--judge",
        fake.url,
        "--output",
        tmp_path / "o",
    ]
    evaluate(*words, "--dry-run")
    assert "8 calls" in capsys.readouterr().out
    assert not fake.answers and not fake.judgments and not (tmp_path / "o").exists()  # noqa: PT018
    evaluate(*words)
    printed = capsys.readouterr().out
    assert {b["messages"][-1]["content"]: b["temperature"] for b in fake.answers} == {
        f"{turn} {n}": t for turn in ("first", "second") for n, t in enumerate((0.7, 0, 0.1, 0.1))
    }
    assert [len(body["messages"]) for body in fake.answers] == [1] * 4 + [3] * 4
    (second,) = (b for b in fake.answers if b["messages"][-1]["content"] == "second 3")
    assert [m["content"] for m in second["messages"][:2]] == ["first 3", "answer 1"]
    assert second["chat_template_kwargs"] == {
        "attributes": {"verbosity": 1}, "message_attributes": [None, {"verbosity": 1}, None],
    }  # fmt: skip
    assert second["max_tokens"] == 1024
    for body in fake.judgments:
        assert (body["temperature"], body["max_tokens"], body["n"]) == (0, 2048, 1)
        assert [m["role"] for m in body["messages"]] == ["system", "user"]
        assert ("right 1" in body["messages"][1]["content"]) == ("first 1" in body["messages"][1]["content"])

    result = json.loads((tmp_path / "o/results.json").read_text())
    assert result["figures"]["MT-Bench/average"] == {"value": 8, "count": 1, "interval": None}
    assert result["judge"] == "fake"
    assert "7 judgments name no rating" in printed
    assert "6 of these" in printed  # [[07]]
    rows = read_rows(tmp_path / "o/rows.jsonl")
    assert rows[0]["choices"] == [{"index": 0, "turns": ["answer 1", "answer 3"]}]
    assert [row["scores"]["MT-Bench"] for row in rows] == [[8, None], [None, None], [None, None], [None, None]]
    judged = read_rows(tmp_path / "o/judgments.jsonl")
    assert {(row["question_id"], row["turn"], *row["judge"]) for row in judged} == {
        (q["question_id"], turn, "fake", f"single{'-math' if q['category'] == 'math' else ''}-v1" + more)
        for q in QUESTIONS for turn, more in ((1, ""), (2, "-multi-turn"))
    }  # fmt: skip
    asked = len(fake.answers), len(fake.judgments)
    evaluate(*words)
    assert (len(fake.answers), len(fake.judgments)) == asked
    evaluate(*words, "--judge-model", "other")  # another judge, beside the first
    assert (len(fake.answers), len(fake.judgments)) == (8, 16)
    assert len(read_rows(tmp_path / "o/judgments.jsonl")) == 16
    says(refusal(*words, "--seed", "1"), "seed", "answers.jsonl", cure="output")


def refuses_second_turns(user, number):
    return 400 if "Conversation with User" in user else "[[5]]"


# judge -> (options, what is said, judgments kept at least, and at most)
FAILURES = {
    "overloaded": (lambda user, number: 503, (), "503", 0, 0),
    "no key": (lambda user, number: 401, (), "401", 0, 0),
    "dies half-way": (lambda user, number: "[[5]]" if number <= 4 else 503, (), "503", 4, 4),
    "hangs up half-way": (lambda user, number: "[[5]]" if number <= 4 else None, (), "Connection", 4, 4),
    "no JSON": (lambda user, number: b"<html>", (), "judgments", 0, 0),
    "one odd reply": (lambda user, number: b"{}" if number == 3 else "[[5]]", (), "1 calls", 7, 7),
    "too slow": (lambda user, number: threading.Event().wait(2), ("--judge-timeout", "0.05"), "timed out", 0, 0),
    "too long for it": (refuses_second_turns, (), "maximum context length", 4, 4),
    "no rating at all": (lambda user, number: "I like it.", (), "I like it.", 8, 8),
}  # fmt: skip


@pytest.mark.parametrize("case", FAILURES)
def test_a_judge_that_fails(fake, files, tmp_path, case, monkeypatch):
    """Clear, nothing lost: the same command, with the judge in order, asks what is missing and no more."""
    monkeypatch.setattr(mt_bench, "plot_radar", lambda *_: None)  # takes a second, and is looked at elsewhere
    judge, options, fact, least, most = FAILURES[case]
    fake.judge = judge
    words = [*files, "--server", fake.url, "--judge", fake.url, "--judge-model", "j", "--output", tmp_path / "o"]
    says(refusal(*words, "--judge-workers", "2", *options), fact)
    assert len(fake.judgments) <= 8 * 5  # tries, of three calls and what was on its way: a dead judge is given up
    assert not (tmp_path / "o/results.json").exists()
    kept = len(read_rows(tmp_path / "o/judgments.jsonl"))
    assert least <= kept <= most
    if case == "no rating at all":
        return
    fake.judge, asked = (lambda user, number: "[[7]]"), len(fake.judgments)
    with (tmp_path / "o/judgments.jsonl").open("a") as file:
        file.write('{"question_id": 81, "tu')  # killed while writing
    evaluate(*words)
    assert len(fake.judgments) - asked == 8 - kept
    figure = json.loads((tmp_path / "o/results.json").read_text())["figures"]["MT-Bench/average"]
    assert (figure["count"], figure["value"]) == (8, (5 * kept + 7 * (8 - kept)) / 8)
    assert len(fake.answers) == 8


def test_prompts_that_the_judge_does_not_take_may_be_missing(fake, files, tmp_path, capsys):
    fake.judge = refuses_second_turns
    evaluate(*files, "--server", fake.url, "--judge", fake.url, "--output", tmp_path / "o", "--on-refusal", "missing")
    assert "4 prompts" in capsys.readouterr().out
    assert json.loads((tmp_path / "o/results.json").read_text())["figures"]["MT-Bench/turn 2"]["value"] is None
    fake.judge = lambda user, number: 503
    words = *files, "--server", fake.url, "--judge", fake.url, "--output", tmp_path / "p", "--on-refusal", "missing"
    says(refusal(*words), "503")


def test_a_server_that_dies_while_it_answers(fake, files, tmp_path):
    fake.model = lambda body, number: 503 if number > 5 else f"answer {number}"
    words = [*files, "--server", fake.url, "--judge", fake.url, "--batch-size", "1", "--output", tmp_path / "o"]
    says(refusal(*words), "5 of 8 answers are kept", "503")
    fake.model, asked = (lambda body, number: "late"), len(fake.answers)
    evaluate(*words)
    assert len(fake.answers) - asked == 3
    said = [row["choices"][0]["turns"] for row in read_rows(tmp_path / "o/rows.jsonl")]
    assert said == [["answer 1", "answer 5"], ["answer 2", "late"], ["answer 3", "late"], ["answer 4", "late"]]


@pytest.fixture(scope="module")
def chat(tmp_path_factory):
    tensors = {
        name: np.ones_like(tensor) if "norm" in name else 0.2 * tensor for name, tensor in random_tensors(TINY).items()
    }
    return write_folder(tmp_path_factory.mktemp("chat"), TINY, tensors)


@pytest.mark.slow
def test_our_own_decoder_and_a_reward_model_as_judge(fake, chat, files, tmp_path, monkeypatch, capsys):
    """Interrupted in the second turns, it goes on with the same texts; the scores are no MT-Bench scores."""
    options = ("--model", chat, "--template", "extra_id", "--schema", "helpsteer", "--attributes", "verbosity=2",
               "--max-new-tokens", "3", "--batch-size", "2", "--greedy")  # fmt: skip
    add = Output.add

    def killed(self, first, rows):
        if self.done == 5:
            raise KeyboardInterrupt
        add(self, first, rows)

    monkeypatch.setattr(Output, "add", killed)
    with pytest.raises(SystemExit):
        evaluate(*files, *options, "--judge", fake.url, "--output", tmp_path / "parts")
    monkeypatch.setattr(Output, "add", add)
    evaluate(*files, *options, "--judge", fake.url, "--output", tmp_path / "parts")
    capsys.readouterr()
    reward = "--judge", reward_folder(tmp_path / "reward"), "--judge-template", "extra_id", "--scalar", "goodness"
    opened, describing = [], importlib.import_module("steerjax.bundle.describe")
    checked = describing.checked_folder
    monkeypatch.setattr(describing, "checked_folder", lambda path, verify: opened.append(path) or checked(path, verify))
    evaluate(*files[:2], *options, *reward, "--output", tmp_path / "whole")
    assert opened.count(Path(chat)) == 1, "a model is compared with its checksums once"
    whole, parts = (read_rows(tmp_path / name / "answers.jsonl") for name in ("whole", "parts"))
    assert whole == parts
    assert {(row["turn"], row["attributes"]["verbosity"]) for row in whole} == {(1, 2), (2, 2)}
    result = json.loads((tmp_path / "whole/results.json").read_text())
    names = {key.split("/")[0] for key in result["figures"]}
    assert names == {"helpfulness", "correctness", "coherence", "complexity", "verbosity", "goodness"}
    assert "not MT-Bench scores" in capsys.readouterr().out
    scores = [row["scores"] for row in read_rows(tmp_path / "whole/judgments.jsonl") if row["scores"]]
    expected = np.mean([0.65 * s["helpfulness"] + 0.8 * s["correctness"] + 0.45 * s["coherence"] for s in scores])
    assert result["figures"]["goodness/average"]["value"] == pytest.approx(expected)
    kept = (tmp_path / "whole/judgments.jsonl").read_bytes()
    evaluate(*files[:2], *options, *reward, "--output", tmp_path / "whole")
    assert "0 calls" in capsys.readouterr().out
    assert (tmp_path / "whole/judgments.jsonl").read_bytes() == kept
    answering = shutil.copytree(chat, tmp_path / "chat")
    options = "--model", answering, *options[2:]
    evaluate(*files[:2], *options, *reward, "--output", tmp_path / "whole")  # the same model elsewhere
    write_folder(answering, TINY, random_tensors(TINY))  # another one there
    message = refusal(*files[:2], *options, *reward, "--output", tmp_path / "whole")
    says(message, "answers.jsonl", "model", cure="output")


def test_refused_at_the_door(fake, chat, files, tmp_path):
    output, judge = ("--output", tmp_path / "o"), ("--judge", fake.url)
    questions = files[:2]
    broken = write_rows(
        tmp_path / "broken.jsonl", [*QUESTIONS[:1], {"question_id": 5, "category": "x", "turns": ["a"]}]
    )
    twice = write_rows(tmp_path / "twice.jsonl", QUESTIONS[:1] * 2)
    empty = write_rows(tmp_path / "empty.jsonl", [])
    served = ("--server", fake.url)
    own = ("--model", chat, "--template", "extra_id")
    for words, facts, cure in [
        ((*files, *judge), ("--model", "--server"), "one"),
        ((*questions, *served, *judge), ("82", "math", f"{files[1]}:2"), "--references"),
        ((*questions, "--references", empty, *served, *judge), ("82",), str(empty)),
        (("--questions", tmp_path / "no.jsonl", *served, *judge), ("no.jsonl",), ""),
        (("--questions", empty, *served, *judge), ("empty.jsonl",), "question.jsonl"),
        (("--questions", broken, *served, *judge), ("broken.jsonl:2", "turns"), "question.jsonl"),
        (("--questions", twice, *served, *judge), ("twice.jsonl:2",), "one"),
        ((*questions, *served, "--references", files[1], *judge), ("question.jsonl:1", "choices"), "gpt-4.jsonl"),
        ((*files, *served, "--judge", chat, "--judge-template", "extra_id"), ("chat",), "reward"),
        ((*files, *served, *judge, "--scalar", "goodness"), ("--scalar",), "--judge"),
        ((*files, *served, *judge, "--judge-max-tokens", "0"), ("--judge-max-tokens",), ""),
        ((*files, *own, *judge, "--attributes", "verbosity=1"), ("chat",), "--schema"),
        ((*files, *own, *judge), ("1024", "512"), "--max-new-tokens"),
        ((*files, *served, "--judge", "http://127.0.0.1:9"), ("127.0.0.1:9",), ""),
    ]:
        message = refusal(*words, *output)
        missing = [fact for fact in facts if fact not in message]
        assert not missing, (words, missing, message)
        assert cure in message.partition("cure: ")[2], (words, message)
    assert not fake.judgments


def test_fastchats_own_files():
    """All 80 questions have what they need; where the files are at hand."""
    folder = Path(os.environ.get("STEERJAX_SHARED", "no")) / "data/mt_bench"
    if not folder.exists():
        pytest.skip("STEERJAX_SHARED has no mt_bench")
    questions = read_questions(str(folder / "question.jsonl"), str(folder / "reference_gpt-4.jsonl"))
    assert len(questions) == 80
    assert {q.category for q in questions if q.references} == {"math", "reasoning", "coding"}
    assert [q.category for q in questions[::10]] == list(CATEGORIES)
