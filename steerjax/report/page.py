"""The page that every report is (`report.md` and `report.html`), and the report of predicted ratings: a table for the
terminal, and a folder with page, plots and predictions."""

import base64
import html
import json
import math
import re
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from steerjax.files import make_folder, whole_file, write_text
from steerjax.report.plots import plot_correlations, plot_losses, plot_predictions, require_plots
from steerjax.report.results import LOG_LENGTH, MEAN_RATING, MODEL, EvaluationResult, lowest, mean_metric

REPORT, PAGE = "report.md", "report.html"
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


_STYLE = """
:root { color-scheme: light dark }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem }
"""
_PAGE_STYLE = """
body { overflow-wrap: anywhere }
h1, h2 { line-height: 1.25 }
pre { font-size: .85rem; line-height: 1.4; overflow-x: auto; overflow-wrap: normal; padding: .8rem; background: #8882 }
pre, img { border-radius: 6px }
.plot { display: block; margin: 1.5rem 0 }
.plot img { display: block; max-width: 100%; background: #fff }
.plot span { color: GrayText; font-size: .9rem }
summary { cursor: pointer; font-weight: 600 }
"""


def format_table(result: EvaluationResult) -> str:
    """The metrics as plain text, a row an attribute and one for the average, then the comparison in words."""
    note = few_rows_note(result)
    first = [textwrap.fill(note, 100), ""] if note else []
    return "\n".join([*first, *_table_lines(result), "", *comparison_sentences(result)])


def _table_lines(result: EvaluationResult) -> list[str]:
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
    return [header, rule, *lines, rule, last]


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
        "of two similar recipes is better: the intervals say how far chance alone moves the averages."
    )


def interval_sentence(result: EvaluationResult) -> str:
    """Averages with their bootstrap intervals; "" where there are none."""
    names = {"mse": "MSE", "pearson": "Pearson", "kappa": "kappa"}
    values = [(words, mean_metric(result.metrics, key, result.compared), key) for key, words in names.items()]
    found = [(words, value, interval) for words, value, key in values if (interval := result.interval(key))]
    said = ", ".join(f"{words} {value:.3f} [{low:.3f}, {high:.3f}]" for words, value, (low, high) in found)
    over = "responses" if result.units is None else "prompts"
    return f"Averages with 95% intervals (bootstrap over the {over}): {said}." if said else ""


def comparison_sentences(result: EvaluationResult) -> list[str]:
    """One sentence a baseline: does the model beat it on average MSE; and what the average leaves out or mixes."""
    averages, schema = result.average_mse(), result.schema
    baselines = ((MEAN_RATING, "mean-rating baseline"), (LOG_LENGTH, "length baseline"))
    sentences = [said] if (said := interval_sentence(result)) else []
    sentences += [_compare(averages[MODEL], averages[name], words, result, name) for name, words in baselines]
    if left_out := [name for name in schema.names if name not in result.compared]:
        sentences.append(f"Averages leave out {', '.join(left_out)}: no rating here, or none to fit the baselines on.")
    if len({schema[name].high - schema[name].low for name in result.compared}) > 1:
        sentences.append("Ranges differ, and the average MSE is mostly that of the attributes with the widest.")
    return sentences


def _compare(model: float | None, baseline: float | None, words: str, result: EvaluationResult, name: str) -> str:
    if model is None or baseline is None:
        fitted = any(entry["count"] for entry in result.baselines[name].values())
        none, both = "there are no training ratings to fit it on (--train-data)", "both here and in the training data"
        return f"No comparison with the {words}: {f'no attribute has ratings {both}' if fitted else none}."
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
    losses: Mapping[str, np.ndarray],
    summary: Mapping[str, str],
    config_text: str,
    unit: str = "rating²",
) -> None:
    """Writes the report, `predictions.jsonl` and the plots; files of an earlier report are replaced.

    `losses` are `records.own_losses`, measured in `unit`; empty for a model that was not trained here: no `loss.png`
    then. `summary` are facts of the run.

    Raises SteerjaxError: what plots and page need is missing. Nothing is written then.
    """
    require_plots()
    directory, names = Path(directory), result.schema.names
    make_folder(directory)
    for plot in _PLOTS:  # not all are part of every report
        (directory / plot).unlink(missing_ok=True)
    plot_predictions(result, directory / "predictions.png")
    if losses:
        plot_losses(losses, directory / "loss.png", unit)
    if len(names) > 1:
        plot_correlations(result, directory / "correlations.png")
    with whole_file(directory / "predictions.jsonl") as file:
        for example, *rows in zip(result.ids, result.ratings.tolist(), result.predicted.tolist(), strict=True):
            human, predicted = (
                {name: x if math.isfinite(x) else None for name, x in zip(names, row, strict=True)} for row in rows
            )
            human = {name: rating for name, rating in human.items() if rating is not None}
            record = {"id": example, "ratings": human, "predicted_ratings": predicted}
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
    parts = [
        "# Predicted ratings on the validation split",
        bullets(comparison_sentences(result)),
        fenced("\n".join(_table_lines(result))),
        few_rows_note(result),
        _EXPLANATION,
        *(f"![{words}]({plot})" for plot, words in _PLOTS.items() if (directory / plot).exists()),
        "Every validation example with its human and predicted ratings: [predictions.jsonl](predictions.jsonl).",
    ]
    write_page(directory, parts, summary, config_text)


def bullets(lines: Iterable[str]) -> str:
    """A list; white space in a line is one blank."""
    return "\n".join(f"- {' '.join(str(line).split())}" for line in lines)


def fenced(text: str, language: str = "") -> str:
    """In a fence longer than any in the text, so that the text cannot end it."""
    fence = max(re.findall("`{3,}", text), key=len, default="``") + "`"
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"


def write_page(folder: Path, parts: Sequence[str], summary: Mapping[str, str], settings: str) -> None:
    """`report.md` of these parts (Markdown), then facts of the data and the settings (JSON); and `report.html`, all of
    it in one file: plots are inside, and nothing is fetched.

    The first part is the heading. HTML in a part is shown as text.
    """
    facts = bullets(f"{key}: {value}" for key, value in summary.items())
    text = "\n\n".join(filter(None, [*parts, facts and f"## Data and computation\n\n{facts}"])) + "\n"
    code = fenced(settings, "json")
    more = f"\n<details>\n<summary>Settings</summary>\n\n{code}\n\n</details>\n"
    write_text(folder / REPORT, text + more)
    body = _rendered(text, folder) + f"<details><summary>Settings</summary>{_rendered(code, folder)}</details>"
    heading = parts[0].lstrip("# ")
    write_text(folder / PAGE, html_page(heading, body, _PAGE_STYLE), errors="backslashreplace")


def _rendered(text: str, folder: Path) -> str:
    """Markdown as HTML, with the folder's plots inside and their words below."""
    from markdown_it import MarkdownIt

    reader = MarkdownIt("commonmark", {"html": False}).enable("table")

    def plot(renderer, tokens, index, options, env) -> str:
        source, words = tokens[index].attrs["src"], html.escape(tokens[index].content)
        file = folder / source
        if file.name != source or not file.is_file():
            return words
        data = base64.b64encode(file.read_bytes()).decode("ascii")
        return f'<span class="plot"><img alt="{words}" src="data:image/png;base64,{data}"><span>{words}</span></span>'

    reader.add_render_rule("image", plot)
    return reader.render(text)


def html_page(title: str, body: str, style: str = "") -> str:
    """A page of this body (HTML) that is one file: light or dark as the reader's system is, and nothing is fetched."""
    head = (
        '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:; '
        f"style-src 'unsafe-inline'\"><title>{html.escape(title)}</title><style>{_STYLE}{style}</style>"
    )
    return f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>{body}</body></html>\n'
