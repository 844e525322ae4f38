"""The steerability report: tables and sentences, and its plots."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from steerjax.evaluation.steerbench import MEASURES
from steerjax.evaluation.steering_measures import TEXT, VARIANTS
from steerjax.report.figures import Columns, Figure
from steerjax.report.page import text_table
from steerjax.report.plots import BLUE, GREY, INK, new_figure, panel_title, scatter_with_means
from steerjax.schema import Schema

KEYS = {"predicted": "predicted rating", "characters": "characters", "words": "words", "grade": "Flesch-Kincaid grade"}


@dataclass(frozen=True)
class Found:
    """What was asked and measured: `schema`, the attributes that were asked for; `space`, all whose range is known;
    `trends`, see `steering_measures.trends`."""

    schema: Schema
    space: Schema
    neutral: Mapping[str, float]
    columns: Columns
    figures: Mapping[str, Figure]
    trends: Mapping[str, Mapping[str, Any]]

    @property
    def rated(self) -> list[str]:
        """The attributes with predictions."""
        return [name.removeprefix("predicted/") for name in self.columns if name.startswith("predicted/")]

    @property
    def swept(self) -> list[str]:
        """The attributes that were asked for with two ratings or more."""
        return [name for name in self.schema.names if len(self.levels(name)) > 1]

    @property
    def cut(self) -> str:
        """How many answers are shorter than the model would have made them."""
        cut, count = int(np.nansum(self.columns["cut"])), len(self.columns["cut"])
        more = ": they would have been longer" if cut else ""
        return f"{cut} of {count} answers were cut at the limit of tokens{more}"

    def levels(self, name: str) -> list[float]:
        """The ratings that were asked for, of the answers that count for the attribute."""
        asked = self.columns[f"asked/{name}"]
        return np.unique(asked[~np.isnan(asked)]).tolist()

    def curve(self, name: str, key: str) -> list[tuple[float, Figure]]:
        """The mean and its interval at each requested rating that has one."""
        points = [(level, self.figures.get(f"{name}={level:g}/{key}")) for level in self.levels(name)]
        return [(level, figure) for level, figure in points if figure and figure.value is not None]

    def monotone(self, name: str, key: str) -> bool | None:
        """Do the means rise, or fall, with every requested rating; None for fewer than two."""
        means = [figure.value for _, figure in self.curve(name, key)]
        steps = np.diff(means)
        return bool((steps > 0).all() or (steps < 0).all()) if len(steps) else None

    def detail(self) -> dict[str, Any]:
        """More for results.json: ranges, the neutral request, trends, and how STEERBENCH's measures are spread."""
        spread = {}
        for variant in VARIANTS:
            for name in MEASURES:
                values = self.columns[f"{variant}/{name}"]
                values = values[~np.isnan(values)]
                q1, median, q3 = np.percentile(values, [25, 50, 75]).tolist() if len(values) else (None,) * 3
                mean = float(values.mean()) if len(values) else None
                spread[f"{variant}/{name}"] = {"median": median, "q1": q1, "q3": q3, "mean": mean, "n": len(values)}
        attributes = {
            name: {"levels": self.levels(name), **trend, "monotone": {key: self.monotone(name, key) for key in KEYS}}
            for name, trend in self.trends.items()
        }
        return {
            "ranges": {a.name: [a.low, a.high] for a in self.schema.attributes}, "neutral": dict(self.neutral),
            "goal_space": [a.name for a in self.space.attributes if a.name in self.rated],
            "attributes": attributes, "spread": spread,
        }  # fmt: skip


def report_text(found: Found) -> str:
    """Tables of curves, leakage and STEERBENCH's measures, with what is undefined and why."""
    return "\n\n".join(filter(None, (_curves(found), _trends(found), _leakage(found), _steerbench(found))))


def _curves(found: Found) -> str:
    keys = [key for key in KEYS if any(found.curve(name, key) for name in found.schema.names)]
    rows = [["attribute", "requested", "n", *(KEYS[key] for key in keys)]]
    for name in found.schema.names:
        for level in found.levels(name):
            given = [found.figures.get(f"{name}={level:g}/{key}") for key in keys]
            count = int(np.sum(found.columns[f"asked/{name}"] == level))
            forms = (".2f" if key == "predicted" else ".1f" for key in keys)
            cells = [_cell(figure, form) for figure, form in zip(given, forms, strict=True)]
            rows.append([name, f"{level:g}", str(count), *cells])
    return "\n".join(text_table(rows, "<>>" + ">" * len(keys)))


def _trends(found: Found) -> str:
    said = []
    for name in found.schema.names:
        tests, levels = found.trends[name]["trends"], found.levels(name)
        if len(levels) < 2:
            said.append(f"{name}: one rating alone was asked for, so what a request does is undefined")
            continue
        told = []
        for key, test in tests.items():
            if test["spearman"] is None:
                if test["n"]:
                    told.append(f"{KEYS[key]} is the same in all answers, so their correlation is undefined")
                continue
            way = "monotone" if found.monotone(name, key) else "not monotone"
            step = _cell(found.figures[f"{name}/slope/{key}"], ".2f", "+")
            told.append(f"{KEYS[key]} {step} a point, Spearman {test['spearman']:+.2f} (p {test['p']:.4f}), {way}")
        if found.trends[name]["held"] != "the prompt and the other ratings":
            told.append(f"no answers differ in {name} alone: what is held is {found.trends[name]['held']}")
        said.append(f"{name}: " + "\n  ".join(told))
    if not found.rated:
        said.append("no answer has predicted ratings; --reward-model, or annotate, gives them")
    said += _exact(found)
    distance = found.figures["distance"]
    if distance.value is not None:
        said.append(f"distance: {distance} attributes differ from the request on average ({distance.count} answers)")
    return "\n".join([*said, found.cut])


def _exact(found: Found) -> list[str]:
    """How often the rounded prediction is the request, where predictions differ at all."""
    met, said = [], []
    for name in found.swept:
        exact, chance = found.figures[f"{name}/exact"].value, found.figures[f"{name}/exact by chance"].value
        if exact is not None:
            met.append(f"{name} {exact:.0%} ({chance:.0%})")
        elif found.figures[f"{name}/exact"].count:
            why = "every prediction rounds to one rating, so the share of met requests says nothing about steering"
            said.append(f"{name}: {why}")
    if met:
        said.append(f"rounded prediction is the request (in brackets: were the requests shuffled): {', '.join(met)}")
    return said


def _leakage(found: Found) -> str:
    """Rows: requested; columns: predicted; on the diagonal what the attribute's own request moves."""
    asked = found.swept
    if not asked or not found.rated:
        return ""
    rows = [["requested", *found.rated]]
    rows += [[name, *(_cell(moved(found, name, other), ".2f", "+") for other in found.rated)] for name in asked]
    title = "Predicted rating of each attribute (columns) per point of the requested one (rows):"
    return "\n".join([title, *text_table(rows, "<" + ">" * len(found.rated))])


def moved(found: Found, name: str, other: str) -> Figure:
    """By how much predicted `other` rises per point of requested `name`."""
    undefined = Figure(None, 0, None)
    return found.figures.get(f"{name}/slope/predicted" if name == other else f"leakage/{name}/{other}", undefined)


def _steerbench(found: Found) -> str:
    if not found.rated:
        return ""
    spread = found.detail()["spread"]
    rows = [["STEERBENCH, median (quartiles)", "n", "continuous", "binned, as its report"]]
    for name in MEASURES:
        cells, count = [], 0
        for variant in VARIANTS:
            value = spread[f"{variant}/{name}"]
            count = value["n"]
            cells.append("{median:.3f} ({q1:.3f} to {q3:.3f})".format(**value) if count else "undefined")
        rows.append([name, str(count), *cells])
    lines = text_table(rows, "<>>>")
    if not spread[f"steerbench/{MEASURES[0]}"]["n"]:
        lines.append("undefined: no prompt has rated answers to the neutral request and to another; see --attributes")
    return "\n".join(lines)


def _cell(figure: Figure | None, form: str, sign: str = "") -> str:
    if figure is None or figure.value is None:
        return "-"
    value = format(figure.value, sign + form)
    return value + (
        " [{}, {}]".format(*(format(end, sign + form) for end in figure.interval)) if figure.interval else ""
    )


def draw(found: Found, folder: Path) -> dict[str, str]:
    """The plots in the folder -> what is seen there; those that have something to show."""
    drawn = {"curves.png": "What came out against what was asked for, with 95% intervals"}
    _draw_curves(found, folder / "curves.png")
    if any(moved(found, name, other).value is not None for name in found.swept for other in found.rated):
        _draw_leakage(found, folder / "leakage.png")
        drawn["leakage.png"] = "What a point of each requested rating moves"
    both = [name for name in found.swept or found.schema.names if found.curve(name, "predicted")]
    if both:
        _draw_obtained(found, both, folder / "obtained.png")
        drawn["obtained.png"] = "Predicted against requested ratings, answer by answer"
    return drawn


def _draw_curves(found: Found, path: Path) -> None:
    """A row an attribute, a column a measure; a measure of the text has one axis for all."""
    names = found.swept or list(found.schema.names)
    keys = [key for key in ("predicted", *TEXT) if any(found.curve(name, key) for name in names)]
    title = found.cut if np.nansum(found.columns["cut"]) else None
    with new_figure(path, max(3.0 * len(keys), 5.4), 2.6 * len(names) + 1.0, title) as figure:
        panels = figure.subplots(len(names), len(keys), squeeze=False)
        for row, attribute in zip(panels, map(found.schema.__getitem__, names), strict=True):
            span = attribute.high - attribute.low
            limits = attribute.low - 0.06 * span, attribute.high + 0.06 * span
            for axes, key in zip(row, keys, strict=True):
                if points := found.curve(attribute.name, key):
                    x, y = [level for level, _ in points], [figure.value for _, figure in points]
                    ends = np.array([figure.interval or (figure.value,) * 2 for _, figure in points])
                    axes.fill_between(x, *ends.T, color=BLUE, alpha=0.2, linewidth=0, label="95% interval")
                    axes.plot(x, y, "o-", color=BLUE, linewidth=2, markersize=5, label="mean")
                if 3 <= len(attribute.labels) <= 10:
                    axes.set_xticks(attribute.labels)
                if key == "predicted":
                    axes.plot(limits, limits, "--", color=GREY, linewidth=1, label="as asked for")
                    low, high = (ends.min(), ends.max()) if points else limits
                    axes.set_yticks(axes.get_xticks())
                    axes.set_ylim(min(limits[0], low), max(limits[1], high))
                axes.set(xlim=limits, xlabel="requested rating", ylabel=KEYS[key])
            row[0].set_title(attribute.name)  # of the row
        for key, column in zip(keys, panels.T, strict=True):
            if key != "predicted":
                lows, highs = zip(*(axes.get_ylim() for axes in column), strict=True)
                for axes in column:
                    axes.set_ylim(min(lows), max(highs))
        shown = {
            words: line
            for axes in panels.ravel()
            for line, words in zip(*axes.get_legend_handles_labels(), strict=True)
        }
        figure.legend(shown.values(), shown.keys(), loc="outside lower center", ncols=3)


def _draw_leakage(found: Found, path: Path) -> None:
    asked = found.swept
    cells = [[moved(found, name, other) for other in found.rated] for name in asked]
    matrix = np.array([[np.nan if cell.value is None else cell.value for cell in row] for row in cells])
    limit = max(np.nanmax(np.abs(matrix)), 1.0)  # 1 is as asked for, so that a faint colour is a small effect
    longest = max(map(len, [*found.rated, *asked]))
    width, height = 1.5 + 0.08 * longest + 1.2 * len(found.rated), 1.1 + 0.05 * longest + 0.62 * len(asked)
    with new_figure(path, max(width, 5.4), height, "Predicted rating per point of the request") as figure:
        axes = figure.subplots()
        shown = axes.imshow(matrix, cmap="RdBu_r", vmin=-limit, vmax=limit, aspect="auto")
        for (row, column), value in np.ndenumerate(matrix):
            interval = cells[row][column].interval
            style = {"ha": "center", "color": "white" if abs(value) > 0.6 * limit else INK}
            own = "bold" if asked[row] == found.rated[column] else "normal"
            text = "–" if np.isnan(value) else f"{value:+.2f}"
            axes.text(column, row, text, va="bottom" if interval else "center", fontweight=own, **style)
            if interval:
                axes.text(column, row + 0.08, "{:+.2f} to {:+.2f}".format(*interval), va="top", fontsize=8, **style)
        axes.set_xticks(range(len(found.rated)), found.rated, rotation=30, ha="right", rotation_mode="anchor")
        axes.set_yticks(range(len(asked)), asked)
        axes.set(xlabel="predicted", ylabel="requested")
        axes.grid(visible=False)
        figure.colorbar(shown, ax=axes)


def _draw_obtained(found: Found, names: list[str], path: Path) -> None:
    columns = min(len(names), 3)
    rows = -(-len(names) // columns)
    with new_figure(path, max(3.3 * columns, 4.6), 3.1 * rows + 0.6) as figure:
        panels = figure.subplots(rows, columns, squeeze=False).ravel()
        for axes, name in zip(panels, names, strict=False):
            asked, predicted, attribute = (
                found.columns[f"asked/{name}"],
                found.columns[f"predicted/{name}"],
                found.schema[name],
            )
            seen = ~np.isnan(asked) & ~np.isnan(predicted)
            scatter_with_means(axes, asked[seen], predicted[seen], attribute, "answer", "as asked for")
            axes.set(xlabel="requested rating", ylabel="predicted rating")
            panel_title(axes, name)
        for axes in panels[len(names) :]:
            axes.set_visible(False)
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3 if columns > 1 else 1)
