"""RM-Bench: is a reward model blind to style? Three right and three wrong responses a prompt, in three styles.

Rows are those of hub:THU-KEG/RM-Bench or of the repository's total_dataset.json: `prompt`, `chosen` and `rejected`
(three texts each: concise, detailed, with Markdown), `domain`; a file of one domain, as chat_filtered.json, gives it
by its name. Every right response is compared with every wrong one; equal scores are wrong. Hard is a right response
plainer than the wrong one, normal one of the same style, easy one less plain. A domain is the mean of the three,
`Overall` that of the four domains. (arXiv 2410.16184)
"""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from steerjax.data.conversation import Conversation
from steerjax.data.formats import value_of
from steerjax.errors import DataError
from steerjax.evaluation import completions
from steerjax.evaluation.suite import Result
from steerjax.report.figures import UNIT, Columns, mean_of
from steerjax.report.plots import INK, new_figure

DOMAINS = ("chat", "math", "code", "safety")  # safety-refuse and safety-response are one
STYLES = ("concise", "detailed", "Markdown")
LEVELS = {  # places of the matrix, right responses down and wrong ones across
    "hard": np.triu_indices(3, 1),
    "normal": np.diag_indices(3),
    "easy": np.tril_indices(3, -1),
}
_WHOLE = 1327

add_options = completions.add_options


def run(options: argparse.Namespace) -> Result:
    """Raises SteerjaxError, as `completions.scored_rows`."""
    rows, summary = completions.scored_rows(options, read)
    made = completions.result(
        options, rows, summary, columns(rows), measure, title="RM-Bench", whole=_WHOLE,
        sections=dict.fromkeys((*DOMAINS, *LEVELS, "Overall"), 0.5),
        ties="which count as wrong, as in the official code",
    )  # fmt: skip
    found = matrices(rows)
    _plot(found, list(completions.scored(rows)[0]["scores"]), options.output / "matrix.png")
    words = "How often a right response of one style (down) scores higher than a wrong one of another (across)"
    detail = {
        "matrix": {
            prefix.rstrip("/"): {domain: values.tolist() for domain, values in domains.items()}
            for prefix, domains in found.items()
        }
    }
    return replace(made, plots={**made.plots, "matrix.png": words}, detail=detail)


def read(row: dict, source: str) -> tuple[dict, list[Conversation]]:
    """The conversations, the three chosen ones first. Raises DataError, which names the key."""
    domain = value_of(row, "domain", str, Path(source).name)
    if not domain.startswith(DOMAINS):
        cure = f"a text that begins with {', '.join(DOMAINS)}, or a file called as RM-Bench's, e.g. chat_filtered.json"
        raise DataError(f"'{domain}' is no domain of RM-Bench", "domain", cure)
    prompt, sides = completions.prompt_of(row), []
    for key in ("chosen", "rejected"):
        texts = completions.texts_of(row, key)
        if len(texts) != len(STYLES):
            raise DataError(f"{len(texts)} texts, where there are three styles", key, "give one of each style")
        sides += [completions.completed(prompt, said, key) for said in texts]
    return {"domain": domain.partition("_filtered.")[0]}, sides


def wins(scores: Sequence[Sequence[float]]) -> np.ndarray:
    """[n, 3, 3]: whether right response i scores higher than wrong response j; scores are [n, 6], the right first."""
    values = np.array(scores).reshape(-1, 2, 3)
    return values[:, 0, :, None] > values[:, 1, None, :]


def columns(rows: Sequence[dict]) -> Columns:
    """`domain`, its number; for each score (by prefix) the share that is right of `hard`, `normal` and `easy`."""
    rows = completions.scored(rows)
    found = {
        UNIT: np.array([f"{row['domain']} {row['id']}" for row in rows]),
        "domain": np.array([_domain(row) for row in rows], np.int64),
    }
    for prefix, scores in completions.scores_of(rows).items():
        right, values = wins(scores), np.array(scores).reshape(-1, 2, 3)
        found |= {f"{prefix}{level}": right[:, i, j].mean(1) for level, (i, j) in LEVELS.items()}
        found[f"{prefix}equal"] = (values[:, 0, :, None] == values[:, 1, None, :]).mean((1, 2))
    return found


def _domain(row: Mapping) -> int:
    return next(number for number, domain in enumerate(DOMAINS) if row["domain"].startswith(domain))


def measure(columns: Columns) -> dict[str, tuple[float, int]]:
    """`compute_accuracy` of RM-Bench's scripts/utils.py, but NaN for a domain without rows, there an error."""
    found, domain = {}, columns["domain"]
    counts = np.bincount(domain, minlength=len(DOMAINS))
    for prefix in completions.prefixes(columns, "hard"):
        levels = {level: completions.section_means(domain, columns[prefix + level], len(DOMAINS)) for level in LEVELS}
        means = np.mean([*levels.values()], axis=0)
        found |= {prefix + name: (float(means[place]), int(counts[place])) for place, name in enumerate(DOMAINS)}
        found |= {prefix + level: (float(values.mean()), len(domain)) for level, values in levels.items()}
        found[f"{prefix}Overall"] = float(means.mean()), len(domain)
        found[f"{prefix}equal scores"] = mean_of(columns[f"{prefix}equal"])
        for place, name in enumerate(DOMAINS):
            for level, values in levels.items():
                found[f"{prefix}{name}/{level}"] = float(values[place]), int(counts[place])
    return found


def matrices(rows: Sequence[dict]) -> dict[str, dict[str, np.ndarray]]:
    """By prefix and domain, [3, 3]: how often a right response of style i scores higher than a wrong one of style j."""
    rows = completions.scored(rows)
    domains = np.array([_domain(row) for row in rows])
    found = {}
    for prefix, scores in completions.scores_of(rows).items():
        right = wins(scores)
        found[prefix] = {DOMAINS[number]: right[domains == number].mean(0) for number in np.unique(domains)}
    return found


def _plot(found: Mapping[str, Mapping[str, np.ndarray]], names: Sequence[str], path: Path) -> None:
    """A panel a score, the mean over the domains that have rows."""
    across = min(len(found), 5)
    down = -(-len(found) // across)
    seen = ", ".join(next(iter(found.values())))
    title = f"RM-Bench, {seen}: how often right beats wrong"
    with new_figure(path, max(1.9 * across + 1.2, 6.4), 2.55 * down + 0.9, title) as figure:
        panels = figure.subplots(down, across, sharex=True, sharey=True, squeeze=False).ravel()
        headings = [*names, completions.LONGER.rstrip("/")]
        for axes, heading, domains in zip(panels, headings, found.values(), strict=False):
            matrix = np.mean([*domains.values()], axis=0)
            axes.imshow(matrix, cmap="RdBu", vmin=0, vmax=1)
            for (row, column), value in np.ndenumerate(matrix):
                colour = "white" if abs(value - 0.5) > 0.3 else INK
                axes.text(column, row, f"{value:.2f}", ha="center", va="center", color=colour)
            axes.set_title(heading)
            axes.set_xticks(range(3), STYLES, rotation=40, ha="right", rotation_mode="anchor")
            axes.set_yticks(range(3), STYLES)
            axes.tick_params(labelbottom=True)
            axes.grid(visible=False)
        for axes in panels[len(found) :]:
            axes.set_visible(False)
        figure.supxlabel("style of the wrong response", fontsize=10.5)
        figure.supylabel("style of the right response", fontsize=10.5)
