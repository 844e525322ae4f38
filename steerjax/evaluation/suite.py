"""What the suites share: rows that are kept while they are computed, and the folder that a suite leaves.

A suite is a module: `add_options(parser)`; `run(options)` gives a `Result`; `columns(rows)` and `measure(columns)` are
what its figures follow from (`report.figures`), for its own report and for comparisons.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from steerjax import __version__
from steerjax.errors import DataError
from steerjax.evaluation import SUITES
from steerjax.inference.job import progress, resumable
from steerjax.report.figures import Figure
from steerjax.report.page import fenced, text_table, write_page
from steerjax.report.records import write_json

ROWS, RESULTS = "rows.jsonl", "results.json"


@dataclass(frozen=True)
class Result:
    """What a suite found.

    Attributes:
        figures: by name; `/` parts a name, as in `Chat Hard/accuracy`.
        text: tables and sentences, printed and put into report.md.
        plots: PNG files in the output folder -> what is seen there.
        summary: facts of the run, by name.
        detail: more for results.json, plain data.
        pages: further files in the folder -> what they hold.
    """

    figures: Mapping[str, Figure]
    text: str
    plots: Mapping[str, str] = field(default_factory=dict)
    summary: Mapping[str, str] = field(default_factory=dict)
    detail: Mapping[str, Any] = field(default_factory=dict)
    pages: Mapping[str, str] = field(default_factory=dict)


def kept_rows(
    folder: Path, settings: Mapping[str, Any], count: int, compute: Callable[[range], Sequence[Mapping]],
    chunk: int = 64, unit: str = "row",
) -> list[dict]:  # fmt: skip
    """The rows 0 to `count` of rows.jsonl; those that are not there yet are computed, `chunk` at a time, and kept.

    `settings` are all that they depend on. Raises DataError: the folder holds rows of other settings.
    """
    with resumable(folder / ROWS, settings) as output, progress(count, output.done, unit) as bar:
        for first in range(output.done // chunk * chunk, 0 if output.finished else count, chunk):
            part = range(first, min(first + chunk, count))
            output.add(first, compute(part))
            bar.update(output.done - bar.n)
    return read_rows(folder)


def read_results(folder: Path) -> dict[str, Any]:
    """results.json of a folder that a suite has left. Raises DataError: it is none, or that of a comparison."""
    try:
        said = json.loads((folder / RESULTS).read_text(encoding="utf-8"))
        if said["suite"] not in SUITES or "compared" in said or not {"figures", "options"} <= said.keys():
            raise KeyError("suite")
        return said
    except (OSError, ValueError, TypeError, RecursionError, KeyError) as error:
        cure = "a folder that evaluate --suite NAME has finished"
        raise DataError(f"no output of a suite ({type(error).__name__})", file=str(folder), cure=cure) from None


def read_rows(folder: Path) -> list[dict]:
    """rows.jsonl of a folder that a suite has left."""
    return [json.loads(line) for line in (folder / ROWS).read_bytes().splitlines()]


def row_name(row: Mapping[str, Any]) -> tuple:
    """What a row of rows.jsonl is told by in outputs of other models."""
    return tuple(row.get(key) for key in ("subset", "domain", "id", "turn", "message"))


def common_rows(one: Sequence[Mapping], other: Sequence[Mapping]) -> tuple[list[Mapping], list[Mapping]]:
    """The rows of both outputs that both could score; all where the names of rows do not tell them apart, or the
    outputs have no name in common."""
    usable = [{row_name(row) for row in rows if "skipped" not in row} for rows in (one, other)]
    if any(len(set(map(row_name, rows))) < len(rows) for rows in (one, other)) or not (both := usable[0] & usable[1]):
        return list(one), list(other)
    return [row for row in one if row_name(row) in both], [row for row in other if row_name(row) in both]


def figure_table(found: Mapping[str, Figure], names: Sequence[str] | None = None) -> str:
    """Figures as plain text: value, 95% interval, number of rows."""
    rows = [["figure", "value", "95% interval", "n"]]
    for name in found if names is None else names:
        value, count, interval = found[name]
        between = "{:.3f} to {:.3f}".format(*interval) if interval else "-"
        rows.append([name, "-" if value is None else f"{value:.3f}", between, str(count)])
    return "\n".join(text_table(rows, "<>>>"))


def write_result(folder: Path, name: str, title: str, options: Mapping[str, Any], result: Result) -> None:
    """results.json, report.md and report.html."""
    given = {key: str(value) if isinstance(value, Path) else value for key, value in options.items()}
    found = {figure: value.to_json() for figure, value in result.figures.items()}
    said = {
        "suite": name,
        "steerjax": __version__,
        "options": given,
        "summary": {k: str(v) for k, v in result.summary.items()},
        "figures": found,
    }
    write_json(folder / RESULTS, said | dict(result.detail))
    parts = [
        f"# {title}",
        fenced(result.text),
        "Intervals are 95% by bootstrap over the rows: what chance in the choice of rows alone would move.",
        *(f"![{words}]({plot})" for plot, words in result.plots.items()),
        "\n".join([*(f"- {words}: [{page}]({page})" for page, words in result.pages.items()),
                   *([f"- every row: [{ROWS}]({ROWS})"] if (folder / ROWS).exists() else []),
                   f"- every figure: [{RESULTS}]({RESULTS})"]),
    ]  # fmt: skip
    write_page(folder, parts, result.summary, json.dumps(given, indent=2, ensure_ascii=False, default=str))
