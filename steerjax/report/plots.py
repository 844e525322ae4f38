"""The report's plots, as PNG files, in the colours of Okabe and Ito, which colour-blind readers can tell apart.

matplotlib is optional: each function raises SteerjaxError where it is missing. pyplot, the caller's, is left alone.
"""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from steerjax.errors import SteerjaxError
from steerjax.files import whole_file
from steerjax.report.results import EvaluationResult, attribute_correlations, whole
from steerjax.schema import Attribute

BLUE, ORANGE, INK, GREY, FAINT = "#0072B2", "#D55E00", "#222222", "#6E6E6E", "#E3E3E3"
COLOURS = (BLUE, ORANGE, "#009E73", "#CC79A7", "#56B4E9", "#E69F00", INK)  # of models side by side
_STYLE = {
    "font.size": 9.5, "axes.titlesize": 11.5, "axes.titlelocation": "left", "axes.labelsize": 10.5,
    "figure.titlesize": 12.5, "figure.facecolor": "white", "axes.edgecolor": GREY, "axes.grid": True,
    "axes.axisbelow": True, "grid.color": FAINT, "axes.spines.top": False, "axes.spines.right": False,
    "legend.frameon": False, "savefig.dpi": 130, "figure.constrained_layout.h_pad": 0.08,
}  # fmt: skip


def require_plots() -> None:
    """For the start of a long run that ends in a report: what the extra `plots` installs is there."""
    try:
        import markdown_it  # noqa: F401
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise SteerjaxError(
            f"reports need matplotlib and markdown-it-py ({error})\n  cure: pip install 'steerjax[plots]'"
        ) from error


@contextmanager
def new_figure(path: str | Path, width: float, height: float, title: str | None = None) -> Iterator:
    """A figure of these inches to draw on, then saved."""
    require_plots()
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context(_STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        figure.suptitle(title)
        yield figure
        with whole_file(path, "wb") as file:
            figure.savefig(file, format="png")


def plot_losses(losses: Mapping[str, np.ndarray], path: str | Path, unit: str) -> None:
    """An objective's loss against the step, from `records.own_losses`; `unit` is what it is measured in."""
    train, validation = losses["train"], losses["validation"]
    with new_figure(path, 8.4, 4.8) as figure:
        axes = figure.subplots()
        axes.set(title="Loss against the step", xlabel="step", ylabel=f"loss ({unit})")
        axes.xaxis.get_major_locator().set_params(integer=True)
        if len(train):
            window = np.ones(max(1, len(train) // 12) | 1)
            smooth = np.convolve(train[:, 1], window, "same") / np.convolve(np.ones(len(train)), window, "same")
            axes.plot(*train.T, color=BLUE, alpha=0.25, linewidth=0.9)
            of = f", mean of {len(window)} steps" if len(window) > 1 else ""
            axes.plot(train[:, 0], smooth, color=BLUE, linewidth=2, label=f"training{of}")
        if len(validation):
            axes.plot(*validation.T, color=INK, marker="o", label=f"validation, last {validation[-1, 1]:.3f}")
        if len(train) or len(validation):
            figure.legend(loc="outside lower center", ncols=2)


def plot_calibration(predicted, observed, counts, path: str | Path) -> None:
    """How often a response is preferred against the predicted probability of it, a point a bin."""
    with new_figure(path, 5.4, 5.0) as figure:
        axes = figure.subplots()
        axes.set(title="Calibration", xlabel="predicted probability", ylabel="share that is preferred")
        axes.plot([0, 1], [0, 1], "--", color=GREY, linewidth=1, label="calibrated")
        axes.plot(predicted, observed, "o-", color=BLUE, linewidth=1.5, label="a bin, larger with more pairs")
        axes.scatter(predicted, observed, s=20 + 200 * counts / counts.max(), color=BLUE)
        figure.legend(loc="outside lower center", ncols=2)


def plot_predictions(result: EvaluationResult, path: str | Path) -> None:
    """Predicted against human ratings, one panel an attribute."""
    count, columns = len(result.schema), min(len(result.schema), 3)
    rows = -(-count // columns)
    title = "Predicted against human ratings"
    with new_figure(path, max(3.15 * columns, 8.0), 3.25 * rows + 0.9, title) as figure:
        panels = figure.subplots(rows, columns, squeeze=False).ravel()
        for a, (axes, attribute) in enumerate(zip(panels, result.schema.attributes, strict=False)):
            human, predicted = result.ratings[:, a], result.predicted[:, a]
            seen = np.isfinite(human) & np.isfinite(predicted)
            scatter_with_means(axes, human[seen], predicted[seen], attribute, "response", "prediction = human")
            axes.set(xlabel="human rating", ylabel="predicted rating")
            r = result.metrics[attribute.name]["pearson"]
            apart = "  " if len(attribute.name) < 24 else "\n"
            panel_title(axes, f"{attribute.name}{apart}(r = {'undefined' if r is None else format(r, '.2f')})")
        for axes in panels[count:]:
            axes.set_visible(False)
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)


def plot_confusion(result: EvaluationResult, path: str | Path) -> None:
    """How often a human rating gets each whole prediction, shares of a human rating's row; a panel an attribute."""
    attributes = result.schema.attributes
    columns = min(len(attributes), 3)
    rows = -(-len(attributes) // columns)
    title = "Whole ratings: of each human rating, what is predicted"
    with new_figure(path, max(3.15 * columns, 8.0), 3.2 * rows + 0.6, title) as figure:
        panels = figure.subplots(rows, columns, squeeze=False).ravel()
        for a, (axes, attribute) in enumerate(zip(panels, attributes, strict=False)):
            human, predicted = (whole(values[:, a], attribute) for values in (result.ratings, result.predicted))
            seen = np.isfinite(human)
            if not seen.any():
                axes.set_visible(False)
                continue
            levels = np.unique(np.concatenate([attribute.labels, human[seen], predicted[seen]]))
            counts = np.array([[np.sum((human == h) & (predicted == p)) for p in levels] for h in levels])
            shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
            axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
            if len(levels) <= 10:
                for (i, j), count in np.ndenumerate(counts):
                    colour = "white" if shares[i, j] > 0.6 else INK
                    axes.text(j, i, str(count), ha="center", va="center", color=colour, fontsize=8.5)
            step = next(step for step in (1, 2, 5, 10, 20, 25, 50, len(levels)) if len(levels) <= 10 * step)
            ticks = range(0, len(levels), step)
            axes.set_xticks(ticks, [f"{levels[i]:g}" for i in ticks])
            axes.set_yticks(ticks, [f"{levels[i]:g}" for i in ticks])
            axes.set(xlabel="predicted rating", ylabel="human rating")
            panel_title(axes, attribute.name)
            axes.grid(visible=False)
        for axes in panels[len(attributes) :]:
            axes.set_visible(False)


def plot_correlations(result: EvaluationResult, path: str | Path) -> None:
    """How attributes go together in human and in predicted ratings."""
    names, side = result.schema.names, 1.9 + 0.52 * len(result.schema)
    rated = np.where(np.isfinite(result.ratings), result.predicted, np.nan)
    title = "Which attributes go together: Pearson r"
    headings = {"Human ratings": result.ratings, "Predicted ratings": rated}
    with new_figure(path, max(2 * side + 0.6, 8.0), side + 0.6, title) as figure:
        for axes, (heading, ratings) in zip(figure.subplots(1, 2), headings.items(), strict=True):
            matrix = attribute_correlations(ratings)
            axes.imshow(matrix, cmap="RdBu_r", vmin=-1, vmax=1)
            for (row, column), value in np.ndenumerate(matrix):
                text, colour = f"{value:.2f}" if math.isfinite(value) else "–", "white" if abs(value) > 0.6 else INK
                axes.text(column, row, text, ha="center", va="center", color=colour)
            axes.set_title(heading)
            axes.set_xticks(range(len(names)), names, rotation=40, ha="right", rotation_mode="anchor")
            axes.set_yticks(range(len(names)), names)
            axes.grid(visible=False)


def panel_title(axes, words: str) -> None:
    """Over a panel some 3 inches wide, small enough that it does not reach the next one."""
    axes.set_title(words, fontsize=min(11.5, 330 / max(map(len, words.splitlines()))))


def scatter_with_means(axes, x: np.ndarray, y: np.ndarray, attribute: Attribute, what: str, equal: str) -> None:
    """Points `[n]`, each a `what`, over ratings `x`, and their means, one a rating or of a twelfth of the range.

    Both axes are the attribute's range, and the line of equality has the label `equal`.
    """
    low, span = attribute.low, attribute.high - attribute.low
    # The golden ratio's multiples are spread evenly and are the same in every run.
    sideways = (np.arange(len(x)) * 0.6180339887 % 1.0 - 0.5) * 0.09 * span
    axes.scatter(x + sideways, y, s=13, color=BLUE, linewidths=0, alpha=0.3, label=f"one {what} (spread sideways)")
    bins = np.round(x * min(1, 12 / span))
    groups = [(x[bins == value], y[bins == value]) for value in np.unique(bins)]
    axes.errorbar(
        [g.mean() for g, _ in groups], [h.mean() for _, h in groups],
        yerr=[h.std(ddof=1) / math.sqrt(len(h)) if len(h) > 1 else 0.0 for _, h in groups],
        color=ORANGE, fmt="o-", markersize=5.5, capsize=3, zorder=4, label="mean ± standard error",
    )  # fmt: skip
    limits = low - 0.075 * span, attribute.high + 0.075 * span
    axes.plot(limits, limits, color=GREY, linewidth=1, linestyle="--", label=equal)
    axes.set_xlim(limits)
    if 3 <= len(attribute.labels) <= 10:
        axes.set_xticks(attribute.labels)
    axes.set(yticks=axes.get_xticks(), aspect="equal")
    axes.set(xlim=limits, ylim=limits)  # after the ticks, which would widen them
    if beyond := int(np.sum((y < limits[0]) | (y > limits[1]))):
        back = {"facecolor": "white", "alpha": 0.85, "linewidth": 0, "pad": 1.5}
        axes.text(0.03, 0.94, f"{beyond} beyond the axes", transform=axes.transAxes, color=GREY, bbox=back, zorder=5)


def plot_compared(found: Mapping[str, Mapping], path: str | Path) -> None:
    """Figures (`report.figures.Figure`) of several models, by model and figure: values with their intervals."""
    values = {key: [each[key].value for each in found.values()] for key in next(iter(found.values()))}
    names = [key for key, each in values.items() if None not in each and max(each) - min(each) > 1e-9]
    # Figures of one kind share an axis: what stands behind the last slash names it.
    kinds = {kind: [key for key in names if key.split("/")[-1] == kind] for kind in (n.split("/")[-1] for n in names)}
    longest = max((len(key.rpartition("/")[0]) for key in names), default=0)
    panel = 2.1 + 0.075 * longest  # inches
    columns = min(len(kinds), max(1, int(14 / panel)))
    rows = -(-len(kinds) // max(columns, 1))
    tallest = max((len(keys) for keys in kinds.values()), default=1)
    with new_figure(
        path, max(panel * columns, 6.0), max(rows, 1) * (0.9 + 0.19 * tallest * len(found)) + 0.5
    ) as figure:
        panels = figure.subplots(max(rows, 1), max(columns, 1), squeeze=False).ravel()
        for axes, (kind, keys) in zip(panels, kinds.items(), strict=False):
            for m, (name, each) in enumerate(found.items()):
                places = np.arange(len(keys)) + (m - (len(found) - 1) / 2) * 0.7 / len(found)
                values = [each[key].value for key in keys]
                spans = [each[key].interval or (value, value) for key, value in zip(keys, values, strict=True)]
                sides = np.abs(np.array(spans).T - values)
                colour = COLOURS[m % len(COLOURS)]
                axes.errorbar(values, places, xerr=sides, fmt="o", markersize=4, color=colour, label=name)
            axes.set_yticks(range(len(keys)), [key.removesuffix(f"/{kind}") for key in keys], fontsize=8)
            axes.set_ylim(len(keys) - 0.5, -0.5)
            axes.set_title(kind)
        for axes in panels[len(kinds) :]:
            axes.set_visible(False)
        if len(kinds):
            figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=min(len(found), 4))
