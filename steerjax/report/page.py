"""The report of predicted ratings: a table for the terminal, and a folder with `report.md`, plots and predictions."""

import json
import math
import re
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

from steerjax.report.plots import plot_correlations, plot_losses, plot_predictions, require_matplotlib
from steerjax.report.results import LOG_LENGTH, MEAN_RATING, MODEL, EvaluationResult, lowest, mean_metric

FEW_RESPONSES = 500  # below it a report says first what so few can show

_PLOTS = {
    "loss.png": "Loss against the step",
    "predictions.png": "Predicted against human ratings, a panel an attribute",
    "correlations.png": "Correlations between attributes, human and predicted",
}
_EXPLANATION = (
    "MSE is the mean of (predicted - human)², in rating², so lower is better; Pearson and Spearman (-1 to 1) say how "
    "well responses are ordered; kappa is the quadratic-weighted agreement of whole ratings, 0 for chance, 1 for "
    "equality. The mean-rating baseline always answers an attribute's mean in the training split; "
    "the length baseline knows nothing but the response's length."
)


def format_table(result: EvaluationResult) -> str:
    """The metrics as plain text, a row an attribute and one for the average, then the comparison in words."""
    rows = [["attribute", "ratings", "MSE", "MAE", "Pearson", "Spearman", "kappa"]]
    rows[0] += [f"MSE {MEAN_RATING}", f"MSE {LOG_LENGTH}", "lowest MSE"]
    for title, names in [*((name, [name]) for name in result.schema.names), ("average", result.compared)]:
        errors = result.mse(*names)
        model = [mean_metric(result.metrics, key, names) for key in ("mse", "mae", "pearson", "spearman", "kappa")]
        cells = ["-" if x is None else f"{x:.3f}" for x in (*model, errors[MEAN_RATING], errors[LOG_LENGTH])]
        count = sum(result.metrics[name]["count"] for name in names)
        rows.append([title, str(count), *cells, " = ".join(lowest(errors)) or "-"])
    header, *lines, last = text_table(rows, "<>>>>>>>><")
    rule = "-" * max(map(len, (header, *lines, last)))
    note = few_rows_note(result)
    first = [textwrap.fill(note, 100), ""] if note else []
    return "\n".join([*first, header, rule, *lines, rule, last, "", *comparison_sentences(result)])


def text_table(rows: Sequence[Sequence[str]], aligned: str) -> list[str]:
    """A line of text a row, columns lined up; `aligned` has a `<` or `>` for each column, its left or its right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    form = "  ".join(f"{{:{side}{width}}}" for side, width in zip(aligned, widths, strict=True))
    return [form.format(*row).rstrip() for row in rows]


def few_rows_note(result: EvaluationResult) -> str:
    """What a split of few responses can and cannot show; "" for `FEW_RESPONSES` or more."""
    if (count := len(result.ids)) >= FEW_RESPONSES:
        return ""
    return (
        f"Only {count} responses were evaluated. They can show that the model beats the baselines clearly, not which "
        "of two similar recipes is better: the intervals below say how far chance alone moves the averages."
    )


def interval_sentence(result: EvaluationResult) -> str:
    """Averages with their bootstrap intervals; "" where there are none."""
    names = {"mse": "MSE", "pearson": "Pearson", "kappa": "kappa"}
    values = [(words, mean_metric(result.metrics, key, result.compared), key) for key, words in names.items()]
    found = [(words, value, interval) for words, value, key in values if (interval := result.interval(key))]
    said = ", ".join(f"{words} {value:.3f} [{low:.3f}, {high:.3f}]" for words, value, (low, high) in found)
    return f"Averages with 95% intervals (bootstrap over the responses): {said}." if said else ""


def comparison_sentences(result: EvaluationResult) -> list[str]:
    """One sentence a baseline: does the model beat it on average MSE; and what the average leaves out or mixes."""
    averages, schema = result.average_mse(), result.schema
    baselines = ((MEAN_RATING, "mean-rating baseline"), (LOG_LENGTH, "length baseline"))
    sentences = [said] if (said := interval_sentence(result)) else []
    sentences += [_compare(averages[MODEL], averages[name], words, result, name) for name, words in baselines]
    if left_out := [name for name in schema.names if name not in result.compared]:
        sentences.append(f"Averages leave out {', '.join(left_out)}: no rating in the validation or training split.")
    if len({schema[name].high - schema[name].low for name in result.compared}) > 1:
        sentences.append("Ranges differ, and the average MSE is mostly that of the attributes with the widest.")
    return sentences


def _compare(model: float | None, baseline: float | None, words: str, result: EvaluationResult, name: str) -> str:
    if model is None or baseline is None:
        return f"No comparison with the {words}: no attribute has ratings in both the training and validation split."
    if not math.isfinite(model):
        return f"No comparison with the {words}: some of the model's predictions are NaN or infinite."
    numbers = f"{model:.3f} to {baseline:.3f}"
    if round(model, 3) == round(baseline, 3):
        return f"The model is level with the {words} on average MSE ({numbers})."
    verb, side = ("beats", "lower") if model < baseline else ("loses to", "higher")
    change = f", {abs(model / baseline - 1):.1%} {side}" if baseline else ""
    if (interval := result.interval("mse", less=name)) and interval[0] < 0 < interval[1]:
        change += ", which may be chance"
    return f"The model {verb} the {words} on average MSE ({numbers}{change})."


def write_report(
    directory: str | Path,
    result: EvaluationResult,
    records: Sequence[Mapping],
    summary: Mapping[str, str],
    config_text: str,
) -> None:
    """Writes `report.md`, `predictions.jsonl` and the plots; files of an earlier report are replaced.

    `records` are the objects of `metrics.jsonl`, none for a model that was not trained here: no `loss.png` then.
    `summary` are facts of the run.

    Raises SteerjaxError: matplotlib is missing. Nothing is written then.
    """
    require_matplotlib()
    directory, names = Path(directory), result.schema.names
    directory.mkdir(parents=True, exist_ok=True)
    for plot in _PLOTS:  # not all are part of every report
        (directory / plot).unlink(missing_ok=True)
    plot_predictions(result, directory / "predictions.png")
    if records:
        plot_losses(records, directory / "loss.png")
    if len(names) > 1:
        plot_correlations(result, directory / "correlations.png")
    with (directory / "predictions.jsonl").open("w", encoding="utf-8") as file:
        for example, *rows in zip(result.ids, result.ratings.tolist(), result.predicted.tolist(), strict=True):
            human, predicted = (
                {name: x if math.isfinite(x) else None for name, x in zip(names, row, strict=True)} for row in rows
            )
            human = {name: rating for name, rating in human.items() if rating is not None}
            record = {"id": example, "ratings": human, "predicted_ratings": predicted}
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
    # A fence longer than any in the config, so that the config cannot end it.
    fence = max(re.findall("`{3,}", config_text), key=len, default="``") + "`"
    parts = [
        "# Predicted ratings on the validation split",
        f"```\n{format_table(result)}\n```",
        _EXPLANATION,
        "\n".join(f"- {key}: {' '.join(str(value).split())}" for key, value in summary.items()),
        *(f"![{words}]({plot})" for plot, words in _PLOTS.items() if (directory / plot).exists()),
        "Every validation example with its human and predicted ratings: [predictions.jsonl](predictions.jsonl).",
        f"<details>\n<summary>Config</summary>\n\n{fence}\n{config_text.rstrip()}\n{fence}\n\n</details>",
    ]
    (directory / "report.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")
