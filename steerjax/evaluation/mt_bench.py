"""MT-Bench: two-turn questions answered by a chat model, and judged by a language model as FastChat does it.

steerjax evaluate --suite mt_bench --questions question.jsonl --references gpt-4.jsonl --model DIR
  --attributes helpfulness=4,verbosity=2 --judge https://api.openai.com --judge-model gpt-4 --output DIR

The questions and the reference answers (of math, reasoning and coding) are FastChat's files, fastchat/llm_judge/data.
--server URL answers in place of --model. The judge is any OpenAI-compatible server, whose key is in OPENAI_API_KEY, or
the folder of a reward model: then the scores are its attributes, not MT-Bench scores. What is to be done is printed
first; --dry-run stops there. Answers and judgments are kept as they come, and the same command goes on with them.
"""

from __future__ import annotations

import argparse
import itertools
import json
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from steerjax.command import KEY, MODEL, add_model_options
from steerjax.errors import ConfigError, ModelError
from steerjax.evaluation.mt_bench_answers import ANSWERS, Answers, Question, answered, read_answers, read_questions
from steerjax.evaluation.mt_bench_judge import (
    MISSING,
    RANGE,
    SCORE,
    TOKENS,
    Call,
    Judgment,
    LanguageJudge,
    RewardJudge,
    has_rating,
    kept_judgments,
    prompted_call,
    scored_call,
)
from steerjax.evaluation.suite import ROWS, Result
from steerjax.files import write_text
from steerjax.hf.description import Description
from steerjax.inference.server import RefusedRequest
from steerjax.inference.steering import Sampling
from steerjax.report.figures import UNIT, Columns, figures, mean_of
from steerjax.report.page import text_table
from steerjax.report.plots import COLOURS, GREY, new_figure
from steerjax.schema import SCHEMAS, parse_scalar, scalarize
from steerjax.typed import typed

JUDGMENTS, RADAR = "judgments.jsonl", "radar.png"
CATEGORIES = ("writing", "roleplay", "reasoning", "math", "coding", "extraction", "stem", "humanities")
_CHARACTERS = 4  # a token, for estimates


def add_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--questions", required=True, metavar="FILE", help="FastChat's question.jsonl, or rows like its")
    add("--references", metavar="FILE", help="answers to judge math, reasoning and coding by: FastChat's gpt-4.jsonl")
    add("--model", metavar="DIR", help=MODEL)
    add(
        "--server",
        metavar="URL",
        help="an OpenAI-compatible server that answers, e.g. http://localhost:8000; --model is then the folder it "
        f"serves, read for its attributes; {KEY}",
    )
    add("--server-model", metavar="NAME", help="default: the one model that it serves")
    add("--attributes", default="", metavar="NAME=N,...", help="asked for in both turns; as steerjax generate takes it")
    add("--schema", choices=SCHEMAS, help="of a model that does not name it")
    add("--system", metavar="TEXT", help="system text; default: the template's")
    add("--greedy", action="store_true", help="temperature 0 everywhere, in place of FastChat's by category")
    add("--seed", type=int, default=0, help="of the answers")
    add(
        "--max-new-tokens", type=int, default=1024, metavar="N", help="an answer is cut there; default 1024, FastChat's"
    )
    add("--batch-size", type=int, default=8, metavar="N", help="answers at a time, or requests; default 8")
    add(
        "--judge",
        required=True,
        metavar="URL_OR_DIR",
        help=f"an OpenAI-compatible server ({KEY}), or a reward model's folder",
    )
    add("--judge-model", metavar="NAME", help="default: the one model that the server has")
    add("--judge-workers", type=int, default=8, metavar="N", help="calls at a time; default 8")
    add("--judge-timeout", type=float, default=600, metavar="SECONDS", help="of one try of eight; default 600")
    add("--judge-max-tokens", type=int, default=TOKENS, metavar="N", help="of a judgment; default 2048, FastChat's")
    add("--on-refusal", choices=("error", "missing"), default="error",
        help="a prompt that the judge's server does not take, as too long: an error, or a missing rating")  # fmt: skip
    add("--scalar", metavar="NAME", help="also a reward model's weighted sum: goodness, NAME=W,...")
    add("--judge-template", metavar="NAME", help="of a reward model's folder that does not name it")
    add("--row-length", type=int, default=0, metavar="TOKENS", help="of a reward model's rows; default: its context")
    add("--rows", type=int, default=0, metavar="N", help="packed rows a step of a reward model")
    add("--dry-run", action="store_true", help="print calls and tokens, and stop")
    add_model_options(parser)


def run(options: argparse.Namespace) -> Result | None:
    """Answers, judges, and says what came out; None for a dry run.

    Raises SteerjaxError: options or files that do not fit; a model or a judge fails; no judgment has a rating.
    """
    o, about = options, check_options(options)
    questions, reward = read_questions(o.questions, o.references, about is None), about is not None
    name, judge = _reward_judge(o.judge, about) if reward else o.judge_model, None
    if not (reward or o.dry_run):
        judge = LanguageJudge(
            o.judge, o.judge_model, workers=o.judge_workers, timeout=o.judge_timeout, max_tokens=o.judge_max_tokens
        )
        name = judge.name
    path, answers = o.output / JUDGMENTS, read_answers(o.output)
    known = 2 * len(questions) == len(answers)
    print(f"answers: {len(answers)} of {2 * len(questions)} are kept, at most {o.max_new_tokens:,} tokens each")
    print(judge_plan(questions, answers, path, name, reward, o), flush=True)
    if o.dry_run:
        return None
    answers = answered(questions, o)
    if not known:
        print(judge_plan(questions, answers, path, name, reward, o), flush=True)
    calls, model = _calls(questions, answers, reward, o), next(iter(answers.values()))["model"]
    if reward and None in kept_judgments(path, calls, name, None, model)[0]:
        judge = RewardJudge(name, about, o)
    judgments, failed = kept_judgments(path, calls, name, judge, model)
    _check_failed(failed, judgments, path, o.on_refusal)
    weights = _weights(o, about) if about else None
    rows = result_rows(questions, answers, judgments, name, reward, weights)
    write_text(o.output / ROWS, "".join(json.dumps(row) + "\n" for row in rows))
    return report(rows, judgments, answers, reward, o)


def _reward_judge(folder: str, about: Description) -> str:
    """What the judgments of a reward model are kept under: one that is trained anew in its place is another."""
    from steerjax.checksums import folder_checksum

    return f"{folder} {folder_checksum(about.path)[:8]}"


def check_options(o: argparse.Namespace) -> Description | None:
    """A judge that is a reward model; None for a server. Raises SteerjaxError: options do not fit."""
    served = o.judge.startswith(("http://", "https://"))
    for holds, message in (
        (o.model or o.server, "neither --model nor --server; cure: one of them answers"),
        (min(o.batch_size, o.judge_workers) >= 1, "--batch-size or --judge-workers below 1; cure: at least 1"),
        (o.judge_timeout > 0, "--judge-timeout is not above 0; cure: seconds of one try"),
        (not (served and o.scalar), "--scalar is of a reward model; cure: --judge DIR, or without --scalar"),
        (served or not o.judge_model, "--judge-model is of a server; cure: --judge http://HOST:PORT, or without it"),
    ):
        if not holds:
            raise ConfigError(message)
    typed(Sampling, {"seed": o.seed, "max_new_tokens": o.max_new_tokens}, "options", ConfigError)
    typed(Sampling, {"max_new_tokens": o.judge_max_tokens}, "--judge-max-tokens: options", ConfigError)
    if served:
        return None
    from steerjax.bundle import describe

    about = describe(o.judge, template=o.judge_template, verify=not o.no_verify)
    _weights(o, about)
    return about


def _weights(o: argparse.Namespace, judge: Description) -> tuple[str, dict[str, float]] | None:
    """The score's name and the attributes' weights.

    Raises SteerjaxError: the judge is no reward model, or has other attributes.
    """
    from steerjax.inference.scorer import model_schema

    schema = model_schema(judge)
    return parse_scalar(o.scalar, schema) if o.scalar else None


# ---- judgments


def _calls(
    questions: Sequence[Question], answers: Answers, reward: bool, o: argparse.Namespace
) -> list[Call]:  # fmt: skip
    """All first turns, then all second ones, as FastChat; an answer that is not there yet is taken for a long one."""
    assumed = {"answer": "x" * o.max_new_tokens * _CHARACTERS}
    calls = []
    for turn in (1, 2):
        for q in questions:
            said = [answers.get((q.id, t), assumed)["answer"] for t in range(1, turn + 1)]
            asked = (q.id, q.turns, said)
            calls.append(scored_call(*asked) if reward else prompted_call(*asked, q.references, o.judge_max_tokens))
    return calls


def judge_plan(
    questions: Sequence[Question], answers: Answers, path: Path, name: str | None, reward: bool, o: argparse.Namespace
) -> str:
    """What is to be judged still, and about how many tokens that takes."""
    calls = _calls(questions, answers, reward, o)
    kept = kept_judgments(path, calls, name, None, "")[0] if path.exists() else [None] * len(calls)
    todo = [call for call, judgment in zip(calls, kept, strict=True) if judgment is None]
    tokens = sum(len(call.system) + len(call.user) for call in todo) // _CHARACTERS
    said = f"judge {name or o.judge}: {len(todo)} calls to make, {len(calls) - len(todo)} of {len(calls)} are kept"
    said += f"; about {tokens:,} tokens of prompts ({_CHARACTERS} characters each"
    said += ")" if len(answers) == len(calls) else ", answers to come at full length)"
    return said + ("" if reward else f", at most {len(todo) * o.judge_max_tokens:,} tokens of judgments")


def _check_failed(
    failed: Sequence[tuple[Call, ModelError]], judgments: Sequence[Judgment | None], path: Path, on_refusal: str
) -> None:
    """Raises ModelError: calls failed, and not only as the judge's server did not take them where that is allowed."""
    if not failed or (on_refusal == "missing" and all(isinstance(error, RefusedRequest) for _, error in failed)):
        return
    (call, error), left = failed[0], judgments.count(None)
    said = (
        f"{len(failed)} calls of the judge failed and {left} of {len(judgments)} judgments are missing; the others are"
    )
    said += f" kept in {path}, and the same command goes on from there. Question {call.question_id}, turn {call.turn}: "
    refused = all(isinstance(error, RefusedRequest) for _, error in failed)
    more = "; or --judge-max-tokens, a judge of a longer context, or --on-refusal missing" if refused else ""
    raise ModelError(f"{said}{error}{more}")


# ---- results


def result_rows(
    questions: Sequence[Question], answers: Answers, judgments: Sequence[Judgment | None], judge: str, reward: bool,
    scalar: tuple[str, Mapping[str, float]] | None = None,
) -> list[dict]:  # fmt: skip
    """A row a question: FastChat's layout of an answer file, and the scores of both turns by name, None if missing."""
    rows, half = [], len(questions)
    for q, *turns in zip(questions, judgments[:half], judgments[half:], strict=True):
        said = [answers[q.id, turn] for turn in (1, 2)]
        scores = [_scores(judgment, scalar) for judgment in turns]
        names = dict.fromkeys(itertools.chain(*scores)) if reward else (SCORE,)
        rows.append({
            "question_id": q.id, "category": q.category, "model_id": said[0]["model"],
            "choices": [{"index": 0, "turns": [row["answer"] for row in said]}],
            "judge": judge, "scores": {name: [score.get(name) for score in scores] for name in names},
        })  # fmt: skip
    return rows


def _scores(judgment: Judgment | None, scalar: tuple[str, Mapping[str, float]] | None) -> dict[str, float]:
    if judgment is None:
        return {}
    if judgment.scores is None:
        return {} if judgment.score == MISSING else {SCORE: judgment.score}
    return judgment.scores | ({scalar[0]: scalarize(judgment.scores, scalar[1])} if scalar else {})


def score_names(rows: Sequence[Mapping]) -> list[str]:
    """Of `scores`, over all rows."""
    return list(dict.fromkeys(name for row in rows for name in row["scores"]))


def columns(rows: Sequence[Mapping]) -> Columns:
    """A row a question: its category, and `NAME/turn 1`, `NAME/turn 2` for each score, NaN where it is missing."""
    names = score_names(rows)
    found = {UNIT: np.array([str(row["question_id"]) for row in rows])}
    found["category"] = np.array([row["category"] for row in rows])
    for name, turn in itertools.product(names, (1, 2)):
        scores = (row["scores"].get(name, [None, None])[turn - 1] for row in rows)
        found[f"{name}/turn {turn}"] = np.array([np.nan if score is None else score for score in scores], float)
    return found


def measure(columns: Columns) -> dict[str, tuple[float, int]]:
    """`NAME/average`, `NAME/turn 1`, `NAME/CATEGORY`, `NAME/CATEGORY/turn 1`, ...: means over the judgments there are.

    An average is over all judgments of both turns, not the mean of the two turns' (FastChat, show_result.py).
    """
    found, category = {}, columns["category"]
    groups = {name: category == name for name in in_order(np.unique(category).tolist())}
    for name in [key.removesuffix("/turn 1") for key in columns if key.endswith("/turn 1")]:
        both = np.stack([columns[f"{name}/turn {turn}"] for turn in (1, 2)])
        for group, chosen in ({"average": slice(None)} | groups).items():
            turns = name if group == "average" else f"{name}/{group}"
            found[f"{name}/{group}"] = mean_of(both[:, chosen])
            found |= {f"{turns}/turn {turn}": mean_of(both[turn - 1, chosen]) for turn in (1, 2)}
    return found


def in_order(categories: Sequence[str]) -> list[str]:
    """FastChat's order, then any others."""
    return [c for c in CATEGORIES if c in categories] + sorted(set(categories) - set(CATEGORIES))


def report(
    rows: Sequence[Mapping], judgments: Sequence[Judgment | None], answers: Answers, reward: bool,
    o: argparse.Namespace,
) -> Result:  # fmt: skip
    """Raises ModelError: no judgment has a rating."""
    names, judge, model = score_names(rows), rows[0]["judge"], rows[0]["model_id"]
    found = figures(measure, columns(rows)) if names else {}
    if not any(found[f"{name}/average"].count for name in names):
        said = next((j.judgment for j in judgments if j and j.judgment), "")
        what = f"none of {len(judgments)} judgments has a rating" + (f", the first: {said!r:.300}" if said else "")
        where = f"another judge in place of {judge}; the judgments are kept in {o.output / JUDGMENTS}"
        raise ModelError(f"{what}\n  cure: {where}")
    categories = in_order({row["category"] for row in rows})
    heading = f"Ratings by the reward model {judge}: not MT-Bench scores" if reward else f"MT-Bench, judged by {judge}"
    text = [heading]
    for name in names:
        table = [[name if reward else "category", "turn 1", "turn 2", "both", "95% interval", "judgments"]]
        for group in ("average", *categories):
            turns, whole = name if group == "average" else f"{name}/{group}", found[f"{name}/{group}"]
            values = [found[f"{turns}/turn {turn}"].value for turn in (1, 2)] + [whole.value]
            between = "{:.2f} to {:.2f}".format(*whole.interval) if whole.interval else "-"
            cells = ["-" if value is None else f"{value:.2f}" for value in values]
            table.append([group, *cells, between, str(whole.count)])
        text += ["", *text_table(table, "<>>>>>")]
    notes = _notes(judgments, answers, reward, o, len(rows))
    plot_radar({model: {key: figure.to_json() for key, figure in found.items()}}, o.output / RADAR, heading)
    summary = {
        "model": model, "judge": judge, "questions": f"{len(rows)} of {o.questions}",
        "attributes": str(next(iter(answers.values()))["attributes"] or "none"),
        "temperatures": "0" if o.greedy else "FastChat's by category",
    }  # fmt: skip
    pages = {JUDGMENTS: "every judgment, in FastChat's layout", ANSWERS: "every answer"}
    what = "the reward model's mean rating" if reward else "MT-Bench score"
    return Result(
        found, "\n".join([*text, "", *notes]).rstrip(), {RADAR: f"{what} by category"}, summary,
        {"judge": judge, "judged_by": "reward model" if reward else "language model", "notes": notes}, pages,
    )  # fmt: skip


def _notes(
    judgments: Sequence[Judgment | None], answers: Answers, reward: bool, o: argparse.Namespace, questions: int
) -> list[str]:
    """What a reader of the scores has to know."""
    there = [judgment for judgment in judgments if judgment]
    crashing = [j for j in there if j.score == MISSING and has_rating(j.judgment)]
    outside = [j for j in there if j.score != MISSING and not RANGE[0] <= j.score <= RANGE[1]]
    counts = {
        "prompts were not taken by the judge's server, and have no rating": judgments.count(None),
        "answers have no rating: empty, or too long for the reward model":
            sum(reward and j.scores is None for j in there),
        "judgments name no rating and are left out of the means, as in FastChat":
            sum(not reward and j.score == MISSING for j in there),
        "of these hold a number that makes FastChat fail, such as [[07]]": len(crashing),
        f"ratings lie outside {RANGE[0]} to {RANGE[1]} and count as they are, as in FastChat": len(outside),
        f"judgments were cut at {o.judge_max_tokens} tokens": sum(j.finish == "length" for j in there),
        f"answers were cut at {o.max_new_tokens} tokens": sum(row["finish"] == "length" for row in answers.values()),
        "answers are empty": sum(not row["answer"].strip() for row in answers.values()),
    }  # fmt: skip
    notes = [f"{count} {words}." for words, count in counts.items() if count]
    if not reward:
        notes.append("Scores compare only with those of the same judge on the same questions; published ones are "
                     f"GPT-4's on 80 questions, and here are {questions}.")  # fmt: skip
    return notes


# ---- plots


def plot_radar(found: Mapping[str, Mapping[str, Mapping]], path: Path, title: str) -> None:
    """Figures as in results.json, by the name of the line: a panel for each score that all have, a line each.

    A score missing in a category leaves a gap. Bands are 95% intervals.
    """
    shared = [key for key in next(iter(found.values())) if all(key in each for each in found.values())]
    names = [key.removesuffix("/average") for key in shared if key.endswith("/average")]
    width = min(3, len(names))
    size = 5.6 * width if width > 1 else 6.6, 5.4 * -(-len(names) // width) + 0.6
    with new_figure(path, *size, textwrap.fill(title, 65 * width)) as figure:
        panels = figure.subplots(-(-len(names) // width), width, squeeze=False, subplot_kw={"polar": True}).ravel()
        for axes, name in zip(panels, names, strict=False):
            _radar(axes, name, found)
        for axes in panels[len(names) :]:
            axes.set_visible(False)
        if len(found) > 1:
            figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)


def _radar(axes, name: str, found: Mapping[str, Mapping[str, Mapping]]) -> None:
    keys = {key.split("/")[1] for each in found.values() for key in each if key.startswith(f"{name}/")}
    categories = in_order([key for key in keys if key not in ("average", "turn 1", "turn 2")])
    angles = np.linspace(0, 2 * np.pi, len(categories), endpoint=False)
    closed, ends = np.append(angles, angles[:1]), []
    for (label, each), colour, mark in zip(
        found.items(), itertools.cycle(COLOURS), itertools.cycle("os^Dv"), strict=False
    ):
        there = [each.get(f"{name}/{category}", {}) for category in categories]
        values = np.array([figure.get("value") for figure in there], float)
        ends += values[np.isfinite(values)].tolist()
        axes.plot(closed, np.append(values, values[:1]), color=colour, marker=mark, linewidth=2, label=label)
        if all(figure.get("interval") for figure in there):
            low, high = np.array([figure["interval"] for figure in there]).T
            axes.fill_between(
                closed, np.append(low, low[:1]), np.append(high, high[:1]), color=colour, alpha=0.13, lw=0
            )
            ends += [*low, *high]
    if name == SCORE:
        axes.set(ylim=(0, max(10, *ends)), yticks=range(2, 11, 2))
    elif ends:
        low, high = min(ends), max(ends)
        room = 0.25 * (high - low) or 1.0
        axes.set_ylim(low - room, high + room)
    axes.set_theta_zero_location("N")
    axes.set_theta_direction(-1)
    axes.set_rlabel_position(180 / max(1, len(categories)))
    axes.set_xticks(angles, [""] * len(angles))
    low, high = axes.get_ylim()
    for angle, category in zip(angles, categories, strict=True):
        label = category.upper() if category == "stem" else category.capitalize()
        if len(found) == 1:
            value = each[f"{name}/{category}"]["value"]
            label += "\n-" if value is None else f"\n{value:.2f}"
        across, up = round(np.sin(angle), 6), round(np.cos(angle), 6)  # away from the circle
        sides = {"ha": ("right", "center", "left")[int(np.sign(across)) + 1],
                 "va": ("top", "center", "bottom")[int(np.sign(up)) + 1]}  # fmt: skip
        axes.text(angle, low + 1.04 * (high - low), label, **sides)
    axes.tick_params(axis="y", labelsize=8, labelcolor=GREY)
    axes.spines["polar"].set_color(GREY)
    if name != SCORE:
        axes.set_title(name, loc="center", pad=36)


def plot_compared(folders: Sequence[Path], results: Sequence[Mapping], path: Path) -> None:
    """The radar of several outputs of this suite; `results` are their results.json, and a line is named by its folder,
    and by its judge where they differ."""
    judges = [result["judge"] for result in results]
    names = [str(folder) if len({f.name for f in folders}) < len(folders) else folder.name for folder in folders]
    if len(set(judges)) > 1:
        names = [f"{name} (judge {judge})" for name, judge in zip(names, judges, strict=True)]
    title = "Score by category" + (f", judged by {judges[0]}" if len(set(judges)) == 1 else "")
    plot_radar({label: result["figures"] for label, result in zip(names, results, strict=True)}, path, title)
