"""Outputs of one suite side by side: every figure, and by how much it differs from the first's on the same rows."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path

from steerjax.errors import ConfigError
from steerjax.evaluation.suite import Result, common_rows, read_results, read_rows, write_result
from steerjax.files import make_folder
from steerjax.report.figures import Difference, Figure, differences
from steerjax.report.page import text_table
from steerjax.report.plots import plot_compared


def compare(folders: Sequence[Path], output: Path) -> None:
    """Writes results.json, report.md and a plot, and prints the table.

    Raises ConfigError: fewer than two, or of two suites, or the output is one of them.
    DataError: no output of a suite, or no row in common.
    """
    if len(folders) < 2 or len({folder.resolve() for folder in folders}) < len(folders):
        raise ConfigError("--compare needs two outputs or more, none twice; cure: --compare A B")
    if output.resolve() in {folder.resolve() for folder in folders}:
        raise ConfigError(f"--output {output} is one of the outputs that are compared; cure: another folder")
    said = [read_results(folder) for folder in folders]
    if len(suites := {each["suite"] for each in said}) > 1:
        raise ConfigError(f"--compare of the suites {', '.join(sorted(suites))}; cure: outputs of one suite")
    suite = importlib.import_module(f"steerjax.evaluation.{said[0]['suite']}")
    names = _names(folders)
    found = {
        name: {key: Figure(**figure) for key, figure in each["figures"].items()}
        for name, each in zip(names, said, strict=True)
    }
    first, *others = (read_rows(folder) for folder in folders)
    deltas, both = {}, []
    for name, rows in zip(names[1:], others, strict=True):
        pair = common_rows(rows, first)
        deltas[name] = differences(suite.measure, *map(suite.columns, pair))
        if len(pair[1]) < max(len(rows), len(first)):
            both.append(f"{name}: {len(pair[1])} rows of {len(rows)} and {names[0]}'s {len(first)}.")
    shared = [key for key in found[names[0]] if all(key in each for each in found.values())]
    if not shared:
        raise ConfigError(f"--compare of {', '.join(names)}: no figure is in all; cure: the same scores or attributes")
    make_folder(output)
    plots = {"compared.png": "Every figure that differs, with 95% intervals"}
    plot_compared({name: {key: found[name][key] for key in shared} for name in names}, output / "compared.png")
    if hasattr(suite, "plot_compared"):
        suite.plot_compared(folders, said, output / f"{said[0]['suite']}.png")
        plots[f"{said[0]['suite']}.png"] = "What the suite draws of each model"
    text = "\n".join([
        *text_table(_table(shared, found, deltas), "<" + ">" * len(names) + "<>" * (len(names) - 1)), "",
        f"Differences are to {names[0]}, on the rows that both have, with 95% intervals and two-sided p of paired",
        "draws. Of many figures some will be below 0.05 by chance.", *both,
    ])  # fmt: skip
    detail = {
        "compared": dict(zip(names, map(str, folders), strict=True)),
        "differences": {name: {key: d.to_json() for key, d in each.items()} for name, each in deltas.items()},
    }
    figures = {f"{name}: {key}": found[name][key] for name in names for key in shared}
    title = f"{said[0]['suite']}: {', '.join(names)}"
    write_result(output, said[0]["suite"], title, detail["compared"], Result(figures, text, plots, {}, detail))
    print(f"{text}\n\nreport with plots: {output / 'report.html'}")


def _names(folders: Sequence[Path]) -> list[str]:
    """The folders' names, with as many parents as tell them apart."""
    for depth in range(1, 1 + max(len(folder.resolve().parts) for folder in folders)):
        names = ["/".join(folder.resolve().parts[-depth:]) for folder in folders]
        if len(set(names)) == len(names):
            break
    return names


def _table(shared: Sequence[str], found: dict[str, dict[str, Figure]], deltas: dict[str, dict[str, Difference]]):
    header = ["figure", *found]
    for name in deltas:
        header += [f"{name} - {next(iter(found))}", "p"]
    rows = [header]
    for key in shared:
        values = [figure[key].value for figure in found.values()]
        known = [value for value in values if value is not None]
        if not known or (known == values and max(values) - min(values) <= 1e-9):  # of the data, not of the models
            continue
        row = [key, *("-" if value is None else f"{value:.3f}" for value in values)]
        for each in deltas.values():
            d = each.get(key, Difference(None, 0, None, None))
            between = " [{:+.3f}, {:+.3f}]".format(*d.interval) if d.interval else ""
            row += ["-" if d.value is None else f"{d.value:+.3f}{between}", "-" if d.p is None else f"{d.p:.4f}"]
        rows.append(row)
    return rows
