"""The report of an evaluation: a table for the terminal, and a folder with `report.md`, plots and predictions."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from steerjax.report.metrics import mean_metric
from steerjax.report.plots import plot_correlations, plot_losses, plot_predictions, require_matplotlib
from steerjax.report.results import (
    LOG_LENGTH,
    MEAN_RATING,
    MODEL,
    EvaluationResult,
    average_mse,
    compared_names,
    evaluate_predictions,
    lowest,
)

__all__ = [
    "EvaluationResult",
    "comparison_sentences",
    "evaluate_predictions",
    "format_table",
    "plot_correlations",
    "plot_losses",
    "plot_predictions",
    "require_matplotlib",
    "write_report",
]

_HEADER = (
    *("attribute", "ratings", "MSE", "MAE", "Pearson", "Spearman"),
    *(f"MSE {MEAN_RATING}", f"MSE {LOG_LENGTH}", "lowest MSE"),
)
_BASELINE_WORDS = {MEAN_RATING: "mean-rating baseline", LOG_LENGTH: "length baseline"}


def format_table(result: EvaluationResult) -> str:
    """The metrics as plain text, a row an attribute and one for the average, then the comparison in words."""
    rows = [list(_HEADER), *_table_rows(result)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(_HEADER))]
    lines = ["  ".join(_pad(cell, width, i) for i, (cell, width) in enumerate(zip(row, widths, strict=True))).rstrip()
             for row in rows]  # fmt: skip
    rule = "-" * max(map(len, lines))
    return "\n".join([lines[0], rule, *lines[1:-1], rule, lines[-1], "", *comparison_sentences(result)])


def comparison_sentences(result: EvaluationResult) -> list[str]:
    """One sentence a baseline: does the model beat it on average MSE; and one if attributes had to be left out."""
    averages = average_mse(result)
    sentences = [_compare(averages[MODEL], averages[name], words) for name, words in _BASELINE_WORDS.items()]
    left_out = [name for name in result.names if name not in compared_names(result)]
    if left_out:
        sentences.append(
            f"Averages leave out {', '.join(left_out)}: no rating in the validation split or no baseline for want of "
            "ratings in the training split."
        )
    return sentences


def write_report(
    directory: str | Path,
    result: EvaluationResult,
    records: Iterable[Mapping],
    summary: Mapping[str, str],
    config_text: str,
) -> None:
    """Writes `report.md`, `loss.png`, `predictions.png`, `correlations.png` and `predictions.jsonl`.

    Args:
        directory: created if missing; files of an earlier report are replaced.
        records: the objects of `metrics.jsonl`; empty for a model that was not trained here: no `loss.png` then.
        summary: facts of the run for the table at the top.
        config_text: the resolved config.

    Raises:
        SteerjaxError: matplotlib is missing. Nothing is written then.
    """
    require_matplotlib()
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    _write_predictions(directory / "predictions.jsonl", result)
    baselines = {name: value for name, value in average_mse(result).items() if name != MODEL}
    records = list(records)
    if records:
        plot_losses(records, directory / "loss.png", baselines, compared_names(result))
    plot_predictions(result, directory / "predictions.png")
    plot_correlations(result, directory / "correlations.png")
    (directory / "report.md").write_text(
        _markdown(result, summary, config_text, with_losses=bool(records)), encoding="utf-8"
    )


def _pad(cell: str, width: int, column: int) -> str:
    return cell.ljust(width) if column in (0, len(_HEADER) - 1) else cell.rjust(width)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _table_rows(result: EvaluationResult) -> list[list[str]]:
    """Cells under `_HEADER`: a row an attribute, then the average."""
    rows = []
    for name in result.names:
        entry = result.metrics[name]
        errors = {MODEL: entry["mse"], **{who: metrics[name]["mse"] for who, metrics in result.baselines.items()}}
        rows.append(_row(name, str(entry["count"]), errors, [entry[key] for key in ("mae", "pearson", "spearman")]))
    names = compared_names(result)
    means = [mean_metric(result.metrics, key, names) for key in ("mae", "pearson", "spearman")]
    count = sum(int(result.metrics[name]["count"] or 0) for name in names)
    return [*rows, _row("average", str(count), average_mse(result), means)]


def _row(name: str, count: str, errors: Mapping[str, float | None], others: list[float | None]) -> list[str]:
    best = " = ".join(lowest(errors)) or "-"
    numbers = [errors[MODEL], *others, errors[MEAN_RATING], errors[LOG_LENGTH]]
    return [name, count, *map(_number, numbers), best]


def _compare(model: float | None, baseline: float | None, words: str) -> str:
    if model is None or baseline is None:
        return f"No comparison with the {words}: no attribute has ratings in both the training and validation split."
    if not math.isfinite(model):
        return f"No comparison with the {words}: some of the model's predictions are NaN or infinite."
    numbers = f"{model:.3f} to {baseline:.3f}"
    if round(model, 3) == round(baseline, 3):
        return f"The model is level with the {words} on average MSE ({numbers})."
    verb = "beats" if model < baseline else "loses to"
    change = "" if baseline == 0 else f", {abs(model / baseline - 1):.1%} {'lower' if model < baseline else 'higher'}"
    return f"The model {verb} the {words} on average MSE ({numbers}{change})."


def _write_predictions(path: Path, result: EvaluationResult) -> None:
    """One JSON object an example; a missing human rating is left out, a prediction that is not finite is null."""
    with path.open("w", encoding="utf-8") as file:
        for i, example in enumerate(result.ids):
            ratings = {name: float(result.ratings[i, a]) for a, name in enumerate(result.names) if result.mask[i, a]}
            predicted = [float(value) if math.isfinite(value) else None for value in result.predicted[i]]
            record = {
                "id": example,
                "ratings": ratings,
                "predicted_ratings": dict(zip(result.names, predicted, strict=True)),
            }
            file.write(json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n")


def _markdown(result: EvaluationResult, summary: Mapping[str, str], config_text: str, with_losses: bool) -> str:
    alignment = ["---" if i in (0, len(_HEADER) - 1) else "---:" for i in range(len(_HEADER))]
    # A fence longer than any in the config, so that the config cannot end it.
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", config_text)), default=0))
    parts = [
        "# Evaluation of predicted ratings",
        _markdown_table([["run", ""], ["---", "---"], *([key, str(value)] for key, value in summary.items())])
        if summary else "",
        "## Metrics on the validation split",
        _markdown_table([list(_HEADER), alignment, *_table_rows(result)]),
        "MSE, MAE, Pearson and Spearman are the model's; the last columns compare its MSE with the baselines'.",
        "\n".join(f"- {sentence}" for sentence in comparison_sentences(result)),
        "## What this means",
        _meaning(result),
        "## Plots",
        "![Training loss and validation error against the step](loss.png)" if with_losses else "",
        "![Predicted against human ratings, a panel an attribute](predictions.png)",
        "![Correlations between attributes, human and predicted](correlations.png)",
        "Every validation example with its human and predicted ratings: [predictions.jsonl](predictions.jsonl).",
        f"<details>\n<summary>Config</summary>\n\n{fence}\n{config_text.rstrip()}\n{fence}\n\n</details>",
    ]  # fmt: skip
    return "\n\n".join(part for part in parts if part) + "\n"


def _markdown_table(rows: list[list[str]]) -> str:
    escaped = ([re.sub(r"\s+", " ", cell).replace("|", "\\|") for cell in row] for row in rows)
    return "\n".join("| " + " | ".join(row) + " |" for row in escaped)


def _meaning(result: EvaluationResult) -> str:
    """A few plain sentences for a reader who has not met these metrics."""
    model = average_mse(result)[MODEL]
    sentences = [
        "MSE is the mean of (predicted - human)², in rating², so lower is better; MAE is in ratings. The mean-rating "
        "baseline always answers an attribute's mean in the training split; the length baseline sees nothing but the "
        "response's length. A model that does not beat the length baseline has not been shown to read more than length."
    ]
    if model is not None and math.isfinite(model):
        sentences.append(f"The root of the model's average MSE, a typical miss, is {math.sqrt(model):.2f} ratings.")
    ahead = [name for name in result.names if _beats_both(result, name)]
    sentences.append(f"It has the lowest MSE of the three on {', '.join(ahead) if ahead else 'no attribute'}.")
    sentences.append(
        "Pearson and Spearman (-1 to 1) say how well responses are ordered, whatever the scale; a baseline that never "
        "varies has none."
    )
    if len(result.ids) < 500:
        sentences.append(
            f"The split has {len(result.ids)} responses: differences of a few percent in MSE may be chance."
        )
    return " ".join(sentences)


def _beats_both(result: EvaluationResult, name: str) -> bool:
    errors = {who: metrics[name]["mse"] for who, metrics in result.baselines.items()}
    return lowest({MODEL: result.metrics[name]["mse"], **errors}) == (MODEL,)
