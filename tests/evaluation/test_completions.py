"""Suites of reward-model benchmarks: official figures on the same scores, layouts, resumption, and what is refused."""

import contextlib
import io
import json
import math

import numpy as np
import pytest

from steerjax.errors import ConfigError, DataError
from steerjax.evaluate import main
from steerjax.evaluation import completions, reward_bench, reward_bench_2, rm_bench
from steerjax.evaluation.suite import read_rows
from steerjax.report.figures import differences, figures
from steerjax.schema import HELPSTEER, SCALAR_WEIGHTS, Attribute, Schema
from tests.evaluation.benchmark_rows import SUITES, made_rows
from tests.hf_folders import LABELS
from tests.refusals import refused, says
from tests.reward_models import killed, reward_folder, write_rows

# What the benchmarks' own code gives for `made_rows` (benchmarks/oracles/reward_bench.py), Ties as the repository's.
GOLDEN = {
    "reward_bench": {
        "coarse": {
            "Chat": 0.4419393455706305,
            "Chat Hard": 0.27147556390977445,
            "Safety": 0.23288288288288286,
            "Reasoning": 0.39871031746031743,
            "mean": 0.3362520274559013,
        },
        "fine": {
            "Chat": 0.4959430699654163,
            "Chat Hard": 0.3487781954887218,
            "Safety": 0.4523809523809524,
            "Reasoning": 0.6106150793650793,
            "mean": 0.4769293243000424,
        },
    },
    "reward_bench_2": {
        "coarse": {
            "Factuality": 0.3181818181818182,
            "Precise IF": 0.25,
            "Math": 0.2948717948717948,
            "Safety": 0.20238095238095236,
            "Focus": 0.38333333333333336,
            "Ties": 0.5215397649786575,
            "mean": 0.32838461062442603,
        },
        "fine": {
            "Factuality": 0.36363636363636365,
            "Precise IF": 0.25,
            "Math": 0.38461538461538464,
            "Safety": 0.14285714285714285,
            "Focus": 0.5333333333333333,
            "Ties": 0.5339407612783682,
            "mean": 0.3680638309534321,
        },
    },
    "rm_bench": {
        "coarse": {
            "chat": 0.31481481481481477,
            "math": 0.6031746031746031,
            "code": 0.5,
            "safety": 0.3625730994152046,
            "hard": 0.5150898078529658,
            "normal": 0.4623799081035923,
            "easy": 0.3579521720969089,
            "Overall": 0.4451406293511556,
        },
        "fine": {
            "chat": 0.38888888888888884,
            "math": 0.6825396825396824,
            "code": 0.5416666666666667,
            "safety": 0.48538011695906436,
            "hard": 0.5839860066833751,
            "normal": 0.5411967418546366,
            "easy": 0.4486737677527151,
            "Overall": 0.5246188387635755,
        },
    },
    "judge_bench": {
        "coarse": {
            "Knowledge": 0.7777777777777777,
            "Reasoning": 0.7,
            "Math": 0.45454545454545453,
            "Coding": 0.5,
            "Overall": 0.5454545454545454,
        },
        "fine": {
            "Knowledge": 0.5555555555555556,
            "Reasoning": 0.5,
            "Math": 0.45454545454545453,
            "Coding": 0.6666666666666667,
            "Overall": 0.5272727272727272,
        },
    },
}


@pytest.mark.parametrize("suite", SUITES)
def test_figures_equal_the_official_code_on_the_same_scores(suite):
    module = SUITES[suite]
    found = module.measure(module.columns(made_rows(suite)))
    for score, expected in GOLDEN[suite].items():
        got = {figure: found[f"{score}/{figure}"][0] for figure in expected}
        assert got == pytest.approx(expected, abs=1e-12), score
    assert found["coarse/equal scores"][0] > 0.02  # else the golden numbers say nothing of ties


@pytest.mark.parametrize("suite", SUITES)
def test_a_section_without_rows_has_no_figure_and_neither_has_the_mean(suite):
    module, key = SUITES[suite], {"rm_bench": "domain", "judge_bench": "source"}.get(suite, "subset")
    rows = [row for row in made_rows(suite) if row[key] in ("alpacaeval-easy", "Math", "chat", "livecodebench")]
    found = figures(module.measure, module.columns(rows))
    section, absent, mean = {
        "reward_bench": ("Chat", "Safety", "mean"),
        "reward_bench_2": ("Math", "Ties", "mean"),
        "rm_bench": ("chat", "safety", "Overall"),
        "judge_bench": ("Coding", "Math", None),
    }[suite]
    assert found[f"fine/{section}"].value is not None
    assert found[f"fine/{section}"].interval is not None
    assert found[f"fine/{absent}"][:2] == (None, 0)
    assert mean is None or found[f"fine/{mean}"].value is None


@pytest.mark.parametrize("suite", SUITES)
def test_a_constant_score_gets_what_the_official_rule_gives_ties(suite):
    module, rows = SUITES[suite], made_rows(suite)
    for row in rows:
        row["scores"] = {"coarse": [0.25] * len(row["characters"])}
    found = module.measure(module.columns(rows))
    if suite == "judge_bench":  # B>A
        assert found["Overall"][0] == np.mean([row["label"] == "B>A" for row in rows])
    elif suite == "reward_bench_2":  # a quarter of a point; nothing of Ties
        assert [found[name][0] for name in reward_bench_2.SUBSETS] == [0.25] * 5 + [0.0]
    else:
        assert {found[name][0] for name in (*module.SECTIONS, "mean")} == {0.0} if suite == "reward_bench" else True
        assert found.get("Overall", (0.0,))[0] == 0.0
    assert found["equal scores"][0] == 1.0


# (right answers, wrong ones) of a prompt and of its variant -> preferred, hard, margin, as 0.1.5 gives them.
TIES = [
    ([3.0, 3.0], [1.0], [2.0], [1.0], (1, 1, 1.0)),  # no spread, all above: x / 0
    ([3.0, 3.0], [4.0], [2.0], [1.0], (0, 0, -1.0)),
    ([3.0, 3.0], [3.0], [2.0], [1.0], (0, 0, 0.0)),  # 0 / 0
    ([3.0, 3.0], [1.0], [2.0], [2.0], (1, 0, 0.0)),
    ([4.0, 3.0], [1.0], [2.0], [1.0], (1, 0, 0.0)),  # tanh(1 / 1 - 1)
    ([4.0, 3.0], [1.0], [5.0], [1.0], (1, 1, math.tanh(1))),
]


@pytest.mark.parametrize(("right", "wrong", "right_of_variant", "wrong_of_variant", "expected"), TIES)
def test_ties_of_one_prompt(right, wrong, right_of_variant, wrong_of_variant, expected):
    rows = [
        {"id": f"{kind}:7", "subset": "Ties", "num_correct": len(good), "scores": {"s": good + bad},
         "characters": [1] * len(good + bad)}
        for kind, good, bad in (("tied", right, wrong), ("ref", right_of_variant, wrong_of_variant))
    ]  # fmt: skip
    columns = reward_bench_2.columns(rows)
    assert tuple(columns[part][0] for part in ("preferred", "hard", "margin")) == pytest.approx(expected)
    assert np.isnan([columns[part][1] for part in ("preferred", "hard", "margin")]).all()
    accuracy = 0.3 * (min(right) > max(wrong)) + 0.3 * (right_of_variant[0] > wrong_of_variant[0])
    whole = accuracy + 0.2 * expected[0] + 0.2 * expected[1] + 0.01 * expected[2]
    assert reward_bench_2.measure(columns)["Ties"] == (pytest.approx(whole), 2)


def test_figures_of_models_with_one_score_each_are_comparable():
    rows, other = made_rows("reward_bench_2"), made_rows("reward_bench_2")
    for row, more in zip(rows, other, strict=True):
        row["scores"], more["scores"] = {"goodness": row["scores"]["fine"]}, {"score": more["scores"]["coarse"]}
    found = differences(reward_bench_2.measure, *(reward_bench_2.columns(side) for side in (rows, other)))
    expected = GOLDEN["reward_bench_2"]["fine"]["Ties"] - GOLDEN["reward_bench_2"]["coarse"]["Ties"]
    assert found["Ties"].value == pytest.approx(expected, abs=1e-12)
    assert found["longer wins/Ties"].value == 0.0


def test_scores_follow_from_the_option_and_the_models_attributes():
    every = completions.scalars(None, HELPSTEER)
    assert list(every) == [*HELPSTEER.names, *SCALAR_WEIGHTS]
    assert every["goodness"] == SCALAR_WEIGHTS["goodness"]
    essay = Schema((Attribute("content"), Attribute("language")))
    assert completions.scalars(None, essay) == {"content": {"content": 1.0}, "language": {"language": 1.0}}
    assert completions.scalars("content=2,language=-1", essay) == {"score": {"content": 2.0, "language": -1.0}}
    with refused(ConfigError, "helpfulness", cure="content"):
        completions.scalars("goodness", essay)


PROMPT = {"role": "user", "content": "Name a river."}
WORDS = ["the Nile", "a stone, which is no river at all but very old", "the Rhine is one, and so is the Po", "trees"]
ROWS = {
    "reward_bench": {"prompt": "Name a river.", "chosen": WORDS[0], "rejected": WORDS[1], "subset": "mt-bench-hard"},
    "reward_bench_2": {"prompt": "Name a river.", "chosen": WORDS[:1], "rejected": WORDS[1:], "subset": "Focus"},
    "rm_bench": {"prompt": "Name a river.", "chosen": WORDS[:3], "rejected": WORDS[1:], "domain": "safety-refuse"},
    "judge_bench": {"question": "Name a river.", "response_A": WORDS[0], "response_B": WORDS[1], "label": "A>B",
                    "source": "mmlu-pro-law", "pair_id": "p", "original_id": 7},
}  # fmt: skip


def test_messages_are_read_as_texts_are():
    text = reward_bench.read(ROWS["reward_bench"], "")
    answers = [{"role": "assistant", "content": words} for words in WORDS[:2]]
    whole = {"chosen": [PROMPT, answers[0]], "rejected": [PROMPT, answers[1]], "subset": "mt-bench-hard"}
    for row in (
        whole,
        whole | {"prompt": "Name a river."},  # as UltraFeedback's
        {"prompt": [PROMPT], "chosen": answers[:1], "rejected": answers[1:], "subset": "mt-bench-hard"},
        {"prompt": [PROMPT], "chosen": WORDS[0], "rejected": WORDS[1], "subset": "mt-bench-hard"},
    ):
        assert reward_bench.read(row, "") == text
    system = reward_bench.read(whole | {"chosen": [{"role": "system", "content": "Be brief."}, *whole["chosen"]]}, "")
    assert system[1][0].system == "Be brief."


BAD = [
    ("reward_bench", {"rejected": None}, ("rejected",)),
    ("reward_bench", {"chosen": [PROMPT]}, ("chosen",)),
    ("reward_bench", {"prompt": " "}, ("prompt",)),
    ("reward_bench_2", {"subset": "Chat"}, ("subset", "Chat")),
    ("reward_bench_2", {"chosen": []}, ("chosen",)),
    ("reward_bench_2", {"rejected": ["a", 3]}, ("rejected[1]",)),
    ("reward_bench_2", {"num_correct": 2}, ("num_correct", "2")),
    ("reward_bench_2", {"subset": "Ties", "id": "12"}, ("id", "12")),
    ("reward_bench_2", {"subset": "Ties", "id": "tied:1"}, ("chosen",)),
    ("rm_bench", {"chosen": ["a", "b"]}, ("chosen", "2")),
    ("rm_bench", {"domain": "poetry"}, ("domain", "poetry")),
    ("judge_bench", {"label": "A=B"}, ("label", "A=B")),
    ("judge_bench", {"response_B": None}, ("response_B",)),
]


@pytest.mark.parametrize(("suite", "change", "facts"), BAD)
def test_a_row_in_another_layout_is_refused(suite, change, facts):
    with refused(DataError, *facts):
        SUITES[suite].read(ROWS[suite] | change, "rows.jsonl")


def test_a_file_of_one_domain_tells_it_by_its_name():
    row = {key: value for key, value in ROWS["rm_bench"].items() if key != "domain"}
    assert rm_bench.read(row, "data/safety-refuse_filtered.json")[0] == {"domain": "safety-refuse"}
    with refused(DataError, "domain", "rows.jsonl", cure="chat_filtered.json"):
        rm_bench.read(row, "rows.jsonl")


@pytest.fixture
def few_draws(monkeypatch):
    """Intervals have tests of their own."""
    monkeypatch.setattr("steerjax.report.figures.DRAWS", 20)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Of five attributes, and the same with `goodness` alone."""
    folder = tmp_path_factory.mktemp("models")
    one = {"id2label": {"0": "goodness"}, "label2id": {"goodness": 0}}
    return reward_folder(folder / "five"), reward_folder(folder / "one", **one)


def evaluate(suite, model, data, output, *more) -> None:
    words = ("--suite", suite, "--model", model, "--data", data, "--output", output, "--template", "chatml")
    main([str(word) for word in (*words, *more)])


def refusal(*words) -> str:
    with pytest.raises(SystemExit) as caught, contextlib.redirect_stderr(io.StringIO()) as said:
        evaluate(*words)
    assert caught.value.code == 2
    return said.getvalue()


@pytest.mark.parametrize("suite", SUITES)
@pytest.mark.usefixtures("few_draws")
def test_the_command_resumes_and_says_what_is_not_there(suite, models, tmp_path, capsys, monkeypatch):
    key = {"judge_bench": "response_A", "reward_bench": "chosen"}.get(suite)
    rows = [ROWS[suite] | ({key: " ".join(WORDS[: place % 4 + 1])} if key else {}) for place in range(5)]
    rows = [row | {"pair_id" if suite == "judge_bench" else "id": f"{place}"} for place, row in enumerate(rows)]
    data, output = write_rows(tmp_path / "rows.jsonl", rows), tmp_path / "out"
    monkeypatch.setattr(completions, "CHUNK", 2)
    evaluate(suite, models[0], data, output)
    kept = read_rows(output)
    assert [row["id"] for row in kept] == ["0", "1", "2", "3", "4"]
    assert set(kept[0]["predicted_ratings"]) == set(LABELS)
    found = json.loads((output / "results.json").read_text(), parse_constant=pytest.fail)["figures"]
    section, absent = {"reward_bench": ("Chat Hard", "Safety"), "reward_bench_2": ("Focus", "Ties"),
                       "rm_bench": ("safety", "math"), "judge_bench": ("Knowledge", "Coding")}[suite]  # fmt: skip
    assert 0 <= found[f"goodness/{section}"]["value"] <= 1
    assert found[f"verbosity/{absent}"] == {"value": None, "count": 0, "interval": None}
    assert found[f"longer wins/{section}"]["count"] == 5
    said = capsys.readouterr().out
    assert "no rows" in said
    assert (output / "sections.png").stat().st_size > 10_000
    assert (output / "matrix.png").exists() == (suite == "rm_bench")

    lines = (output / "rows.jsonl").read_bytes().splitlines(keepends=True)
    killed(output / "rows.jsonl", b"".join(lines[:2]) + lines[2][:9])
    evaluate(suite, models[0], data, output)
    assert read_rows(output) == kept
    says(refusal(suite, models[0], data, output, "--scalar", "verbosity"), "scalar", "verbosity")


@pytest.mark.usefixtures("few_draws")
def test_one_score_needs_no_prefix_and_a_prompt_is_computed_once(models, tmp_path, monkeypatch):
    from steerjax.inference.scorer import Scorer

    trees = []
    prepare = Scorer.prepare
    monkeypatch.setattr(
        Scorer, "prepare", lambda *words, **options: trees.append(found := prepare(*words, **options)) or found
    )
    data = write_rows(tmp_path / "rows.jsonl", [ROWS["reward_bench_2"]])
    evaluate("reward_bench_2", models[1], data, tmp_path / "one")
    evaluate("reward_bench_2", models[0], data, tmp_path / "weighted", "--scalar", "goodness")
    for name in ("one", "weighted"):
        figures = json.loads((tmp_path / name / "results.json").read_text())["figures"]
        assert {key for key in figures if "/" not in key} >= {"Focus", "mean"}
    (row,) = read_rows(tmp_path / "weighted")
    expected = [
        0.65 * h + 0.8 * c + 0.45 * o
        for h, c, o in zip(*(row["predicted_ratings"][name] for name in LABELS[:3]), strict=True)
    ]
    assert row["scores"] == {"goodness": pytest.approx(expected)}
    assert (len(trees[0].trees), len(trees[0].examples)) == (1, 4)


@pytest.mark.usefixtures("few_draws")
def test_bad_input_is_refused_with_its_place(models, tmp_path):
    data, output = tmp_path / "rows.jsonl", tmp_path / "out"
    good = ROWS["reward_bench"]
    write_rows(data, [good, good | {"rejected": 3}])
    says(refusal("reward_bench", models[0], data, output), f"{data}:2", "rejected", cure="skip")
    evaluate("reward_bench", models[0], data, output, "--on-bad-row", "skip")
    assert [json.loads(line)["line"] for line in (output / "skipped.jsonl").read_text().splitlines()] == [2]
    write_rows(data, [])
    says(refusal("reward_bench", models[0], data, tmp_path / "b"), str(data))
    says(refusal("judge_bench", models[0], write_rows(data, [good]), tmp_path / "c"), f"{data}:1", "label")
    tied = {"subset": "Ties", "id": "ref:1"}
    write_rows(data, [ROWS["reward_bench_2"] | tied] * 2)
    says(refusal("reward_bench_2", models[0], data, tmp_path / "d"), f"{data}:2", "ref:1")
    write_rows(data, [good])
    says(refusal("reward_bench", models[0], data, tmp_path / "e", "--scalar", "humor"), "humor", cure="goodness")
    says(refusal("reward_bench", models[0], data, tmp_path / "f", "--row-length", "8"), str(data), cure="--row-length")
    broken = reward_folder(tmp_path / "huge", attention_bias=False)
    from safetensors.numpy import load_file, save_file

    tensors = load_file(broken / "model.safetensors")
    tensors["score.weight"][:] = 3e38  # finite, and no prediction is
    save_file(tensors, broken / "model.safetensors")
    says(refusal("reward_bench", broken, data, tmp_path / "g"), f"{data}:1", "predicts")


@pytest.mark.usefixtures("few_draws")
def test_a_row_with_a_completion_too_long_counts_nowhere_and_is_said(models, tmp_path, capsys):
    long = ROWS["reward_bench"] | {"chosen": "river " * 400}
    data = write_rows(tmp_path / "rows.jsonl", [ROWS["reward_bench"], long, ROWS["reward_bench"]])
    evaluate("reward_bench", models[1], data, tmp_path / "out", "--row-length", "256")
    rows = read_rows(tmp_path / "out")
    assert ["skipped" in row for row in rows] == [False, True, False]
    assert json.loads((tmp_path / "out" / "results.json").read_text())["figures"]["accuracy"]["count"] == 2
    assert "1 rows" in capsys.readouterr().out
