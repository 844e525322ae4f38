"""Judges of MT-Bench answers: a language model with FastChat's prompts for single grading, or a reward model of ours.

Source: lm-sys/FastChat, fastchat/llm_judge (commit 0e6d3e4); Zheng et al., arXiv 2306.05685.
"""

from __future__ import annotations

import argparse
import ast
import functools
import json
import math
import re
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, wait
from dataclasses import dataclass
from pathlib import Path

from steerjax.data.conversation import Conversation, Turn
from steerjax.errors import DataError, ModelError
from steerjax.hf.description import Description
from steerjax.inference.job import appended, progress
from steerjax.inference.server import RefusedRequest, Server
from steerjax.inference.steering import Sampling
from steerjax.schema import Schema
from steerjax.typed import row_type, typed

NEED_REFERENCE = ("math", "reasoning", "coding", "arena-hard-200")  # categories that are judged against an answer
SCORE = "MT-Bench"  # what a language model gives; a reward model's scores have their attributes' names
MISSING = -1  # the rating of a judgment that names none
RANGE = 1, 10  # asked for; not enforced
TOKENS = 2048  # of a judgment, in FastChat

_RATINGS = re.compile(r"\[\[(\d+\.?\d*)\]\]"), re.compile(r"\[(\d+\.?\d*)\]")
_PROMPTS = Path(__file__).with_name("mt_bench_prompts.jsonl")
_GIVE_UP = 3  # calls in a row that fail, each after all its tries
_CHUNK = 64  # conversations that a reward model scores between two writes


def parse_rating(judgment: str) -> int | float:
    """The first `[[7]]` or `[[7.5]]`, else the first `[7]`, else -1, whatever its range: what FastChat reads.

    FastChat ends with an error on `[[07]]` and on digits of other scripts; here they are -1, as is what no float holds.
    """
    match = _RATINGS[0].search(judgment) or _RATINGS[1].search(judgment)
    try:
        rating = ast.literal_eval(match[1]) if match else MISSING
        return rating if math.isfinite(float(rating)) else MISSING
    except (SyntaxError, ValueError, OverflowError):
        return MISSING


def has_rating(judgment: str) -> bool:
    """Something has the form of a rating, whether it can be read or not."""
    return any(pattern.search(judgment) for pattern in _RATINGS)


@functools.cache
def prompts() -> dict[str, dict[str, str]]:
    """FastChat's four prompts for single grading, by name, as they are in its judge_prompts.jsonl."""
    rows = map(json.loads, _PROMPTS.read_text(encoding="utf-8").splitlines())
    return {row["name"]: row for row in rows}


@dataclass(frozen=True)
class Call:
    """A turn to be judged: `system` and `user` are the judge's prompt, `conversation` ends with the answer."""

    question_id: int | str
    turn: int  # from 1
    prompt: str  # its name
    system: str
    user: str
    conversation: Conversation
    max_tokens: int = TOKENS  # of a language model's judgment

    def key(self, judge: str | None) -> tuple:
        return self.question_id, self.turn, self.user, self.max_tokens, (judge, self.prompt)


@row_type
class Judgment:
    """What is read of a row of judgments.jsonl, which has the layout of FastChat's."""

    question_id: int | str
    turn: int
    user_prompt: str
    judge: tuple[str, str]  # its name, and its prompt's
    judgment: str = ""
    score: int | float = MISSING
    finish: str = ""  # "length": cut
    max_tokens: int = TOKENS
    scores: dict[str, float] | None = None  # a reward model's

    def key(self) -> tuple:
        return self.question_id, self.turn, self.user_prompt, self.max_tokens, self.judge


def prompted_call(
    question_id: int | str, questions: Sequence[str], answers: Sequence[str], references: Sequence[str] | None,
    max_tokens: int = TOKENS,
) -> Call:  # fmt: skip
    """The call that judges the last of one or two answers; `references` are the right ones, where they are needed."""
    name = f"single{'-math' if references else ''}-v1{'-multi-turn' if len(answers) == 2 else ''}"
    fields = {"question": questions[0], "answer": answers[0]}
    for n, (question, answer) in enumerate(zip(questions, answers, strict=False), start=1):
        fields |= {f"question_{n}": question, f"answer_{n}": answer}
        fields |= {f"ref_answer_{n}": references[n - 1]} if references else {}
    system, template = prompts()[name]["system_prompt"], prompts()[name]["prompt_template"]
    turns = conversation_of(questions, answers)
    return Call(question_id, len(answers), name, system, template.format(**fields), turns, max_tokens)


def scored_call(question_id: int | str, questions: Sequence[str], answers: Sequence[str]) -> Call:
    """The call that has a reward model score the last answer."""
    turns = conversation_of(questions, answers)
    said = "\n\n".join(turn.content for turn in turns.turns)
    return Call(question_id, len(answers), "reward model", "", said, turns)


def conversation_of(questions: Sequence[str], answers: Sequence[str]) -> Conversation:
    """Questions and answers in turn, as long as there are both."""
    both = zip(questions, answers, strict=False)
    return Conversation(tuple(t for q, a in both for t in (Turn("user", q), Turn("assistant", a))))


class LanguageJudge:
    """An OpenAI-compatible server's model, greedy, as FastChat asks it. Raises ModelError: as `Server`."""

    def __init__(self, url: str, model: str | None, *, workers: int, timeout: float, max_tokens: int):
        sampling = Sampling(max_new_tokens=max_tokens)
        self._server = Server(url, model, Schema(()), sampling, workers=workers, timeout=timeout)
        self.name, self._workers, self._max_tokens = self._server.model, workers, max_tokens

    def judged(self, calls: Sequence[Call]) -> Iterator[tuple[Call, dict | ModelError]]:
        """Judgments as they come, or why there is none. Ends early where the server seems to be gone."""
        left, running, failures = deque(calls), {}, 0
        try:
            while True:
                while left and len(running) < self._workers and failures < _GIVE_UP:
                    call = left.popleft()
                    asked = Conversation((Turn("user", call.user),), call.system)
                    running[self._server.submit(self._server.prepare(asked, [{}], 1))] = call
                if not running:
                    return
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    call, error = running.pop(future), future.exception()
                    if error:
                        failures += not isinstance(error, RefusedRequest)
                        yield call, error
                        continue
                    failures, (answer,) = 0, future.result()
                    said = {"judgment": answer.text, "score": parse_rating(answer.text), "finish": answer.finish}
                    yield call, said | {"max_tokens": self._max_tokens}
        finally:
            for future in running:
                future.cancel()


class RewardJudge:
    """A reward model of ours: its rating of each attribute. Raises ModelError: it is none."""

    def __init__(self, name: str, about: Description, options: argparse.Namespace):
        from steerjax.inference.scorer import open_scorer

        self.name = name
        self._scorer = open_scorer(about, options)

    def judged(self, calls: Sequence[Call]) -> Iterator[tuple[Call, dict | ModelError]]:
        """A row each; `scores` are None for an empty answer and one too long for the model."""
        from steerjax.inference.scorer import predicted_ratings

        for first in range(0, len(calls), _CHUNK):
            part = calls[first : first + _CHUNK]
            turns = [2 * call.turn - 1 if call.conversation.turns[-1].content else None for call in part]
            found = predicted_ratings(self._scorer, [call.conversation for call in part], turns, skip=True)
            for call, ratings in zip(part, found, strict=True):
                yield call, {"scores": ratings if isinstance(ratings, dict) else None}


def kept_judgments(
    path: Path, calls: Sequence[Call], name: str | None, judge: LanguageJudge | RewardJudge | None, model: str
) -> tuple[list[Judgment | None], list[tuple[Call, ModelError]]]:
    """The judgment of each call by the judge of this name, and the calls that failed.

    What `path` does not hold yet, `judge` is asked; each judgment is kept as it comes. Without a judge none is asked,
    and without a name any judge's counts. Raises DataError: a broken row, or another process is writing.
    """
    failed = []
    with appended(path) as (rows, add):
        kept = {}
        for line, row in rows:
            cure = f"remove the line from {path.name}, and it is judged again"
            read = typed(Judgment, row, "row", functools.partial(DataError, cure=cure, file=str(path), line=line))
            kept[read.key()] = read  # the last of equal ones
            kept[*read.key()[:-1], (None, read.judge[1])] = read
        todo = [call for call in calls if call.key(name) not in kept]
        if todo and judge:
            with progress(len(calls), len(calls) - len(todo), "judgment") as bar:
                for call, found in judge.judged(todo):
                    if isinstance(found, ModelError):
                        failed.append((call, found))
                        continue
                    asked = {"question_id": call.question_id, "turn": call.turn, "user_prompt": call.user}
                    row = asked | {"model": model, "judge": [judge.name, call.prompt], **found, "tstamp": time.time()}
                    add(row)
                    kept[call.key(name)] = typed(Judgment, row, "row", DataError)
                    bar.update()
    return [kept.get(call.key(name)) for call in calls], failed
