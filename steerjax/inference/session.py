"""What `steerjax generate` does: prompts or rows in, answers to the terminal or to a file."""

import argparse
import itertools
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

from steerjax.checksums import folder_checksum
from steerjax.data.conversation import Conversation
from steerjax.data.formats import conversation_from_row
from steerjax.data.loading import file_hashes, load_conversations
from steerjax.data.readers import source_format
from steerjax.errors import DataError, ModelError
from steerjax.hf.description import Description
from steerjax.inference.answerer import open_answerer
from steerjax.inference.job import InputRow, beside, carried, input_rows, progress, resumable
from steerjax.inference.steering import (
    Answer,
    Sampling,
    Setting,
    hashed,
    label_of,
    make_sampling,
    swept,
    top_combinations,
)
from steerjax.schema import Schema, round_rating

BOOTSTRAP_TOP_K = 50  # the paper's, section 3.4
_DIALOGUES = {"turns", "messages", "conversations", "instruction", "completion"}  # rows that are more than a prompt


class Session:
    """What the options ask for: a model or a server, settings, sampling. Raises SteerjaxError where they do not fit."""

    def __init__(self, options: argparse.Namespace, about: Description | None = None):
        o = self.options = options
        self.sampling = sampling_of(o)
        answerer = open_answerer(o, about)
        self.schema, self.defaults = answerer.schema, answerer.defaults
        self.settings, self.combinations = settings_of(o, self.schema)
        self.backend = answerer.backend.drawing(self.sampling, o.batch_size)

    def answer_prompt(self, prompt: str) -> None:
        """Prints the answer as it comes, or, of several, each with its length."""
        row = self._read({"prompt": prompt, "system": self.options.system}, 0)
        if len(self.settings) * self.options.samples == 1:
            for piece in self.backend.stream(row.request):
                print(piece if isinstance(piece, str) else "\n", end="", flush=True)
            if piece.finish == "length":
                print(f"[cut at {self.sampling.max_new_tokens} tokens]", file=sys.stderr)
            return
        (answers,), lines = self.backend.run([row.request]), []
        for made, answer in zip(self._answered(row, answers), answers, strict=True):
            made = made["generation"]
            name = " ".join(f"{key}={value}" for key, value in made["attributes"].items()) or "no ratings"
            name += f" #{made['sample']}" if self.options.samples > 1 else ""
            length = f"{len(answer.text.split())} words" + (f", {answer.tokens} tokens" if answer.tokens else "")
            lines.append(f"{name}: {length}" + (", cut" if answer.finish == "length" else ""))
            print(f"--- {lines[-1]}\n{answer.text}\n")
        print("\n".join(lines))

    def answer_file(self) -> None:
        """Answers every row of the input into the output; goes on where an earlier run of the same was."""
        o, path, skipped = self.options, Path(self.options.output), []
        duplicates = "skip" if o.replace_answer else "keep"
        rows = list(input_rows(o.input, self._read, skipped, on_bad_row=o.on_bad_row, on_duplicate=duplicates))
        each = (1 if self.combinations else len(self.settings)) * o.samples
        job = {
            "command": "generate", "input": file_hashes([o.input])[o.input],
            "model": self.backend.model if o.server else folder_checksum(Path(self.backend.model)),
            "settings": self.settings, "combinations": self.combinations, "sampling": asdict(self.sampling),
            **{key: vars(o)[key] for key in ("format", "samples", "system", "template", "schema", "dtype",
                                             "replace_answer")},
        }  # fmt: skip
        with resumable(path, job) as output:
            output.skip(skipped)
            done = output.done // each
            with progress(len(rows) * each, output.done, "answer") as bar:
                answered = self.backend.run([row.request for row in rows], done)
                for row in rows[done:]:
                    try:
                        answers = next(answered)
                    except ModelError as error:
                        kept = f"{output.done} answers are kept, and the same command goes on from there"
                        place = f"{row.conversation.file}:{row.conversation.line}"
                        raise ModelError(f"{kept}: {place}: {error}") from None
                    output.add(done * each, [*self._answered(row, answers)])
                    bar.update(output.done - bar.n)
                    done += 1
        print(summary(path))
        if skipped:
            print(f"skipped {len(skipped)} rows, listed in {beside(path, 'skipped.jsonl')}")

    def _read(self, row: dict, line: int) -> InputRow:
        o, source = self.options, self.options.input or "--prompt"
        read = prompt_of(row, self.schema, o.replace_answer, source_format(source, o.format))
        system = o.system if read.system is None else read.system
        conversation = replace(read, system=system, file=source, line=line, id=read.id or f"{source}:{line}")
        own = {"system", "turns", "id", "rejected", "strength"}
        rest = {key: row[key] for key in row.keys() - own} if "turns" in row else {}
        request = self.backend.prepare(conversation, self._settings(conversation), o.samples)
        return InputRow(conversation, carried(rest), request)

    def _settings(self, conversation: Conversation) -> list[Setting]:
        if not self.combinations:
            return self.settings
        return [self.combinations[hashed(self.sampling.seed, conversation.id) % len(self.combinations)]]

    def _answered(self, row: InputRow, answers: list[Answer]) -> Iterator[dict]:
        """The output rows of an input row: the conversation with an answer each, and how it was made."""
        each = itertools.product(self._settings(row.conversation), range(self.options.samples))
        for count, ((setting, number), answer) in enumerate(zip(each, answers, strict=True)):
            new = row.conversation.to_json()
            new["turns"].append({"role": "assistant", "content": answer.text})
            new["id"] += f"/{count}" if len(answers) > 1 else ""
            # The ratings in the label line, as far as we know: a server's model may have defaults of its own.
            label = {name: round_rating(r, self.schema[name]) for name, r in label_of(setting, self.defaults).items()}
            asked = {"attributes": label, "sampling": asdict(self.sampling), "sample": number}
            made = {"model": self.backend.model, "finish": answer.finish, "tokens": answer.tokens}
            yield {**new, **row.carried, "generation": asked | made}


def settings_of(o: argparse.Namespace, schema: Schema) -> tuple[list[Setting], list[Setting]]:
    """What each row is asked for, and with --combinations those of which each row is asked for one."""
    if not o.combinations:
        return swept(o.attributes, o.sweep, schema), []
    rated = load_conversations([o.combinations], schema, on_bad_row=o.on_bad_row)
    return [{}], top_combinations(rated.conversations, schema, o.quality)


def sampling_of(o: argparse.Namespace) -> Sampling:
    """How to sample: greedy, unless something asks for more. ConfigError: a value out of range."""
    top_k = o.top_k if o.top_k is not None else BOOTSTRAP_TOP_K if o.combinations else 0
    asked = {name: getattr(o, name) for name in ("top_p", "seed", "max_new_tokens")}
    return make_sampling(o.temperature, o.samples, "options", top_k=top_k, **asked)


def prompt_of(row: dict, schema: Schema, replace_answer: bool, format: str = "auto") -> Conversation:
    """The conversation that a row asks to be answered: any format of docs/formats.md, or only a `prompt`.

    Raises DataError: the row cannot be read, or ends with an answer, which `replace_answer` drops.
    """
    bare = "prompt" in row and not row.keys() & _DIALOGUES
    other = "completion" if isinstance(row.get("prompt"), list) else "response"  # TRL's prompts may be messages
    read = {other: "-"} | {key: row[key] for key in ("prompt", "system", "id") if key in row} if bare else row
    conversation = conversation_from_row(read, schema, format, rated=False)
    other = {"asked": {}, "samples": (), "rejected": (), "strength": 1.0}  # what is said of other answers
    conversation = replace(conversation, **other)
    turns = conversation.turns
    answered = row.get("response") is not None if bare else turns[-1].role == "assistant"
    if answered and not replace_answer:
        cure = "end on the user's turn, or use --replace-answer to drop the answer"
        raise DataError("the row has an answer already", field="turns", cure=cure)
    return replace(conversation, turns=turns[:-1]) if (bare or answered) and len(turns) > 1 else conversation


def summary(output: Path) -> str:
    """Rows, mean length, and how many were cut or are empty (later commands refuse such a row)."""
    made = [json.loads(line) for line in output.read_bytes().splitlines()]
    words = [len(row["turns"][-1]["content"].split()) for row in made]
    cut, mean = sum(row["generation"]["finish"] == "length" for row in made), sum(words) / len(words)
    return f"{output}: {len(made)} answers of {mean:.1f} words, {cut} cut at --max-new-tokens, {words.count(0)} empty"
