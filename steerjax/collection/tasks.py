"""Answers -> tasks for Label Studio that do not say where an answer is from, and the key that does."""

import hashlib
import json
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as xml

import pydantic.dataclasses

from steerjax.data.conversation import Conversation, Turn
from steerjax.data.formats import conversation_from_row
from steerjax.data.loading import Skipped
from steerjax.data.readers import source_format
from steerjax.errors import DataError
from steerjax.files import write_text
from steerjax.inference.job import InputRow, carried, input_rows
from steerjax.report.records import write_json
from steerjax.schema import Attribute, Attributes, Schema
from steerjax.typed import STRICT, read_json

CONFIG, TASKS, KEY = "labelling_config.xml", "tasks.json", "key.json"
RADIO = 11  # whole ratings that a row of radio buttons shows; more are typed as a number
LETTERS = "qwetasdfgzxcvbyiopjklnm"  # keys that Label Studio has no other use for


@dataclass(frozen=True)
class Sourced:
    """An answer, the last turn of a conversation, and where it is from: `source` and what else is known."""

    conversation: Conversation
    source: Mapping[str, Any]


@pydantic.dataclasses.dataclass(frozen=True, config=STRICT)
class Task:
    """A task of the key: the conversation that ends with the answer, and every source that gave this answer."""

    conversation: dict[str, Any]
    sources: list[dict[str, Any]]

    def turns(self) -> list[dict[str, str]]:
        """System text and turns, as Label Studio shows them."""
        system = self.conversation["system"]
        first = [{"role": "system", "content": system}] if system else []
        return first + [{"role": turn["role"], "content": turn["content"]} for turn in self.conversation["turns"]]


@pydantic.dataclasses.dataclass(frozen=True, config=STRICT)
class Key:
    """What the raters do not see. `tasks` by name; each name begins with `project`."""

    project: str
    attributes: Attributes
    tasks: dict[str, Task]

    @property
    def schema(self) -> Schema:
        return Schema(self.attributes)


def read_answers(
    source: str, schema: Schema, skipped: list[Skipped], *, name: str = "", format: str = "auto", on_bad_row: str
) -> list[Sourced]:
    """The rows of a source that end with an assistant's turn, in any format; ratings that they have are left out.

    `name` says where they are from; else the row's `source`, the model that `generate` wrote down, the file.
    Raises DataError as `usable_rows`; a row without an answer is a bad row.
    """

    def read(row: dict, line: int) -> InputRow:
        conversation = conversation_from_row(row, schema, source_format(source, format), rated=False)
        if conversation.rejected or conversation.turns[-1].role != "assistant":
            cure = "rows with one answer each, as `steerjax generate` writes; or --model to have one written"
            raise DataError("no answer to rate at the end", field="turns", cure=cure)
        turns = tuple(Turn(turn.role, turn.content) for turn in conversation.turns)
        found = {"id": conversation.id or f"{source}:{line}"}
        made = row["generation"] if isinstance(row.get("generation"), dict) else {}
        found |= {"generation": made} if made else {}
        given = row.get("source") if isinstance(row.get("source"), str) else None
        about = {"source": name or given or str(made.get("model") or source), **carried(found)}
        return InputRow(replace(conversation, turns=turns, id=found["id"], file=source, line=line), about)

    rows = input_rows(source, read, skipped, on_bad_row=on_bad_row)
    return [Sourced(row.conversation, row.carried) for row in rows]


def make_key(answers: Iterable[Sourced], schema: Schema, seed: int) -> Key:
    """Shuffled by `seed`; an answer that several sources gave to one prompt is one task.

    A task's name is its place in that order, after a digest of all texts and attributes.
    """
    tasks: dict[str, Task] = {}
    for answer in answers:
        said = answer.conversation.to_json()
        text = json.dumps([said["system"], said["turns"]])
        tasks.setdefault(text, Task(said, [])).sources.append(dict(answer.source))
    texts = sorted(tasks)
    project = hashlib.sha256(json.dumps([schema.to_json(), texts, seed]).encode()).hexdigest()[:8]
    random.Random(seed).shuffle(texts)
    digits = len(str(len(texts)))
    named = {f"{project}-{n:0{digits}}": tasks[text] for n, text in enumerate(texts, start=1)}
    return Key(project, schema.attributes, named)


def write_project(folder: Path, key: Key) -> None:
    """The labelling configuration and the tasks, to import, and the key, to keep.

    Raises DataError: the folder has the key of another project, without which its ratings mean nothing.
    """
    if (folder / KEY).exists() and (there := read_key(folder / KEY)).project != key.project:
        cure = "name another --output, or remove the folder if nobody rates that project"
        raise DataError(f"the key of another project, {there.project}", file=str(folder / KEY), cure=cure)
    said = {name: {"conversation": task.conversation, "sources": task.sources} for name, task in key.tasks.items()}
    write_json(folder / KEY, {"project": key.project, "attributes": key.schema.to_json(), "tasks": said})
    tasks = [{"data": task_data(name, task)} for name, task in key.tasks.items()]
    write_text(folder / TASKS, json.dumps(tasks, indent=1, ensure_ascii=True) + "\n")
    write_text(folder / CONFIG, labelling_config(key.schema))


def read_key(path: Path) -> Key:
    """Raises DataError: no key."""
    return read_json(Key, path, DataError, f"the {KEY} that `steerjax collect tasks` wrote")


def task_data(name: str, task: Task) -> dict[str, Any]:
    """What a task shows, and its name; nothing of its source."""
    *dialogue, answer = task.turns()
    return {"task": name, "dialogue": dialogue, "response": answer["content"]}


def labelling_config(schema: Schema) -> str:
    """Label Studio's XML: the dialogue, the answer, and a required control of an attribute's name for each."""
    view = xml.Element("View")
    taken = set(schema.names)
    dialogue, response = (_free(name, taken) for name in ("dialogue", "response"))
    xml.SubElement(view, "Header", value="Conversation", size="4")
    _add(view, "Paragraphs", name=dialogue, value="$dialogue", layout="dialogue", nameKey="role", textKey="content")
    xml.SubElement(view, "Header", value="Answer to rate", size="4")
    _add(view, "Text", name=response, value="$response")
    keys = _hotkeys(schema)
    for attribute in schema.attributes:
        low, high = f"{attribute.low:g}", f"{attribute.high:g}"
        words = f"{attribute.name}, {low} to {high}" + (f": {attribute.meaning}" if attribute.meaning else "")
        xml.SubElement(view, "Header", value=words, size="5")
        shared = {
            "name": attribute.name, "toName": response, "required": "true",
            "requiredMessage": f"rate {attribute.name}, or skip the task",
        }  # fmt: skip
        if shows_radio(attribute):
            choices = _add(view, "Choices", **shared, choice="single-radio", showInline="true")
            for label in map(str, attribute.labels):
                xml.SubElement(choices, "Choice", {"value": label} | keys.get((attribute.name, label), {}))
        else:
            whole = attribute.low == attribute.labels[0] and attribute.high == attribute.labels[-1]
            _add(view, "Number", **shared, min=low, max=high, step="1" if whole else "any")
    xml.indent(view)
    return xml.tostring(view, encoding="unicode") + "\n"


def _hotkeys(schema: Schema) -> dict[tuple[str, str], dict[str, str]]:
    """By attribute and rating: digits for the first attribute whose ratings are digits, then letters while they last.

    Label Studio's own would choose 0 where one presses 1.
    """
    digits, letters, found = set("0123456789"), LETTERS, {}
    for attribute in filter(shows_radio, schema.attributes):
        labels = [str(label) for label in attribute.labels]
        if digits.issuperset(labels):
            keys, digits = labels, set()
        else:
            keys, letters = letters[: len(labels)], letters[len(labels) :]
        found |= {(attribute.name, label): {"hotkey": key} for label, key in zip(labels, keys, strict=False)}
    return found


def shows_radio(attribute: Attribute) -> bool:
    """Whole ratings from end to end, few enough to choose from."""
    labels: Sequence[int] = attribute.labels
    return (attribute.low, attribute.high) == (labels[0], labels[-1]) and len(labels) <= RADIO


def _free(name: str, taken: set[str]) -> str:
    """Controls have the attributes' names, so what is shown must have others."""
    while name in taken:
        name += "_"
    return name


def _add(parent: xml.Element, tag: str, **attributes: str) -> xml.Element:
    return xml.SubElement(parent, tag, attributes)
