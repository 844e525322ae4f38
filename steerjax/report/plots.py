"""The report's plots, as PNG files. matplotlib is optional and imported only when a plot is drawn.

Figures are built without pyplot, so nothing of a caller's matplotlib state (backend, rcParams, open figures) changes.
Colours are from the Okabe-Ito palette, which colour-blind readers can tell apart.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from steerjax.errors import SteerjaxError
from steerjax.report.metrics import PAPER_STATISTICS, attribute_correlations
from steerjax.report.results import LOG_LENGTH, MEAN_RATING, EvaluationResult

BLUE, ORANGE, GREEN, INK, GREY, FAINT = "#0072B2", "#D55E00", "#009E73", "#222222", "#6E6E6E", "#E3E3E3"
BASELINE_COLOURS = {MEAN_RATING: GREY, LOG_LENGTH: ORANGE}
DPI = 130
RATING_LIMITS = (-0.3, 4.3)


def require_matplotlib() -> None:
    """Call before a long run that ends in plots. Raises SteerjaxError with the cure if matplotlib is missing."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise SteerjaxError(f"plots need matplotlib ({error})\n  cure: pip install 'steerjax[plots]'") from error


def plot_losses(
    records: Iterable[Mapping],
    path: str | Path,
    baselines: Mapping[str, float | None] | None = None,
    names: Sequence[str] | None = None,
) -> None:
    """Training loss and validation error against the step.

    Args:
        records: the objects of `metrics.jsonl`. Where a resumed run wrote a step twice, the later one counts.
        path: PNG to write.
        baselines: average MSE by name, drawn as horizontal lines.
        names: attributes to average over in validation records; default: all that a record has.

    Raises:
        SteerjaxError: matplotlib is missing.
    """
    records = list(records)
    train = _by_step((r["step"], r.get("loss")) for r in records if r.get("split") == "train")
    validation = _by_step((r["step"], _validation_error(r, names)) for r in records if r.get("split") == "validation")
    levels = {name: value for name, value in (baselines or {}).items() if value is not None and math.isfinite(value)}
    figure = _figure(8.4, 4.6)
    axes = figure.add_subplot()
    labels = []
    if len(train):
        window = max(1, len(train) // 12) | 1
        smooth = _running_mean(train[:, 1], window)
        axes.plot(train[:, 0], train[:, 1], color=BLUE, alpha=0.25, linewidth=0.9)
        axes.plot(train[:, 0], smooth, color=BLUE, linewidth=2)
        labels.append((smooth[-1], f"training loss\n(bold: mean of {window})" if window > 1 else "training loss", BLUE))
    if len(validation):
        axes.plot(*validation.T, color=INK, linewidth=1, marker="o", markersize=5.5, zorder=4)
        labels.append((validation[-1, 1], f"validation, last {validation[-1, 1]:.3f}", INK))
    for name, level in levels.items():
        colour = BASELINE_COLOURS.get(name, GREY)
        axes.axhline(level, color=colour, linewidth=1.3, linestyle=(0, (5, 3)), zorder=1)
        labels.append((level, f"{name} baseline {level:.3f}", colour))
    _limit_losses(axes, train, validation, list(levels.values()))
    _label_at_right(axes, labels)
    rated = any(key.endswith("/mse") for r in records for key in r)
    _style(axes, "Training loss and validation error" if len(validation) else "Training loss")
    axes.set_xlabel("step", fontsize=10.5)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_ylabel("mean squared error (rating²)" if rated or levels else "loss", fontsize=10.5)
    _save(figure, path)


def plot_predictions(result: EvaluationResult, path: str | Path) -> None:
    """Predicted against human ratings, one panel an attribute. Raises SteerjaxError if matplotlib is missing."""
    count = len(result.names)
    columns = min(count, 2 if count in (2, 4) else 3)
    rows = -(-count // columns)
    figure = _figure(max(3.15 * columns, 8.0), 3.25 * rows + 0.9)
    panels = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True).ravel()
    for a, (axes, name) in enumerate(zip(panels, result.names, strict=False)):
        seen = result.mask[:, a] & np.isfinite(result.predicted[:, a])
        r = result.metrics[name]["pearson"]
        handles = _predictions_panel(axes, result.ratings[seen, a], result.predicted[seen, a])
        _style(axes, f"{name}  (r = {_decimal(r)})")
        axes.set(xlim=RATING_LIMITS, ylim=RATING_LIMITS, xticks=range(5), yticks=range(5), aspect="equal")
        axes.tick_params(labelbottom=a + columns >= count)
        if a % columns == 0:
            axes.set_ylabel("predicted rating", fontsize=10.5)
        if a + columns >= count:
            axes.set_xlabel("human rating", fontsize=10.5)
    for axes in panels[count:]:
        axes.set_visible(False)
    figure.suptitle("Predicted against human ratings, validation split", fontsize=12.5, color=INK)
    figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False, fontsize=9.5)
    _save(figure, path)


def plot_correlations(result: EvaluationResult, path: str | Path) -> None:
    """How attributes go together: human ratings, predicted ratings, and the paper's Table 2 where it knows the names.

    Raises:
        SteerjaxError: matplotlib is missing.
    """
    human = attribute_correlations(result.ratings, result.mask)
    predicted = attribute_correlations(result.predicted, result.mask & np.isfinite(result.predicted))
    count = len(result.names)
    side = 1.9 + 0.52 * count
    figure = _figure(max(2 * side + 0.6, 8.5), side + 1.5 + 0.42 * count)
    grid = figure.add_gridspec(2, 2, height_ratios=[side, 0.9 + 0.42 * count])
    left, right = figure.add_subplot(grid[0, 0]), figure.add_subplot(grid[0, 1])
    _heat_map(left, human, result.names, "Human ratings")
    _heat_map(right, predicted, result.names, "Predicted ratings")
    if count > 1:
        anchor = result.names.index("helpfulness") if "helpfulness" in result.names else 0
        _anchor_panel(figure.add_subplot(grid[1, :]), result.names, anchor, human, predicted)
    figure.suptitle("Which attributes go together: Pearson r on the validation split", fontsize=12.5, color=INK)
    _save(figure, path)


def _figure(width: float, height: float):
    """An empty figure, inches. Raises SteerjaxError if matplotlib is missing."""
    require_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained", facecolor="white")
    figure.get_layout_engine().set(w_pad=0.1, h_pad=0.1)
    FigureCanvasAgg(figure)
    return figure


def _save(figure, path: str | Path) -> None:
    figure.savefig(path, format="png", dpi=DPI)


def _style(axes, title: str) -> None:
    axes.set_title(title, fontsize=11.5, color=INK, loc="left")
    axes.tick_params(labelsize=9.5, colors=INK, length=3)
    axes.grid(color=FAINT, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(GREY)


def _decimal(value: float | None) -> str:
    return "undefined" if value is None or not math.isfinite(value) else f"{value:.2f}".replace("-0.00", "0.00")


def _by_step(pairs: Iterable[tuple[int, float | None]]) -> np.ndarray:
    """`[n, 2]` of step and finite value, sorted by step, the last value of a step."""
    latest = {step: value for step, value in pairs if value is not None and math.isfinite(value)}
    return np.asarray(sorted(latest.items()), dtype=np.float64).reshape(-1, 2)


def _validation_error(record: Mapping, names: Sequence[str] | None) -> float | None:
    """Mean MSE over the attributes of an evaluation record, or its loss where it has none (language models)."""
    if names is None:
        values = [value for key, value in record.items() if key.startswith("attributes/") and key.endswith("/mse")]
    else:
        values = [record.get(f"attributes/{name}/mse") for name in names]
    values = [value for value in values if value is not None]
    return float(np.mean(values)) if values else record.get("loss")


def _running_mean(values: np.ndarray, window: int) -> np.ndarray:
    """Centred mean of `window` (odd) values; at either end, of those of them that there are."""
    total = np.concatenate([[0.0], np.cumsum(values)])
    index = np.arange(len(values))
    first, last = np.maximum(index - window // 2, 0), np.minimum(index + window // 2 + 1, len(values))
    return (total[last] - total[first]) / (last - first)


def _limit_losses(axes, train: np.ndarray, validation: np.ndarray, levels: list[float]) -> None:
    """Limits the y axis to where training ends up, and says so: an untrained head's first errors dwarf the rest."""
    late = train[len(train) // 5 :, 1]
    shown = np.concatenate([late, validation[len(validation) // 5 :, 1], levels])
    if not len(shown):
        return
    low, high = shown.min(), shown.max()
    pad = 0.08 * (high - low) or 0.1 * abs(high) or 1.0
    highest = max(np.concatenate([train[:, 1], validation[:, 1], levels]))
    top = highest if highest <= high + 0.5 * (high - low) else high
    axes.set_ylim(low - pad, top + pad)
    if top < highest:
        axes.set_title(f"not shown: first steps, up to {highest:.3g}", loc="right", fontsize=9, color=GREY)


def _label_at_right(axes, labels: list[tuple[float, str, str]]) -> None:
    """Writes (y, text, colour) right of the axes at height y, moved apart where they would overlap."""
    low, high = axes.get_ylim()
    order = sorted(labels)
    # Heights in axes fractions; a line of text is about 0.055 of this figure's axes.
    sizes = [0.055 * (text.count("\n") + 1) for _, text, _ in order]
    wanted = [min(1.0, max(0.0, (y - low) / (high - low))) for y, _, _ in order]
    for (_, text, colour), height in zip(order, _spread(wanted, sizes), strict=True):
        axes.annotate(
            text, (1.015, height), xycoords="axes fraction", fontsize=9.5, color=colour, va="center",
            annotation_clip=False,
        )  # fmt: skip


def _spread(wanted: list[float], sizes: list[float]) -> list[float]:
    """Centres as near as possible to `wanted` (ascending) with intervals of `sizes` that do not overlap."""
    groups: list[tuple[float, list[int]]] = []
    for i, centre in enumerate(wanted):
        group = (centre, [i])
        while groups:
            centre_before, before = groups[-1]
            room = (sum(sizes[j] for j in before) + sum(sizes[j] for j in group[1])) / 2
            if group[0] - centre_before >= room:
                break
            groups.pop()
            members = before + group[1]
            group = (sum(wanted[j] for j in members) / len(members), members)
        groups.append(group)
    centres = []
    for centre, members in groups:
        edge = centre - sum(sizes[j] for j in members) / 2
        for j in members:
            centres.append(edge + sizes[j] / 2)
            edge += sizes[j]
    return centres


def _predictions_panel(axes, human: np.ndarray, predicted: np.ndarray) -> list:
    """Points `[n]`, the mean prediction at each human rating, and the identity; returns the legend's handles."""
    # The golden ratio's multiples spread evenly and are the same in every run.
    jitter = (np.arange(len(human)) * 0.6180339887 % 1.0 - 0.5) * 0.36
    inside = np.clip(predicted, *RATING_LIMITS)
    identity = axes.plot(RATING_LIMITS, RATING_LIMITS, color=GREY, linewidth=1, linestyle=(0, (5, 3)))[0]
    points = axes.scatter(
        human + jitter,
        inside,
        s=13,
        color=BLUE,
        alpha=min(0.5, max(0.12, 40 / max(len(human), 1))),
        linewidths=0,
        clip_on=False,
    )
    levels = np.unique(np.round(human))
    groups = [predicted[np.round(human) == level] for level in levels]
    errors = [group.std(ddof=1) / math.sqrt(len(group)) if len(group) > 1 else 0.0 for group in groups]
    means = axes.errorbar(
        levels, [group.mean() for group in groups], yerr=errors, color=ORANGE, fmt="o-", markersize=5.5,
        linewidth=1.4, elinewidth=1.4, capsize=3, zorder=4,
    )  # fmt: skip
    beyond = int(np.sum(inside != predicted))
    if beyond:
        axes.text(0.03, 0.97, f"{beyond} beyond the axes", transform=axes.transAxes, fontsize=8.5, color=GREY, va="top")
    points.set_label("one response (spread sideways)")
    means.set_label("mean prediction ± standard error")
    identity.set_label("prediction = human")
    return [points, means, identity]


def _heat_map(axes, matrix: np.ndarray, names: Sequence[str], title: str) -> None:
    """`[A, A]` correlations as colours with their numbers; the numbers make a colour bar needless."""
    axes.imshow(np.ma.masked_invalid(matrix), cmap="RdBu_r", vmin=-1, vmax=1)
    axes.set_facecolor(FAINT)
    for (row, column), value in np.ndenumerate(matrix):
        defined = math.isfinite(value)
        colour = "white" if defined and abs(value) > 0.6 else INK
        axes.text(
            column, row, _decimal(value) if defined else "–", ha="center", va="center", fontsize=9, color=colour
        )  # fmt: skip
    axes.set_title(title, fontsize=11.5, color=INK, loc="left")
    axes.set_xticks(range(len(names)), names, rotation=40, ha="right", rotation_mode="anchor", fontsize=9.5)
    axes.set_yticks(range(len(names)), names, fontsize=9.5)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)


def _anchor_panel(axes, names: Sequence[str], anchor: int, human: np.ndarray, predicted: np.ndarray) -> None:
    """Dots: the correlation of each other attribute with the one at index `anchor`, `[A, A]` matrices."""
    others = [a for a in range(len(names)) if a != anchor]
    places = np.arange(len(others))
    series = [("human ratings here", human[others, anchor], INK, "o"), ("predicted ratings", predicted[others, anchor],
              BLUE, "D")]  # fmt: skip
    if names[anchor] == "helpfulness":
        paper = [PAPER_STATISTICS[names[a]].helpfulness_r if names[a] in PAPER_STATISTICS else np.nan for a in others]
        series.append(("HelpSteer paper, Table 2", np.asarray(paper), ORANGE, "s"))
    for i, (label, values, colour, marker) in enumerate(series):
        # A little apart in height, so that equal values stay visible.
        axes.plot(
            values, places + 0.2 * (i - 1), linestyle="", marker=marker, markersize=6.5, color=colour, label=label
        )
    lowest = np.nanmin([0.0, *(value for _, values, _, _ in series for value in values)])
    _style(axes, f"Correlation with {names[anchor]}")
    axes.axvline(0, color=GREY, linewidth=0.9)
    axes.set_xlim(min(-0.05, lowest - 0.05), 1.02)
    axes.set_ylim(len(others) - 0.4, -0.6)
    axes.set_yticks(places, [names[a] for a in others], fontsize=9.5)
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel("Pearson r", fontsize=10.5)
    axes.legend(loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=3, frameon=False, fontsize=9.5, borderaxespad=0.2)
