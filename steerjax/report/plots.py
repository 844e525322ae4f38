"""The report's plots, as PNG files, in the colours of Okabe and Ito, which colour-blind readers can tell apart.

matplotlib is optional and imported only when a plot is drawn, and never pyplot, so a caller's state is left alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from steerjax.errors import SteerjaxError
from steerjax.report.results import LOG_LENGTH, EvaluationResult, attribute_correlations
from steerjax.schema import Attribute

BLUE, ORANGE, INK, GREY, FAINT = "#0072B2", "#D55E00", "#222222", "#6E6E6E", "#E3E3E3"
_DASHED = (0, (5, 3))
_STYLE = {
    "font.size": 9.5, "axes.titlesize": 11.5, "axes.titlelocation": "left", "axes.labelsize": 10.5,
    "figure.titlesize": 12.5, "figure.facecolor": "white", "axes.edgecolor": GREY, "axes.grid": True,
    "axes.axisbelow": True, "grid.color": FAINT, "axes.spines.top": False, "axes.spines.right": False,
    "legend.frameon": False, "savefig.dpi": 130,
}  # fmt: skip


def require_matplotlib() -> None:
    """Call before a long run that ends in plots. Raises SteerjaxError with the cure if matplotlib is missing."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise SteerjaxError(f"plots need matplotlib ({error})\n  cure: pip install 'steerjax[plots]'") from error


@contextmanager
def new_figure(path: str | Path, width: float, height: float, title: str | None = None) -> Iterator:
    """A figure of these inches to draw on, then saved. Raises SteerjaxError if matplotlib is missing."""
    require_matplotlib()
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context(_STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        figure.suptitle(title)
        yield figure
        figure.savefig(path, format="png")


def plot_losses(
    records: Iterable[Mapping],
    path: str | Path,
    baselines: Mapping[str, float | None] | None = None,
    names: Sequence[str] | None = None,
) -> None:
    """Training loss and validation error against the step.

    Args:
        records: the objects of `metrics.jsonl`.
        baselines: average MSE by name, drawn as horizontal lines.
        names: attributes to average over in validation records; default: all that a record has.

    Raises:
        SteerjaxError: matplotlib is missing.
    """
    records = list(records)
    train = _by_step((r["step"], r.get("loss")) for r in records if r.get("split") == "train")
    validation = _by_step((r["step"], _validation_error(r, names)) for r in records if r.get("split") == "validation")
    levels = {name: value for name, value in (baselines or {}).items() if value is not None and math.isfinite(value)}
    with new_figure(path, 8.4, 4.6, "Training loss and validation error" if len(validation) else "Training loss") as f:
        axes = f.add_subplot()
        if len(train):
            window = np.ones(max(1, len(train) // 12) | 1)
            smooth = np.convolve(train[:, 1], window, "same") / np.convolve(np.ones(len(train)), window, "same")
            axes.plot(*train.T, color=BLUE, alpha=0.25, linewidth=0.9)
            label = f"training loss (bold: mean of {len(window)})" if len(window) > 1 else "training loss"
            axes.plot(train[:, 0], smooth, color=BLUE, linewidth=2, label=label)
        if len(validation):
            label = f"validation, last {validation[-1, 1]:.3f}"
            axes.plot(*validation.T, color=INK, linewidth=1, marker="o", markersize=5.5, label=label)
        for name, level in levels.items():
            colour = ORANGE if name == LOG_LENGTH else GREY
            axes.axhline(level, color=colour, linestyle=_DASHED, zorder=1, label=f"{name} baseline {level:.3f}")
        rated = any(key.endswith("/mse") for r in records for key in r)
        axes.set(xlabel="step", ylabel="mean squared error (rating²)" if rated or levels else "loss")
        axes.xaxis.get_major_locator().set_params(integer=True)
        if len(train) or len(validation) or levels:
            f.legend(loc="outside lower center", ncols=2)


def plot_predictions(result: EvaluationResult, path: str | Path) -> None:
    """Predicted against human ratings, one panel an attribute. Raises SteerjaxError if matplotlib is missing."""
    count = len(result.schema)
    columns = min(count, 2 if count in (2, 4) else 3)
    rows = -(-count // columns)
    title = "Predicted against human ratings, validation split"
    with new_figure(path, max(3.15 * columns, 8.0), 3.25 * rows + 0.9, title) as figure:
        panels = figure.subplots(rows, columns, squeeze=False).ravel()
        for a, (axes, attribute) in enumerate(zip(panels, result.schema.attributes, strict=False)):
            human, predicted = result.ratings[:, a], result.predicted[:, a]
            seen = np.isfinite(human) & np.isfinite(predicted)
            scatter_with_means(axes, human[seen], predicted[seen], attribute, "response")
            limits = axes.get_xlim()
            axes.plot(limits, limits, color=GREY, linewidth=1, linestyle=_DASHED, label="prediction = human")
            axes.set(yticks=axes.get_xticks(), aspect="equal", xlabel="human rating", ylabel="predicted rating")
            axes.set(xlim=limits, ylim=limits)  # after the ticks, which would widen them
            if beyond := int(np.sum((predicted[seen] < limits[0]) | (predicted[seen] > limits[1]))):
                axes.text(0.03, 0.94, f"{beyond} beyond the axes", transform=axes.transAxes, color=GREY)
            r = result.metrics[attribute.name]["pearson"]
            heading = f"{attribute.name}  (r = {'undefined' if r is None else format(r, '.2f')})"
            axes.set_title(heading, fontsize=min(11.5, 380 / len(heading)))
        for axes in panels[count:]:
            axes.set_visible(False)
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)


def plot_correlations(result: EvaluationResult, path: str | Path) -> None:
    """How attributes go together in human and in predicted ratings. Raises SteerjaxError if matplotlib is missing."""
    names, side = result.schema.names, 1.9 + 0.52 * len(result.schema)
    rated = np.where(np.isfinite(result.ratings), result.predicted, np.nan)
    title = "Which attributes go together: Pearson r on the validation split"
    with new_figure(path, max(2 * side + 0.6, 8.0), side + 0.6, title) as figure:
        panels = zip(
            figure.subplots(1, 2), ("Human ratings", "Predicted ratings"), (result.ratings, rated), strict=True
        )
        for axes, heading, ratings in panels:
            matrix = attribute_correlations(ratings)
            axes.imshow(matrix, cmap="RdBu_r", vmin=-1, vmax=1)
            for (row, column), value in np.ndenumerate(matrix):
                text, colour = f"{value:.2f}" if math.isfinite(value) else "–", "white" if abs(value) > 0.6 else INK
                axes.text(column, row, text, ha="center", va="center", color=colour)
            axes.set_title(heading)
            axes.set_xticks(range(len(names)), names, rotation=40, ha="right", rotation_mode="anchor")
            axes.set_yticks(range(len(names)), names)
            axes.grid(visible=False)


def scatter_with_means(axes, x: np.ndarray, y: np.ndarray, attribute: Attribute, what: str) -> None:
    """Points `[n]`, each a `what`, over ratings `x`, and their means.

    A mean is of equal ratings where those are whole numbers and few, else of a tenth of the range.
    """
    low, span = attribute.low, attribute.high - attribute.low
    # The golden ratio's multiples are spread evenly and are the same in every run.
    sideways = (np.arange(len(x)) * 0.6180339887 % 1.0 - 0.5) * 0.09 * span
    alpha = min(0.5, max(0.12, 40 / max(len(x), 1)))
    axes.scatter(x + sideways, y, s=13, color=BLUE, linewidths=0, alpha=alpha, label=f"one {what} (spread sideways)")
    whole = len(attribute.labels) <= 12 and (x == np.round(x)).all()
    bins = x if whole else np.floor(10 * (x - low) / span)
    groups = [(x[bins == value], y[bins == value]) for value in np.unique(bins)]
    axes.errorbar(
        [g.mean() for g, _ in groups], [h.mean() for _, h in groups],
        yerr=[h.std(ddof=1) / math.sqrt(len(h)) if len(h) > 1 else 0.0 for _, h in groups],
        color=ORANGE, fmt="o-", markersize=5.5, capsize=3, zorder=4, label="mean ± standard error",
    )  # fmt: skip
    axes.set_xlim(low - 0.075 * span, attribute.high + 0.075 * span)
    if 3 <= len(attribute.labels) <= 10:
        axes.set_xticks(attribute.labels)


def _by_step(pairs: Iterable[tuple[int, float | None]]) -> np.ndarray:
    """`[n, 2]` of step and finite value, sorted by step, the last value of a step."""
    latest = {step: value for step, value in pairs if value is not None and math.isfinite(value)}
    return np.asarray(sorted(latest.items()), np.float64).reshape(-1, 2)


def _validation_error(record: Mapping, names: Sequence[str] | None) -> float | None:
    """Mean MSE over the attributes of an evaluation record, or its loss where it has none (language models)."""
    found = {key.split("/")[1]: value for key, value in record.items() if key.endswith("/mse") and value is not None}
    values = [value for name, value in found.items() if names is None or name in names]
    return float(np.mean(values)) if values else record.get("loss")
