"""MT-Bench's questions, and a chat model's answers to them: all first turns, then all second ones.

Source: lm-sys/FastChat, fastchat/llm_judge, common.py and gen_api_answer.py (commit 0e6d3e4).
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

from pydantic import Field

from steerjax.checksums import folder_checksum
from steerjax.command import describe_model
from steerjax.data.conversation import Conversation, Turn
from steerjax.data.loading import file_hashes
from steerjax.data.readers import typed_rows
from steerjax.errors import DataError, ModelError
from steerjax.evaluation.mt_bench_judge import NEED_REFERENCE, conversation_of
from steerjax.hf.description import Description
from steerjax.inference.answerer import open_answerer
from steerjax.inference.job import Output, beside, progress, resumable
from steerjax.inference.steering import Answer, Sampling, label_of
from steerjax.typed import row_type

ANSWERS = "answers.jsonl"
TEMPERATURES = {
    "writing": 0.7, "roleplay": 0.7, "extraction": 0.0, "math": 0.0, "coding": 0.0, "reasoning": 0.0,
    "stem": 0.1, "humanities": 0.1, "arena-hard-200": 0.0,
}  # fmt: skip
_OTHER_TEMPERATURE = 0.7

Answers = Mapping[tuple[int | str, int], dict]  # (question, turn from 1) -> row of answers.jsonl


@dataclass(frozen=True)
class Question:
    """Two turns of a user; `references` are right answers to both, where the judge is shown them."""

    id: int | str
    category: str
    turns: tuple[str, str]
    temperature: float
    line: int
    references: tuple[str, ...] | None = None


@row_type
class _Question:
    question_id: int | str
    category: Annotated[str, Field(pattern="^[^/]+$")]
    turns: tuple[str, str]
    required_temperature: float | None = None


@row_type
class _Choice:
    turns: tuple[str, ...]


@row_type
class _Reference:
    question_id: int | str
    choices: tuple[_Choice, ...]


def read_questions(source: str, references: str | None, needed: bool = True) -> list[Question]:
    """FastChat's files. Raises DataError, with file and line: a broken row, an id twice, no question; where they are
    `needed`, a question without its reference answers."""
    found: dict[int | str, Question] = {}
    for line, row in typed_rows(source, _Question, "give rows like those of FastChat's question.jsonl, with two turns"):
        if row.question_id in found:
            raise DataError("the question stands twice", "question_id", "keep one", file=source, line=line)
        usual = TEMPERATURES.get(row.category, _OTHER_TEMPERATURE)
        temperature = usual if row.required_temperature is None else row.required_temperature
        found[row.question_id] = Question(row.question_id, row.category, row.turns, temperature, line)
    if not found:
        raise DataError("no question", file=source, cure="give FastChat's question.jsonl, or rows like its")
    answers = {}
    if references and needed:
        for line, row in typed_rows(references, _Reference, "give an answer file of FastChat's, e.g. its gpt-4.jsonl"):
            if not row.choices or len(row.choices[0].turns) < 2:
                raise DataError("no two turns", "choices", "answer both", file=references, line=line)
            answers[row.question_id] = row.choices[0].turns[:2]
    for key, question in found.items() if needed else ():
        if question.category in NEED_REFERENCE:
            if key not in answers:
                wrong = f"question {key} ({question.category}) is judged by a reference answer, and there is none"
                cure = f"add it to {references}" if references else "--references FILE, FastChat's gpt-4.jsonl"
                raise DataError(wrong, file=source, line=question.line, cure=cure)
            found[key] = replace(question, references=answers[key])
    return list(found.values())


class AnsweringModel:
    """What --server or else --model, which `about` describes, answers with."""

    def __init__(self, o: argparse.Namespace, about: Description | None):
        self._options, self._answerer = o, (answerer := open_answerer(o, about))
        self.setting = answerer.setting(o.attributes)
        self.label = label_of(self.setting, answerer.defaults)

    def backend(self, temperature: float):
        """What draws at this temperature; 1e-4 is greedy, as in FastChat."""
        o = self._options
        sampling = Sampling(0.0 if temperature < 1e-4 else temperature, seed=o.seed, max_new_tokens=o.max_new_tokens)
        return self._answerer.backend.drawing(sampling, o.batch_size)

    def conversation(self, question: Question, answers: Sequence[str]) -> Conversation:
        """What is to be answered next; the model sees its first answer with the ratings that were asked of it."""
        turns = conversation_of(question.turns, answers).turns
        rated = tuple(replace(t, ratings=self.label or None) if t.role == "assistant" else t for t in turns)
        asked = Turn("user", question.turns[len(answers)])
        o = self._options
        return Conversation((*rated, asked), o.system, file=o.questions, line=question.line)

    def check_room(self, backend, questions: Sequence[Question]) -> None:
        """Raises DataError: two answers of the length allowed might not fit, which else only the second turn shows."""
        if (room := self._answerer.room) is None:
            return
        for question in questions:
            new, asked = self._options.max_new_tokens, self.conversation(question, ["."])
            (prompt,) = backend.prepare(asked, [self.setting], 1).prompts
            if (most := len(prompt) + 2 * new) > room:
                wrong = f"its turns and two answers of {new} tokens are {most}, more than the model's {room}"
                fits = (room - len(prompt)) // 2
                cure = f"--max-new-tokens {fits}" if fits > 0 else "a model of a longer context"
                raise DataError(wrong, cure=cure, file=asked.file, line=asked.line)


def answered(questions: Sequence[Question], o: argparse.Namespace) -> Answers:
    """The answers to all first turns, then to all second ones; those that an earlier run left are kept.

    Raises SteerjaxError: the folder has answers of other settings, or the model fails.
    """
    about = describe_model(o.model, o) if o.model else None
    settings = {
        "suite": "mt_bench", "questions": file_hashes([o.questions])[o.questions],
        "model": folder_checksum(about.path) if about else None,
        **{key: vars(o)[key] for key in ("server_model", "attributes", "schema", "system", "greedy", "seed",
                                         "max_new_tokens", "template", "dtype")},
    }  # fmt: skip
    temperatures = {question.id: 0.0 if o.greedy else question.temperature for question in questions}
    groups = [
        (turn, temperature, [q for q in questions if temperatures[q.id] == temperature])
        for turn, temperature in itertools.product((1, 2), dict.fromkeys(temperatures.values()))
    ]
    path = o.output / ANSWERS
    with resumable(path, settings) as output:
        answers = read_answers(o.output)
        if output.finished:
            return answers
        model, backends, first = AnsweringModel(o, about), {}, 0
        with progress(2 * len(questions), output.done, "answer") as bar:
            for turn, temperature, group in groups:
                done = min(max(output.done - first, 0), len(group))
                first += len(group)
                if done == len(group):
                    continue
                if temperature not in backends:
                    backends[temperature] = model.backend(temperature)
                    if len(backends) == 1:
                        model.check_room(backends[temperature], questions)
                backend = backends[temperature]
                if answers and (then := next(iter(answers.values()))["model"]) != backend.model:
                    wrong = f"its answers are of {then}, and now {backend.model} would answer"
                    raise DataError(wrong, file=str(path), cure="name another output, or serve the same model")
                before = [[answers[q.id, t]["answer"] for t in range(1, turn)] for q in group]
                asked = [model.conversation(q, a) for q, a in zip(group, before, strict=True)]
                requests = [backend.prepare(conversation, [model.setting], 1) for conversation in asked]
                with _said_what_is_kept(output, bar.total):
                    for question, (answer,) in zip(group[done:], backend.run(requests, done), strict=True):
                        row = _answer_row(question, turn, answer, backend.model, temperature, model.label)
                        output.add(output.done, [row])
                        answers[question.id, turn] = row
                        bar.update(output.done - bar.n)
    return answers


@contextmanager
def _said_what_is_kept(output: Output, total: int) -> Iterator[None]:
    try:
        yield
    except ModelError as error:
        kept = f"{output.done} of {total} answers are kept, and the same command goes on from there"
        raise ModelError(f"{kept}: {error}") from None


def _answer_row(q: Question, turn: int, answer: Answer, model: str, temperature: float, label: Mapping) -> dict:
    said = {"question_id": q.id, "turn": turn, "model": model, "answer": answer.text}
    return said | {"finish": answer.finish, "tokens": answer.tokens, "temperature": temperature, "attributes": label}


def read_answers(folder: Path) -> dict[tuple[int | str, int], dict]:
    """The answers in a folder, whole lines only."""
    path = folder / ANSWERS
    path = path if path.exists() else beside(path, "partial")
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    return {(row["question_id"], row["turn"]): row for row in map(json.loads, lines)}
