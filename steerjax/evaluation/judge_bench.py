"""JudgeBench: which of two long answers to a hard question is the right one?

Rows are those of hub:ScalerLab/JudgeBench:gpt (whose figures are the published ones) or :claude, or of the
repository's data folder: `question`, `response_A`, `response_B`, `label` (`A>B` or `B>A`), `source`, `pair_id`. The
decision is `A>B` if A scores higher, else, with equal scores too, `B>A`. `Overall` is the share of all pairs that are
right, of sources that belong to no category, too. (arXiv 2410.12784)
"""

import argparse
from collections.abc import Sequence

import numpy as np

from steerjax.data.conversation import Conversation
from steerjax.data.formats import value_of
from steerjax.errors import DataError
from steerjax.evaluation import completions
from steerjax.evaluation.suite import Result
from steerjax.report.figures import UNIT, Columns, mean_of

CATEGORIES = {  # the paper's name -> how its sources begin
    "Knowledge": "mmlu-pro",
    "Reasoning": "livebench-reasoning",
    "Math": "livebench-math",
    "Coding": "livecodebench",
}
LABELS = ("A>B", "B>A")

add_options = completions.add_options


def run(options: argparse.Namespace) -> Result:
    """Raises SteerjaxError, as `completions.scored_rows`."""
    rows, summary = completions.scored_rows(options, read)
    return completions.result(
        options, rows, summary, columns(rows), measure, title="JudgeBench",
        sections=dict.fromkeys((*CATEGORIES, "Overall"), 0.5),
        ties="which are decided as B>A, as in the official code",
    )  # fmt: skip


def read(row: dict, source: str) -> tuple[dict, list[Conversation]]:
    """The conversations with A and with B. Raises DataError, which names the key."""
    label = value_of(row, "label", str)
    if label not in LABELS:
        raise DataError(f"'{label}' is no label", "label", f"one of: {', '.join(LABELS)}")
    prompt = completions.prompt_of(row, "question")
    sides = [completions.completed(prompt, value_of(row, key, str), key) for key in ("response_A", "response_B")]
    named = {"id": row["pair_id"]} if value_of(row, "pair_id", str, "") else {}
    return named | {"source": value_of(row, "source", str), "label": label}, sides


def columns(rows: Sequence[dict]) -> Columns:
    """`category`, its number; for each score (by prefix) `right` and `equal`, 0 or 1."""
    rows = completions.scored(rows)
    begins, a_wins = [*CATEGORIES.values()], np.array([row["label"] == "A>B" for row in rows], bool)
    numbers = [next((n for n, begin in enumerate(begins) if row["source"].startswith(begin)), 4) for row in rows]
    found = {UNIT: np.array([row["id"] for row in rows]), "category": np.array(numbers, np.int64)}
    for prefix, scores in completions.scores_of(rows).items():
        a, b = np.array(scores).reshape(-1, 2).T
        found[f"{prefix}right"] = ((a > b) == a_wins).astype(float)
        found[f"{prefix}equal"] = (a == b).astype(float)
    return found


def measure(columns: Columns) -> dict[str, tuple[float, int]]:
    """`compute_final_metrics` of JudgeBench's utils/metrics.py in one order (`--single_game`), as shares."""
    found, category = {}, columns["category"]
    counts = np.bincount(category, minlength=len(CATEGORIES))
    for prefix in completions.prefixes(columns, "right"):
        right = columns[f"{prefix}right"]
        shares = completions.section_means(category, right, len(CATEGORIES))
        found |= {prefix + name: (float(shares[place]), int(counts[place])) for place, name in enumerate(CATEGORIES)}
        found[f"{prefix}Overall"] = mean_of(right)
        found[f"{prefix}equal scores"] = mean_of(columns[f"{prefix}equal"])
    return found
