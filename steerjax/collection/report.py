"""Ratings of an export -> rows to train on, and the report on how far the raters agree."""

import json
import textwrap
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from steerjax.collection.agreement import Rule, alphas_without, columns, measure, pair_kappas
from steerjax.collection.export import Collected, Ratings
from steerjax.collection.tasks import Key, Task
from steerjax.data.loading import write_skipped
from steerjax.errors import DataError
from steerjax.evaluation.suite import Result, figure_table
from steerjax.files import write_text
from steerjax.report.figures import UNIT, Columns, Figure, figures, mean_of, prompt_units
from steerjax.report.page import text_table
from steerjax.report.plots import BLUE, GREY, new_figure
from steerjax.schema import Schema

ROWS, SKIPPED, PLOT = "ratings.jsonl", "skipped.jsonl", "agreement.png"
SHOWN = 20  # answers in the report's list, and raters in its plot
MOST_RATERS = 5  # HelpSteer2 asks for up to so many where three do not agree


def report(folder: Path, key: Key, found: Collected, rule: Rule) -> Result:
    """Writes ratings.jsonl, skipped.jsonl and the plot into the folder; results.json and report.md are the caller's.

    Agreement is that of all ratings, whatever the rule keeps. Raises DataError: the rule keeps no answer.
    """
    rows, dropped, more = chosen(key, found, rule)
    if not rows:
        said = ", ".join(f"{n} {what}" for what, n in dropped.items())
        raise DataError(f"no answer is left: {said}", cure="more raters, or a weaker rule")
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    write_text(folder / ROWS, lines, errors="backslashreplace")
    write_skipped(folder / SKIPPED, found.skipped)
    names = list(found.ratings)
    raters = sorted({rater for each in found.ratings.values() for rater in each}, key=_natural)
    prompts = [_prompt(key.tasks[name]) for name in names]
    table = columns([found.ratings[name] for name in names], prompts, key.schema, raters)
    values, without = figures(measure, table), alphas_without(table)
    sources = figures(*by_source(key, found.ratings, prompts))
    apart = disagreements(key, found, rule)
    text = "\n\n".join(
        filter(None, [
            "\n".join(textwrap.fill(said, 100) for said in sentences(key.schema, values, without, apart, rule)),
            attribute_table(key.schema, values),
            rater_table(key.schema, values, without, raters),
            figure_table(sources) if sources else "",
            apart_table(apart),
            _EXPLANATION,
        ])
    )  # fmt: skip
    plot_agreement(key.schema, values, raters, folder / PLOT)
    summary = {
        "project": key.project,
        "answers": f"{len(key.tasks)} tasks, {len(names)} rated by {len(raters)} raters, {len(rows)} in {ROWS}",
        **{what: n for what, n in (found.counts + dropped).items() if n},
        **({"tasks that could not be used": f"{len(found.skipped)}, listed in {SKIPPED}"} if found.skipped else {}),
        **({"tasks that need another rater": f"{len(more)} (more_raters in results.json)"} if more else {}),
    }
    detail = {
        "pairs": pair_kappas(table), "alpha without": without, "disagreements": apart, "more_raters": more,
        "sources": {name: figure.to_json() for name, figure in sources.items()},
    }  # fmt: skip
    plots = {PLOT: "How far raters agree, by attribute and by rater"}
    return Result(values, text, plots, summary, detail, {ROWS: "the rows, with every rating that is kept"})


def chosen(key: Key, found: Collected, rule: Rule) -> tuple[list[dict], Counter, list[Any]]:
    """The rows in the key's order, why others were dropped, and Label Studio's numbers of tasks that should get another
    rater: dropped ones with fewer than five."""
    rows, dropped, more = [], Counter(), []
    words = {"few": f"dropped: fewer than {rule.least} raters", "spread": f"dropped: {rule.by} too far apart"}
    for name in key.tasks:
        if ratings := found.ratings.get(name):
            raters, why = rule.apply(ratings)
            if why:
                dropped[words[why]] += 1
                more += [found.numbers[name]] if len(ratings) < MOST_RATERS else []
            else:
                rows.append(row_of(name, key, {rater: ratings[rater] for rater in raters}))
    return rows, dropped, more


def row_of(name: str, key: Key, ratings: Ratings) -> dict:
    """A row of the format `messages`: a list of ratings for each attribute, and who gave them."""
    task = key.tasks[name]
    given = {a: [(rater, each[a]) for rater, each in ratings.items() if a in each] for a in key.schema.names}
    given = {attribute: pairs for attribute, pairs in given.items() if pairs}
    return {
        "id": name,
        "system": task.conversation["system"],
        "messages": [{"role": turn["role"], "content": turn["content"]} for turn in task.conversation["turns"]],
        **{attribute: [_plain(rating) for _, rating in pairs] for attribute, pairs in given.items()},
        "raters": {attribute: [rater for rater, _ in pairs] for attribute, pairs in given.items()},
        "source": " = ".join(source_names(task)),
        "sources": task.sources,
    }


def source_names(task: Task) -> list[str]:
    return list(dict.fromkeys(str(source["source"]) for source in task.sources))


def by_source(key: Key, ratings: Mapping[str, Ratings], prompts: Sequence[str]) -> tuple[Any, Columns]:
    """How `SOURCE: ATTRIBUTE`, means of an answer's mean rating, follow from columns, and these; none of one source."""
    names = list(dict.fromkeys(source for name in ratings for source in source_names(key.tasks[name])))
    table: dict[str, np.ndarray] = {UNIT: prompt_units(prompts)}
    for source in names if len(names) > 1 else ():
        theirs = [source in source_names(key.tasks[name]) for name in ratings]
        for a in key.schema.names:
            given = [[each[a] for each in of.values() if a in each] for of in ratings.values()]
            means = [np.mean(x) if x and own else np.nan for x, own in zip(given, theirs, strict=True)]
            table[f"{source}: {a}"] = np.array(means, np.float64)
    return (lambda found: {name: mean_of(found[name]) for name in found if name != UNIT}), table


def disagreements(key: Key, found: Collected, rule: Rule) -> list[dict]:
    """Answers by how far their raters are apart, widest first: of the attribute where it is most of the range."""
    out = []
    for name, ratings in found.ratings.items():
        widest = None
        for attribute in key.schema.attributes:
            given = {rater: each[attribute.name] for rater, each in ratings.items() if attribute.name in each}
            if len(given) > 1 and (apart := max(given.values()) - min(given.values())):
                share = apart / (attribute.high - attribute.low)
                if widest is None or share > widest["share"]:
                    widest = {"attribute": attribute.name, "apart": apart, "share": share, "ratings": given}
        if widest:
            start = " ".join(_prompt(key.tasks[name]).split())[:60]
            out.append({"task": found.numbers[name], "id": name, **widest, "prompt": start})
    return sorted(out, key=lambda each: -each["share"])


def sentences(
    schema: Schema, values: Mapping[str, Figure], without: Mapping, apart: Sequence[dict], rule: Rule
) -> list[str]:  # fmt: skip
    """What is most worth looking at: an attribute, a rater, answers."""
    alphas = {name: values[f"{name}/alpha"].value for name in schema.names}
    alphas = {name: value for name, value in alphas.items() if value is not None}
    if not alphas:
        return ["No answer has two ratings that could disagree, so nothing is known of agreement."]
    low, high = min(alphas, key=alphas.get), max(alphas, key=alphas.get)
    said = [f"Krippendorff's alpha is {np.mean(list(alphas.values())):.2f} in the mean of the attributes."]
    if low != high:
        said = [f"{said[0]} Raters agree least on {low} ({alphas[low]:.2f}), most on {high} ({alphas[high]:.2f})."]
    means = {}
    for rater, left in without.items():
        both = [(left[name], alphas[name]) for name in alphas if left.get(name) is not None]
        if both and len(without) > 2:
            means[rater] = tuple(float(np.mean(side)) for side in zip(*both, strict=True))
    if means:
        off = max(means, key=lambda rater: means[rater][0] - means[rater][1])
        less, before = means[off]
        if round(less - before, 2) > 0:
            said.append(f"Rater {off} differs most: without these ratings alpha is {less:.2f}, not {before:.2f}.")
    ranges = {attribute.name: attribute.high - attribute.low for attribute in schema.attributes}
    harsh = [
        (abs(figure.value) / ranges[name.partition("/")[0]], name) for name, figure in values.items()
        if name.endswith(" less others") and figure.interval and (figure.interval[0] > 0 or figure.interval[1] < 0)
    ]  # fmt: skip
    if harsh:
        attribute, _, who = max(harsh)[1].removesuffix(" less others").partition("/")
        value = values[f"{attribute}/{who} less others"].value
        said.append(
            f"Rater {who} gives {abs(value):.2f} {'more' if value > 0 else 'less'} {attribute} than the others."
        )
    wide = sum(each["share"] > 0.5 for each in apart)
    said.append(f"On {wide} answers two raters are more than half of a range apart.")
    return said


def attribute_table(schema: Schema, values: Mapping[str, Figure]) -> str:
    rows = [["attribute", "alpha", "ordinal alpha", "kappa", "equal", "pairs", "ratings", "mean"]]
    for name in schema.names:
        cells = [str(values[f"{name}/{what}"]) for what in ("alpha", "ordinal alpha", "kappa")]
        equal, mean = values[f"{name}/equal"], values[f"{name}/mean"]
        share, middle = _cell(equal.value), _cell(mean.value)
        rows.append([name, *cells, share, str(equal.count), str(mean.count), middle])
    return "\n".join(text_table(rows, "<>>>>>>>"))


def rater_table(schema: Schema, values: Mapping[str, Figure], without: Mapping, raters: Sequence[str]) -> str:
    """A row a rater, from the one who agrees least with the others; the other numbers are in results.json."""
    rows = []
    for rater in raters:
        kappas = {name: values[f"{name}/kappa of {rater}"] for name in schema.names}
        less = {name: values[f"{name}/{rater} less others"] for name in schema.names}
        count = max(figure.count for figure in less.values())
        known = {name: figure.value for name, figure in kappas.items() if figure.value is not None}
        mean = float(np.mean(list(known.values()))) if known else None
        low = min(known, key=known.get, default=None)
        far = max((name for name in less if less[name].count), key=lambda name: abs(less[name].value), default=None)
        left = [alpha for alpha in without[rater].values() if alpha is not None]
        cells = [f"{low} {known[low]:.3f}" if low else "-", f"{far} {less[far]}" if far else "-"]
        alpha = _cell(float(np.mean(left)) if left else None)
        rows.append((np.inf if mean is None else mean, [rater, str(count), _cell(mean), cells[0], cells[1], alpha]))
    head = ["rater", "answers", "kappa", "lowest kappa", "furthest from the others", "alpha without"]
    return "\n".join(text_table([head, *(row for _, row in sorted(rows, key=lambda row: row[0]))], "<>><<>"))


def apart_table(apart: Sequence[dict]) -> str:
    rows = [["task", "attribute", "ratings by rater", "prompt"]]
    for each in apart[:SHOWN]:
        given = " ".join(f"{rater}:{rating:g}" for rater, rating in each["ratings"].items())
        rows.append([str(each["task"]), each["attribute"], given, each["prompt"]])
    more = f"\n({len(apart) - SHOWN} more in results.json)" if len(apart) > SHOWN else ""
    return "Answers whose raters are furthest apart:\n" + "\n".join(text_table(rows, "><<<")) + more if apart else ""


_EXPLANATION = """\
alpha: Krippendorff's, 1 for equality, 0 for chance; ordinal alpha: of the ratings' order alone; kappa: quadratic-
weighted, of every two raters of an answer, pooled; equal: how often two give the same rating. Of a rater: kappa with
the others, the mean of the attributes and the lowest; furthest from the others: the attribute on which ratings are most
above or below the mean of the others' of the same answers; alpha without: the mean without this rater. All of it is of
all ratings, whatever rule chose the rows."""


def plot_agreement(schema: Schema, values: Mapping[str, Figure], raters: Sequence[str], path: Path) -> None:
    """Alpha by attribute with its interval; of each rater kappa with the others, and how much higher ratings are."""
    names = schema.names
    shown = [rater for rater in raters if any(values[f"{name}/{rater} less others"].count for name in names)]
    cut = shown[:SHOWN]
    sides = 2 if cut else 0
    longest, rater = max(map(len, names)), max(map(len, cut), default=0)
    height = 1.3 + 0.055 * longest + max(0.34 * len(cut), 0.3 * len(names))
    first, more = 3.2 + 0.08 * longest, max(3.1, 0.9 + 0.08 * rater + 0.48 * len(names))  # inches
    with new_figure(path, first + sides * more, height) as figure:
        axes, *panels = np.atleast_1d(figure.subplots(1, 1 + sides, width_ratios=[first, *([more] * sides)]))
        axes.set_title("Krippendorff's alpha")
        for place, name in enumerate(names):
            value, _, interval = values[f"{name}/alpha"]
            if value is None:
                axes.text(0.02, place, "undefined", va="center", color=GREY)
                continue
            low, high = interval or (value, value)
            axes.plot([low, high], [place, place], color=BLUE, linewidth=2, alpha=0.5)
            axes.plot([value], [place], "o", color=BLUE)
        axes.set_yticks(range(len(names)), names)
        axes.set_ylim(len(names) - 0.5, -0.5)
        axes.set_xlim(min(0.0, *(axes.get_xlim())), 1)
        axes.axvline(0, color=GREY, linewidth=1)
        widest = max(attribute.high - attribute.low for attribute in schema.attributes)
        kinds = (
            ("kappa of {}", "Kappa with the others", 1.0),
            ("{} less others", "Rating less the others' mean", widest / 2),
        )
        for axes, (form, title, limit) in zip(panels, kinds, strict=True):
            grid = [[values[f"{name}/{form.format(rater)}"].value for name in names] for rater in cut]
            grid = np.array(grid, np.float64)
            axes.imshow(grid, cmap="RdBu" if limit == 1.0 else "PuOr", vmin=-limit, vmax=limit, aspect="auto")
            for (row, column), value in np.ndenumerate(grid):
                dark = abs(value) > 0.6 * limit
                text = f"{value:.2f}" if np.isfinite(value) else "–"
                axes.text(column, row, text, ha="center", va="center", fontsize=8, color="white" if dark else "black")
            axes.set_title(title)
            axes.set_xticks(range(len(names)), names, rotation=40, ha="right", rotation_mode="anchor")
            axes.set_yticks(range(len(cut)), [f"rater {rater}" for rater in cut])
            axes.grid(visible=False)


def _cell(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _prompt(task: Task) -> str:
    turns = task.turns()
    return next((turn["content"] for turn in turns if turn["role"] == "user"), turns[0]["content"])


def _plain(rating: float) -> float | int:
    return int(rating) if rating == int(rating) else rating


def _natural(rater: str) -> tuple[int, str]:
    """Numbers in their order, before other names."""
    return (int(rater) if rater.isdigit() else 10**18), rater
