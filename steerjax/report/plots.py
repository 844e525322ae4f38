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
from steerjax.report.metrics import attribute_correlations
from steerjax.report.results import LOG_LENGTH, MEAN_RATING, EvaluationResult
from steerjax.schema import Attribute

BLUE, ORANGE, INK, GREY, FAINT = "#0072B2", "#D55E00", "#222222", "#6E6E6E", "#E3E3E3"
DPI = 130
_DASHED = (0, (5, 3))
_BASELINE_COLOURS = {MEAN_RATING: GREY, LOG_LENGTH: ORANGE}


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
        records: the objects of `metrics.jsonl`; of a step that stands twice the later one counts.
        baselines: average MSE by name, drawn as horizontal lines.
        names: attributes to average over in validation records; default: all that a record has.

    Raises:
        SteerjaxError: matplotlib is missing.
    """
    records = list(records)
    train = _by_step((r["step"], r.get("loss")) for r in records if r.get("split") == "train")
    validation = _by_step((r["step"], _validation_error(r, names)) for r in records if r.get("split") == "validation")
    levels = {name: value for name, value in (baselines or {}).items() if value is not None and math.isfinite(value)}
    figure = new_figure(8.4, 4.6)
    axes = figure.add_subplot()
    style(axes, "Training loss and validation error" if len(validation) else "Training loss")
    if len(train):
        window = max(1, len(train) // 12) | 1
        smooth = _running_mean(train[:, 1], window)
        axes.plot(train[:, 0], train[:, 1], color=BLUE, alpha=0.25, linewidth=0.9)
        label = f"training loss (bold: mean of {window})" if window > 1 else "training loss"
        axes.plot(train[:, 0], smooth, color=BLUE, linewidth=2, label=label)
    if len(validation):
        label = f"validation, last {validation[-1, 1]:.3f}"
        axes.plot(*validation.T, color=INK, linewidth=1, marker="o", markersize=5.5, zorder=4, label=label)
    for name, level in levels.items():
        label, colour = f"{name} baseline {level:.3f}", _BASELINE_COLOURS.get(name, GREY)
        axes.axhline(level, color=colour, linewidth=1.3, linestyle=_DASHED, zorder=1, label=label)
    # An untrained head's first errors dwarf the rest, so the axis ends where the later steps do.
    late = np.concatenate([train[len(train) // 5 :, 1], validation[:, 1], list(levels.values())])
    if len(late) and train[:, 1].max(initial=0.0) > 1.5 * late.max():
        axes.set_ylim(top=1.1 * late.max())
        axes.set_title(f"not shown: first steps, up to {train[:, 1].max():.3g}", loc="right", fontsize=9, color=GREY)
    rated = any(key.endswith("/mse") for r in records for key in r)
    axes.set_xlabel("step", fontsize=10.5)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_ylabel("mean squared error (rating²)" if rated or levels else "loss", fontsize=10.5)
    handles = axes.get_legend_handles_labels()[0]
    if handles:
        figure.legend(handles=handles, loc="outside lower center", ncols=2, frameon=False, fontsize=9.5)
    save(figure, path)


def plot_predictions(result: EvaluationResult, path: str | Path) -> None:
    """Predicted against human ratings, one panel an attribute. Raises SteerjaxError if matplotlib is missing."""
    count = len(result.schema)
    columns = min(count, 2 if count in (2, 4) else 3)
    rows = -(-count // columns)
    figure = new_figure(max(3.15 * columns, 8.0), 3.25 * rows + 0.9)
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    for a, (axes, attribute) in enumerate(zip(panels, result.schema.attributes, strict=False)):
        seen = result.mask[:, a] & np.isfinite(result.predicted[:, a])
        predicted = result.predicted[seen, a]
        handles = scatter_with_means(axes, result.ratings[seen, a], predicted, attribute, "response")
        limits = axes.get_xlim()
        handles += axes.plot(limits, limits, color=GREY, linewidth=1, linestyle=_DASHED, label="prediction = human")
        axes.set(yticks=axes.get_xticks(), aspect="equal")
        axes.set(xlim=limits, ylim=limits)  # after the ticks, which would widen them
        if beyond := int(np.sum((predicted < limits[0]) | (predicted > limits[1]))):
            axes.text(0.03, 0.96, f"{beyond} beyond the axes", transform=axes.transAxes, fontsize=8.5, color=GREY)
        r = result.metrics[attribute.name]["pearson"]
        style(axes, f"{attribute.name}  (r = {'undefined' if r is None else format(r, '.2f')})")
        if a % columns == 0:
            axes.set_ylabel("predicted rating", fontsize=10.5)
        if a + columns >= count:
            axes.set_xlabel("human rating", fontsize=10.5)
    for axes in panels[count:]:
        axes.set_visible(False)
    figure.suptitle("Predicted against human ratings, validation split", fontsize=12.5, color=INK)
    figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False, fontsize=9.5)
    save(figure, path)


def plot_correlations(result: EvaluationResult, path: str | Path) -> None:
    """How attributes go together in human and in predicted ratings. Raises SteerjaxError if matplotlib is missing."""
    side = 1.9 + 0.52 * len(result.schema)
    figure = new_figure(max(2 * side + 0.6, 8.0), side + 0.6)
    left, right = figure.subplots(1, 2)
    _heat_map(left, attribute_correlations(result.ratings, result.mask), result.schema.names, "Human ratings")
    predicted = attribute_correlations(result.predicted, result.mask & np.isfinite(result.predicted))
    _heat_map(right, predicted, result.schema.names, "Predicted ratings")
    figure.suptitle("Which attributes go together: Pearson r on the validation split", fontsize=12.5, color=INK)
    save(figure, path)


def new_figure(width: float, height: float):
    """An empty figure, inches. Raises SteerjaxError if matplotlib is missing."""
    require_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained", facecolor="white")
    figure.get_layout_engine().set(w_pad=0.1, h_pad=0.1)
    FigureCanvasAgg(figure)
    return figure


def save(figure, path: str | Path) -> None:
    figure.savefig(path, format="png", dpi=DPI)


def style(axes, title: str) -> None:
    axes.set_title(title, fontsize=min(11.5, 380 / len(title)), color=INK, loc="left")
    axes.tick_params(labelsize=9.5, colors=INK, length=3)
    axes.grid(color=FAINT, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(GREY)


def scatter_with_means(axes, x: np.ndarray, y: np.ndarray, attribute: Attribute, what: str) -> list:
    """Points `[n]`, each a `what`, over ratings `x`, and their means; returns the legend's handles.

    A mean is of equal ratings where those are whole numbers and few, else of a tenth of the range.
    """
    low, span = attribute.low, attribute.high - attribute.low
    # The golden ratio's multiples are spread evenly and are the same in every run.
    sideways = (np.arange(len(x)) * 0.6180339887 % 1.0 - 0.5) * 0.09 * span
    alpha = min(0.5, max(0.12, 40 / max(len(x), 1)))
    label = f"one {what} (spread sideways)"
    points = axes.scatter(x + sideways, y, s=13, color=BLUE, linewidths=0, alpha=alpha, label=label)
    whole = len(attribute.labels) <= 12 and (x == np.round(x)).all()
    bins = x if whole else np.floor(10 * (x - low) / span)
    groups = [np.flatnonzero(bins == value) for value in np.unique(bins)]
    errors = [y[g].std(ddof=1) / math.sqrt(len(g)) if len(g) > 1 else 0.0 for g in groups]
    means = axes.errorbar(
        [x[g].mean() for g in groups], [y[g].mean() for g in groups], yerr=errors, color=ORANGE, fmt="o-",
        markersize=5.5, linewidth=1.4, elinewidth=1.4, capsize=3, zorder=4, label="mean ± standard error",
    )  # fmt: skip
    axes.set_xlim(low - 0.075 * span, attribute.high + 0.075 * span)
    if 3 <= len(attribute.labels) <= 10:
        axes.set_xticks(attribute.labels)
    return [points, means]


def _by_step(pairs: Iterable[tuple[int, float | None]]) -> np.ndarray:
    """`[n, 2]` of step and finite value, sorted by step, the last value of a step."""
    latest = {step: value for step, value in pairs if value is not None and math.isfinite(value)}
    return np.asarray(sorted(latest.items()), dtype=np.float64).reshape(-1, 2)


def _validation_error(record: Mapping, names: Sequence[str] | None) -> float | None:
    """Mean MSE over the attributes of an evaluation record, or its loss where it has none (language models)."""
    keys = [key for key in record if key.startswith("attributes/") and key.endswith("/mse")]
    if names is not None:
        keys = [f"attributes/{name}/mse" for name in names]
    values = [record[key] for key in keys if record.get(key) is not None]
    return float(np.mean(values)) if values else record.get("loss")


def _running_mean(values: np.ndarray, window: int) -> np.ndarray:
    """Centred mean of `window` (odd, at most n) values; at either end, of those of them that there are."""
    ones = np.ones(window)
    return np.convolve(values, ones, "same") / np.convolve(np.ones_like(values), ones, "same")


def _heat_map(axes, matrix: np.ndarray, names: Sequence[str], title: str) -> None:
    """`[A, A]` correlations as colours with their numbers; the numbers make a colour bar needless."""
    axes.imshow(np.ma.masked_invalid(matrix), cmap="RdBu_r", vmin=-1, vmax=1)
    axes.set_facecolor(FAINT)
    for (row, column), value in np.ndenumerate(matrix):
        text, colour = (f"{value:.2f}", "white" if abs(value) > 0.6 else INK) if math.isfinite(value) else ("–", INK)
        axes.text(column, row, text, ha="center", va="center", fontsize=9, color=colour)
    axes.set_title(title, fontsize=11.5, color=INK, loc="left")
    axes.set_xticks(range(len(names)), names, rotation=40, ha="right", rotation_mode="anchor", fontsize=9.5)
    axes.set_yticks(range(len(names)), names, fontsize=9.5)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
