"""What the suites of reward-model benchmarks share: completions scored, and scores reported beside the longest's.

A row of rows.jsonl keeps the benchmark's own keys and, for each completion in order, `predicted_ratings` (by
attribute), `scores` (by name) and `characters`; a row with a completion too long for the model has `skipped`, the
reason, in place of them, and counts nowhere.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from steerjax.command import MODEL, add_scoring_options
from steerjax.data.conversation import Conversation, Turn
from steerjax.data.formats import (
    JsonRow,
    after_prompt,
    check_turns,
    inside,
    name_of,
    read_dialogue,
    text_of,
    value_of,
)
from steerjax.data.loading import Skipped, file_hashes, write_skipped
from steerjax.errors import DataError
from steerjax.evaluation.suite import Result, kept_rows
from steerjax.report.figures import Columns, Figure, Measure, figures
from steerjax.report.page import text_table
from steerjax.report.plots import BLUE, GREY, INK, new_figure
from steerjax.schema import HELPSTEER, SCALAR_WEIGHTS, STEERLM, Schema, parse_scalar, scalarize

LONGER = "longer wins/"  # prefix of the figures of the baseline whose score is the number of characters
CHUNK = 16  # rows that are packed together, and lost when interrupted, for each of --rows
_MANY = 3  # scores beside which a table has no room for intervals


@dataclass(frozen=True)
class Item:
    """A row of a benchmark: the keys that are kept of it, `id` among them, and its completions with their prompt."""

    kept: JsonRow
    conversations: tuple[Conversation, ...]

    def content(self) -> list:
        return [self.kept, [conversation.content() for conversation in self.conversations]]


def add_options(parser: argparse.ArgumentParser) -> None:
    """Of all suites that score completions."""
    add = parser.add_argument
    add("--model", required=True, metavar="DIR", help=MODEL)
    data = "rows in the benchmark's own layout: a file, or hub:OWNER/NAME:SPLIT; repeatable"
    add("--data", required=True, action="append", metavar="FILE", help=data)
    scalar = "one score: an attribute, goodness, llama3_70b, nemotron4_340b, or NAME=W,...; default: each attribute by "
    add("--scalar", metavar="NAME", help=scalar + "itself and, with HelpSteer's five, those three sums")
    add_scoring_options(parser, formats=False)


def scalars(text: str | None, schema: Schema) -> dict[str, dict[str, float]]:
    """Name -> weights of each score: what `--scalar` says; without it every attribute and, where a model predicts
    HelpSteer's five, the weighted sums that HelpSteer2 publishes.

    Raises ConfigError, as `parse_scalar`.
    """
    if text:
        return dict([parse_scalar(text, schema)])
    known = SCALAR_WEIGHTS if set(HELPSTEER.names) <= set(schema.names) else {}
    return {name: {name: 1.0} for name in schema.names} | known


def prompt_of(row: JsonRow, key: str = "prompt") -> list[Turn]:
    """The turns before a completion: a text, or messages. Raises DataError, which names the key."""
    return read_dialogue(row, STEERLM, key) if isinstance(row.get(key), list) else [Turn("user", text_of(row, key))]


def completed(prompt: Sequence[Turn], said: str | Sequence[Turn], field: str) -> Conversation:
    """The conversation that ends with a completion: a text, the assistant's message, or all messages, prompt inside.

    Raises DataError: as `after_prompt`; turns that do not alternate or do not end with the assistant's.
    """
    turns = after_prompt(prompt, [Turn("assistant", said)] if isinstance(said, str) else said, field)
    check_turns(turns, field)
    system = turns.pop(0).content if turns and turns[0].role == "system" else None
    if len(turns) < 2 or turns[-1].role != "assistant":
        raise DataError("no response to a prompt", field, "end it with the assistant's turn, and give its prompt")
    return Conversation(tuple(turns), system)


def texts_of(row: JsonRow, key: str) -> list[str]:
    """A list of texts, at least one. Raises DataError, which names the key and place."""
    found = value_of(row, key, list)
    for place, text in enumerate(found):
        with inside(f"{key}[{place}]"):
            value_of({"": text}, "", str)
    if not found:
        raise DataError("no completion", key, "give at least one, or remove the row")
    return found


def scored_rows(
    options: argparse.Namespace, read: Callable[[JsonRow, str], tuple[JsonRow, Sequence[Conversation]]],
    check: Callable[[Sequence[Item]], None] = lambda items: None,
) -> tuple[list[JsonRow], dict[str, str]]:  # fmt: skip
    """The rows of rows.jsonl and a summary. `read(row, source)` gives what is kept of a row, and its completions with
    their prompt; `check` sees all rows before any is scored.

    Raises SteerjaxError: a row in another layout, no reward model, weights that do not fit, a score that is not finite.
    """
    from steerjax.checksums import folder_checksum
    from steerjax.inference.job import input_rows
    from steerjax.inference.scorer import open_scorer

    skipped: list[Skipped] = []

    def item(source: str, row: JsonRow, line: int) -> Item:
        kept, conversations = read(row, source)
        kept = {"id": name_of(row) or f"{source}:{line}"} | kept
        return Item(kept, tuple(replace(one, id=kept["id"], file=source, line=line) for one in conversations))

    how = {"on_bad_row": options.on_bad_row}
    items = [i for source in options.data for i in input_rows(source, partial(item, source), skipped, **how)]
    check(items)
    scorer = open_scorer(options.model, options)
    scores = scalars(options.scalar, scorer.schema)
    settings = {
        "suite": options.suite, "data": [*file_hashes(options.data).values()],
        "model": folder_checksum(scorer.description.path), "attributes": scorer.schema.to_json(),
        "row_length": scorer.row_length, "rows": scorer.rows,
        **{key: vars(options)[key] for key in ("scalar", "template", "dtype", "on_bad_row")},
    }  # fmt: skip
    compute = partial(_scored, items, scorer, scores, how["on_bad_row"] == "skip")
    rows = kept_rows(options.output, settings, len(items), compute, CHUNK * scorer.rows)
    write_skipped(options.output / "skipped.jsonl", skipped)
    whole = scored(rows)
    summary = {
        "model": str(scorer.description.path), "data": ", ".join(options.data),
        "scores": "; ".join(_described(name, weights) for name, weights in scores.items()),
        "rows": f"{len(whole)} scored, {len(rows) - len(whole)} with a completion too long, {len(skipped)} skipped",
    }  # fmt: skip
    if not whole:
        cure = "a larger --row-length, or other rows"
        raise DataError(f"no row could be scored, the first: {rows[0]['skipped']}", file=options.data[0], cure=cure)
    return rows, summary


def _scored(items: Sequence[Item], scorer, scores: Mapping[str, Mapping], skip: bool, part: range) -> list[JsonRow]:
    from steerjax.inference.scorer import predicted_ratings

    items = items[part.start : part.stop]
    flat = [conversation for item in items for conversation in item.conversations]
    ratings, rows = iter(predicted_ratings(scorer, flat, [len(one.turns) - 1 for one in flat], skip=skip)), []
    for item in items:
        found = list(islice(ratings, len(item.conversations)))
        row = dict(item.kept)
        rows.append(row)
        if refused := [one for one in found if isinstance(one, Skipped)]:
            row["skipped"] = refused[-1].reason
            continue
        row["predicted_ratings"] = {name: [one[name] for one in found] for name in scorer.schema.names}
        row["scores"] = {name: [scalarize(one, weights) for one in found] for name, weights in scores.items()}
        row["characters"] = [len(one.turns[-1].content) for one in item.conversations]
    return rows


def _described(name: str, weights: Mapping[str, float]) -> str:
    terms = " + ".join(f"{weight:g} {attribute}" for attribute, weight in weights.items()).replace("+ -", "- ")
    return name if weights == {name: 1.0} else f"{name} = {terms}"


def scored(rows: Sequence[JsonRow]) -> list[JsonRow]:
    """The rows that have scores."""
    return [row for row in rows if "skipped" not in row]


def scores_of(rows: Sequence[JsonRow]) -> dict[str, list[list[float]]]:
    """Prefix of a score's figures -> its values for the completions of each row; the baseline's stands last.

    The prefix is "" where there is one score, so that models with one score each can be compared, whatever it is of.
    """
    names = list(rows[0]["scores"]) if rows else []
    found = {f"{name}/" if len(names) > 1 else "": [row["scores"][name] for row in rows] for name in names}
    return found | {LONGER: [row["characters"] for row in rows]}


def prefixes(columns: Columns, ending: str) -> list[str]:
    """Of the scores that have a column of this ending."""
    return [name.removesuffix(ending) for name in columns if name.endswith(ending)]


def section_means(codes: np.ndarray, values: np.ndarray, count: int) -> np.ndarray:
    """Mean of `values` [n] for each of the codes 0 to `count`; NaN for one without rows."""
    rows = np.bincount(codes, minlength=count)
    return np.divide(np.bincount(codes, values, count), rows, out=np.full(len(rows), np.nan), where=rows > 0)


def result(
    options: argparse.Namespace, rows: Sequence[JsonRow], summary: Mapping[str, str], columns: Columns,
    measure: Measure, *, title: str, sections: Mapping[str, float | None], ties: str, whole: int = 0,
) -> Result:  # fmt: skip
    """The table, the plot sections.png and notes. `sections`: figure -> what chance gives, None where that says
    nothing; `ties`: what becomes of equal scores; `whole`: rows of the published benchmark, 0 where it has several."""
    found, kept = figures(measure, columns), scored(rows)
    names = list(kept[0]["scores"])
    labels = dict(zip(scores_of(kept[:1]), [*names, LONGER.rstrip("/")], strict=True))
    notes = []
    if whole and len(rows) != whole:
        notes.append(f"A partial file: {len(rows):,} rows of the benchmark's {whole:,}.")
    first = next(iter(labels))
    if empty := [section for section in sections if found[first + section].count == 0]:
        notes.append(f"No rows: {', '.join(empty)}.")
    if unknown := [s for s in sections if found[first + s].value is None and s not in empty]:
        notes.append(f"Undefined without those rows: {', '.join(unknown)}.")
    if left_out := len(rows) - len(kept):
        notes.append(f"Left out for a completion that is too long (rows.jsonl has the reasons): {left_out} rows.")
    shares = {label: found[f"{prefix}equal scores"].value for prefix, label in labels.items()}
    if equal := [f"{label} {share:.1%}" for label, share in shares.items() if share]:
        notes.append(f"Comparisons between equal scores, {ties}: {', '.join(equal)}.")
    _plot(options.output / "sections.png", title, found, labels, sections)
    text = "\n".join([_table(found, labels, sections), "", *notes]).rstrip()
    words = "Share that is right by section, with 95% intervals; dashed: chance"
    return Result(found, text, {"sections.png": words}, summary)


def _table(found: Mapping[str, Figure], labels: Mapping[str, str], sections: Mapping[str, Any]) -> str:
    """A line a section; intervals where there is room for them."""
    lines = [["", "rows", *labels.values()]]
    for section in sections:
        row = [found[prefix + section] for prefix in labels]
        if not row[0].count:
            cells = ["no rows"] * len(row)
        elif len(row) > _MANY:
            cells = ["-" if one.value is None else f"{one.value:.3f}" for one in row]
        else:
            cells = [str(one) for one in row]
        lines.append([section, str(row[0].count), *cells])
    return "\n".join(text_table(lines, "<>" + ">" * len(labels)))


def _plot(path: Path, title: str, found: Mapping[str, Figure], labels: Mapping[str, str], sections: Mapping) -> None:
    """A panel a section, a bar a score; no panel for what is undefined though there are rows."""
    known = {name for name in sections if any(found[prefix + name].value is not None for prefix in labels)}
    first = next(iter(labels))
    sections = {name: c for name, c in sections.items() if name in known or not found[first + name].count}
    with new_figure(path, 1.75 * len(sections) + 1.6, 0.36 * len(labels) + 1.5, title) as figure:
        panels = figure.subplots(1, len(sections), sharey=True, squeeze=False)[0]
        for axes, (section, chance) in zip(panels, sections.items(), strict=True):
            for place, prefix in enumerate(labels):
                value, _, interval = found[prefix + section]
                if value is None:
                    continue
                error = [[max(0, value - interval[0])], [max(0, interval[1] - value)]] if interval else None
                colour = GREY if prefix == LONGER else BLUE
                axes.barh(place, value, height=0.72, color=colour, xerr=error, ecolor=INK, capsize=2)
                axes.text(1.04, place, f"{value:.2f}", color=INK, va="center", fontsize=8.5)
            if section not in known:
                axes.text(0.5, 0.5, "no rows", transform=axes.transAxes, color=GREY, ha="center", va="center")
            elif chance is not None:
                axes.axvline(chance, color=INK, linewidth=1, linestyle="--")
            axes.set(xlim=(0, 1.3), xticks=(0, 0.5, 1), xticklabels=("0", "0.5", "1"))
            axes.set_title(section, fontsize=10.5)
            axes.grid(visible=False, axis="y")
            axes.tick_params(axis="y", length=0)
        panels[0].set_yticks(range(len(labels)), labels.values())
        panels[0].set_ylim(len(labels) - 0.4, -0.6)
        figure.supxlabel("share that is right, with 95% intervals; dashed: chance", fontsize=9.5)
