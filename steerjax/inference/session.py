"""What `steerjax generate` does: prompts or rows in, answers to the terminal or to a file."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from steerjax.chat.templates import get_template
from steerjax.data.checks import check_text
from steerjax.data.conversation import Conversation, Turn
from steerjax.data.formats import conversation_from_row
from steerjax.data.loading import file_hashes, load_conversations, usable_rows, write_skipped
from steerjax.data.readers import iter_rows
from steerjax.errors import ConfigError, DataError, ModelError
from steerjax.inference.answers import Answer, Sampling
from steerjax.inference.job import ResumableOutput, carried, skipped_path
from steerjax.inference.steering import (
    Setting,
    chosen,
    label_of,
    parse_attributes,
    parse_sweep,
    swept,
    top_combinations,
)
from steerjax.schema import SCHEMAS, Schema, round_rating
from steerjax.typed import typed

BOOTSTRAP_TOP_K = 50  # the paper's, section 3.4


@dataclass(frozen=True)
class Task:
    """A row to answer: a conversation that ends with a user turn, and the row's other keys.

    Attributes:
        settings: one answer for each, and each sample.
        request: what the backend made of it.
    """

    conversation: Conversation
    rest: dict[str, Any]
    settings: list[Setting]
    request: Any

    def content(self) -> list:
        """What a duplicate has in common with it."""
        return self.conversation.content()


class Session:
    """The options of the command, made into a model (or a server), settings and sampling.

    Raises:
        SteerjaxError: an option or the model does not fit.
    """

    def __init__(self, options: argparse.Namespace):
        o = self.options = options
        self.sampling = sampling_of(o)
        self.description = None
        if o.model:
            from steerjax.bundle import describe

            self.description = describe(o.model, template=o.template)
        self.schema = self._schema()
        base = parse_attributes(o.attributes, self.schema) if o.attributes else {}
        self.settings = swept(base, [parse_sweep(text, self.schema) for text in o.sweep])
        self.combinations: list[dict] = []
        if o.combinations:
            rated = load_conversations([o.combinations], self.schema, on_bad_row=o.on_bad_row)
            self.combinations = top_combinations(rated.conversations, self.schema, o.quality)
        self.backend = self._server() if o.server else self._local()

    def answer_prompt(self, prompt: str) -> None:
        """Prints the answer as it comes, or, of several, each with its length."""
        samples, system = self.options.samples, self.options.system
        for text, option in ((prompt, "--prompt"), (system or "", "--system")):
            check_text(text, option)
        conversation = Conversation((Turn("user", prompt),), system, id="--prompt")
        request = self.backend.prepare(conversation, self.settings, samples, self.schema)
        if len(self.settings) * samples == 1:
            for piece in self.backend.stream(request):
                print(piece if isinstance(piece, str) else "\n", end="", flush=True)
            if piece.finish == "length":
                print(f"[cut at {self.sampling.max_new_tokens} tokens]", file=sys.stderr)
            return
        ((_, answers),) = self.backend.run([request], 0)
        lines = []
        for setting, number, answer in _each(self.settings, answers):
            name = " ".join(f"{key}={value}" for key, value in self._asked(setting).items()) or "no ratings"
            name += f" #{number}" if samples > 1 else ""
            length = f"{len(answer.text.split())} words" + (f", {answer.tokens} tokens" if answer.tokens else "")
            lines.append(f"{name}: {length}" + (", cut" if answer.finish == "length" else ""))
            print(f"--- {lines[-1]}\n{answer.text}\n")
        print("\n".join(lines))

    def answer_file(self) -> None:
        """Answers every row of the input into the output; goes on where an earlier run of the same was."""
        from tqdm import tqdm

        o, skipped, output = self.options, [], Path(self.options.output)
        on_duplicate = "skip" if o.replace_answer else "keep"
        rows = usable_rows([o.input], self._tasks, skipped, on_bad_row=o.on_bad_row, on_duplicate=on_duplicate)
        tasks = list(rows)
        each = (1 if self.combinations else len(self.settings)) * o.samples
        total = len(tasks) * each
        with ResumableOutput(output, self._job()) as file:
            if skipped:
                write_skipped(skipped_path(output), skipped)
            with tqdm(total=total, initial=file.done, unit="row", disable=None) as bar:
                for index, answers in self.backend.run([task.request for task in tasks], file.done // each):
                    for place, row in enumerate(self._rows(tasks[index], answers)):
                        file.put(index * each + place, row)
                    bar.update(file.done - bar.n)
            file.finish(total)
        print(summary(output))
        if skipped:
            print(f"skipped {len(skipped)} rows, listed in {skipped_path(output)}")

    def _tasks(self, source: str) -> Iterator[tuple[int, Task | DataError]]:
        for line, row in iter_rows(source):
            try:
                if isinstance(row, DataError):
                    raise row
                yield line, self._task(row, source, line)
            except DataError as error:
                yield line, error.at(source, line)

    def _task(self, row: dict, source: str, line: int) -> Task:
        o = self.options
        conversation = prompt_of(row, self.schema, o.replace_answer, o.format)
        name = conversation.id or f"{source}:{line}"
        system = o.system if conversation.system is None else conversation.system
        conversation = replace(conversation, system=system, id=name, file=source, line=line)
        settings = self.settings
        if self.combinations:
            settings = [chosen(self.combinations, self.sampling.seed, name)]
        rest = {key: row[key] for key in row.keys() - {"system", "turns", "id"}} if "turns" in row else {}
        request = self.backend.prepare(conversation, settings, o.samples, self.schema)
        return Task(conversation, carried(rest), settings, request)

    def _rows(self, task: Task, answers: list[list[Answer]]) -> Iterator[dict]:
        """The output rows of a task: the conversation with each answer, and how it was made."""
        several = sum(map(len, answers)) > 1
        for count, (setting, number, answer) in enumerate(_each(task.settings, answers)):
            row = task.conversation.to_json()
            row["turns"].append({"role": "assistant", "content": answer.text})
            row["id"] += f"/{count}" if several else ""
            asked = {"attributes": self._asked(setting), "sampling": asdict(self.sampling), "sample": number}
            made = {"model": self.backend.model, "finish": answer.finish, "tokens": answer.tokens}
            yield {**row, **task.rest, "generation": asked | made}

    def _asked(self, setting: Setting) -> dict[str, int]:
        """Ratings in the label line, as far as they are known (a server's model may have defaults of its own)."""
        label = label_of(setting, self.description.default_ratings if self.description else None)
        return {name: round_rating(rating, self.schema[name]) for name, rating in label.items()}

    def _job(self) -> dict:
        """All that the output depends on."""
        o = self.options
        return {
            "command": "generate", "input": file_hashes([o.input])[o.input], "model": self.backend.model,
            "format": o.format, "settings": self.settings, "combinations": self.combinations, "samples": o.samples,
            "sampling": asdict(self.sampling), "system": o.system, "template": o.template, "dtype": o.dtype,
            "replace_answer": o.replace_answer,
        }  # fmt: skip

    def _schema(self) -> Schema:
        o, own = self.options, self.description.schema if self.description else None
        if o.schema is not None and o.schema not in SCHEMAS:
            raise ConfigError(f"--schema {o.schema}; cure: one of {', '.join(SCHEMAS)}")
        if own is None and o.schema is None and (o.attributes or o.sweep or o.combinations) and not o.server:
            raise ModelError(f"'{o.model}' does not say which attributes it takes\n  cure: --schema")
        return own or SCHEMAS[o.schema or "steerlm"]

    def _server(self):
        from steerjax.inference.server import Server

        o, about = self.options, self.description
        template = about.template if about else get_template(o.template) if o.template else None
        return Server(o.server, o.server_model, self.sampling, template=template, workers=o.batch_size)

    def _local(self):
        from steerjax.bundle import open_bundle
        from steerjax.inference.local import Local
        from steerjax.parallel.mesh import parse_mesh

        o = self.options
        bundle = open_bundle(o.model, parse_mesh(o.mesh), template=o.template, dtype=o.dtype)
        return Local(bundle, self.schema, self.sampling, batch_size=o.batch_size)


def _each(settings: Sequence[Setting], answers: list[list[Answer]]) -> Iterator[tuple[Setting, int, Answer]]:
    """(setting, number of the sample, answer)."""
    for setting, samples in zip(settings, answers, strict=True):
        for number, answer in enumerate(samples):
            yield setting, number, answer


def sampling_of(options: argparse.Namespace) -> Sampling:
    """How to sample: greedy, unless something asks for more than the most likely token.

    Raises:
        ConfigError: a value out of range.
    """
    o = options
    top_k = o.top_k if o.top_k is not None else BOOTSTRAP_TOP_K if o.combinations else 0
    drawing = o.samples > 1 or top_k or o.top_p < 1
    temperature = o.temperature if o.temperature is not None else 1.0 if drawing else 0.0
    asked = {name: getattr(o, name) for name in ("top_p", "seed", "max_new_tokens")}
    return typed(Sampling, asked | {"temperature": temperature, "top_k": top_k}, "options", ConfigError)


def prompt_of(row: dict, schema: Schema, replace_answer: bool, format: str = "auto") -> Conversation:
    """The conversation that a row asks to be answered: any format of docs/formats.md, or only a `prompt`.

    Args:
        replace_answer: drop an answer that the row ends with.

    Raises:
        DataError: the row cannot be read, or does not end with a user turn.
    """
    if "prompt" in row and not row.keys() & {"turns", "messages", "conversations", "instruction", "text"}:
        answered = row.get("response") is not None
        row = {key: row[key] for key in ("prompt", "system", "id") if key in row}
        read = conversation_from_row(row | {"response": "-", schema.names[0]: None}, schema, format)
        conversation = replace(read, turns=read.turns[:-1])
    else:
        conversation = conversation_from_row(row, schema, format)
        answered = conversation.turns[-1].role == "assistant"
        if answered and replace_answer and len(conversation.turns) > 1:
            conversation = replace(conversation, turns=conversation.turns[:-1])
    if answered and not replace_answer:
        cure = "end on the user's turn, or use --replace-answer to drop the answer"
        raise DataError("the row has an answer already", field="turns", cure=cure)
    return conversation


def summary(output: Path) -> str:
    """Rows, mean length and how many were cut, of a finished output."""
    made = [json.loads(line) for line in output.read_bytes().splitlines()]
    words = [len(row["turns"][-1]["content"].split()) for row in made]
    cut = sum(row["generation"]["finish"] == "length" for row in made)
    return (
        f"{output}: {len(made)} answers of {sum(words) / len(made):.1f} words on average; {cut} cut at "
        f"--max-new-tokens, {words.count(0)} empty (later commands refuse or skip such a row)"
    )
