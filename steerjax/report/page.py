"""The report of predicted ratings: a table for the terminal, and a folder with `report.md`, plots and predictions."""

from __future__ import annotations

import json
import math
import re
import textwrap
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path

from steerjax.report.metrics import mean_metric
from steerjax.report.plots import plot_correlations, plot_losses, plot_predictions, require_matplotlib
from steerjax.report.results import LOG_LENGTH, MEAN_RATING, MODEL, EvaluationResult, lowest

FEW_RESPONSES = 500  # below it a report says first what so few can show

_HEADER = (
    *("attribute", "ratings", "MSE", "MAE", "Pearson", "Spearman"),
    *(f"MSE {MEAN_RATING}", f"MSE {LOG_LENGTH}", "lowest MSE"),
)
_BASELINE_WORDS = {MEAN_RATING: "mean-rating baseline", LOG_LENGTH: "length baseline"}
_EXPLANATION = (
    "MSE, MAE, Pearson and Spearman are the model's. MSE is the mean of (predicted - human)², in rating², so lower is "
    "better; MAE is in ratings; Pearson and Spearman (-1 to 1) say how well responses are ordered, whatever the scale. "
    "The mean-rating baseline always answers an attribute's mean in the training split; the length baseline sees "
    "nothing but the response's length: a model that does not beat it has not been shown to read more than length."
)


def format_table(result: EvaluationResult) -> str:
    """The metrics as plain text, a row an attribute and one for the average, then the comparison in words."""
    note = few_rows_note(result)
    first = [textwrap.fill(note, 100), ""] if note else []
    return "\n".join([*first, *_table(result), "", *comparison_sentences(result)])


def text_table(rows: Sequence[Sequence[str]], left: Collection[int]) -> list[str]:
    """A line of text a row, columns lined up: those of indices `left` at their left, the others at their right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    padded = (
        [cell.ljust(w) if i in left else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))]
        for row in rows
    )
    return ["  ".join(row).rstrip() for row in padded]


def few_rows_note(result: EvaluationResult) -> str:
    """What a split of few responses can and cannot show; "" for `FEW_RESPONSES` or more."""
    count = len(result.ids)
    if count >= FEW_RESPONSES:
        return ""
    return (
        f"Only {count} responses were evaluated. They can show that the model has learnt something and beats the "
        "baselines clearly. They cannot show small differences, nor which of two similar recipes is better: a "
        f"correlation is known to about ±{min(1.0, 2 / math.sqrt(max(count, 1))):.2f}, and a few percent of MSE may be "
        "chance."
    )


def comparison_sentences(result: EvaluationResult) -> list[str]:
    """One sentence a baseline: does the model beat it on average MSE; and what the average leaves out or mixes."""
    averages = result.average_mse()
    sentences = [_compare(averages[MODEL], averages[name], words) for name, words in _BASELINE_WORDS.items()]
    left_out = [name for name in result.schema.names if name not in result.compared]
    if left_out:
        sentences.append(
            f"Averages leave out {', '.join(left_out)}: no rating in the validation split or no baseline for want of "
            "ratings in the training split."
        )
    if len({(result.schema[name].high - result.schema[name].low) for name in result.compared}) > 1:
        sentences.append("Ranges differ, and the average MSE is mostly that of the attributes with the widest.")
    return sentences


def write_report(
    directory: str | Path,
    result: EvaluationResult,
    records: Iterable[Mapping],
    summary: Mapping[str, str],
    config_text: str,
) -> None:
    """Writes `report.md`, `predictions.jsonl` and the plots; files of an earlier report are replaced.

    Args:
        directory: created if missing.
        records: the objects of `metrics.jsonl`; empty for a model that was not trained here: no `loss.png` then.
        summary: facts of the run for the table at the top.
        config_text: the resolved config.

    Raises:
        SteerjaxError: matplotlib is missing. Nothing is written then.
    """
    require_matplotlib()
    directory, records = Path(directory), list(records)
    directory.mkdir(parents=True, exist_ok=True)
    _write_predictions(directory / "predictions.jsonl", result)
    for name in ("loss.png", "correlations.png"):  # not part of every report
        (directory / name).unlink(missing_ok=True)
    plots = ["![Predicted against human ratings, a panel an attribute](predictions.png)"]
    plot_predictions(result, directory / "predictions.png")
    if records:
        baselines = {name: value for name, value in result.average_mse().items() if name != MODEL}
        plot_losses(records, directory / "loss.png", baselines, result.compared)
        plots.insert(0, "![Training loss and validation error against the step](loss.png)")
    if len(result.schema) > 1:
        plot_correlations(result, directory / "correlations.png")
        plots.append("![Correlations between attributes, human and predicted](correlations.png)")
    (directory / "report.md").write_text(_markdown(result, plots, summary, config_text), encoding="utf-8")


def _table(result: EvaluationResult) -> list[str]:
    """Lines: the header, a row an attribute, and the average."""
    others, names = ("mae", "pearson", "spearman"), result.compared
    rows = [_row(n, m["count"], result.mse(n), [m[key] for key in others]) for n, m in result.metrics.items()]
    means = [mean_metric(result.metrics, key, names) for key in others]
    average = _row("average", sum(result.metrics[n]["count"] for n in names), result.average_mse(), means)
    header, *lines, last = text_table([_HEADER, *rows, average], left=(0, len(_HEADER) - 1))
    rule = "-" * max(map(len, (header, *lines, last)))
    return [header, rule, *lines, rule, last]


def _row(name: str, count: int, errors: Mapping[str, float | None], others: list[float | None]) -> list[str]:
    numbers = [errors[MODEL], *others, errors[MEAN_RATING], errors[LOG_LENGTH]]
    cells = ["-" if value is None else f"{value:.3f}" for value in numbers]
    return [name, str(count), *cells, " = ".join(lowest(errors)) or "-"]


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
    names = result.schema.names
    with path.open("w", encoding="utf-8") as file:
        for i, example in enumerate(result.ids):
            human = {name: float(result.ratings[i, a]) for a, name in enumerate(names) if result.mask[i, a]}
            predicted = [float(x) if math.isfinite(x) else None for x in result.predicted[i]]
            record = {"id": example, "ratings": human, "predicted_ratings": dict(zip(names, predicted, strict=True))}
            file.write(json.dumps(record, ensure_ascii=False) + "\n")


def _markdown(result: EvaluationResult, plots: list[str], summary: Mapping[str, str], config_text: str) -> str:
    # A fence longer than any in the config, so that the config cannot end it.
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", config_text)), default=0))
    parts = [
        "# Evaluation of predicted ratings",
        few_rows_note(result),
        "\n".join(f"- {key}: {' '.join(str(value).split())}" for key, value in summary.items()),
        "## Metrics on the validation split",
        "\n".join(["```", *_table(result), "```"]),
        "\n".join(f"- {sentence}" for sentence in comparison_sentences(result)),
        _EXPLANATION,
        "## Plots",
        *plots,
        "Every validation example with its human and predicted ratings: [predictions.jsonl](predictions.jsonl).",
        f"<details>\n<summary>Config</summary>\n\n{fence}\n{config_text.rstrip()}\n{fence}\n\n</details>",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"
