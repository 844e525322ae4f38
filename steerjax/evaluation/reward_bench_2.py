"""RewardBench 2: is the chosen response the best of four? Six subsets, of which Ties has many right answers.

Rows are those of hub:allenai/reward-bench-2:test: `prompt`, `chosen` and `rejected` (lists of texts), `subset`, `id`.
The point is the first chosen completion's if none scores higher, shared with all that score the same. Ties asks of
prompts with several right answers (`tied:N`) and their variants with one (`ref:N`) that all right ones score higher
than all wrong ones, and that right ones differ less among themselves than from wrong ones. `mean` is that of the six.
(arXiv 2506.01937)
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

SUBSETS = ("Factuality", "Precise IF", "Math", "Safety", "Focus", "Ties")
TIES = SUBSETS.index("Ties")
_WHOLE = 1865
_PARTS = ("preferred", "hard", "margin")  # of a tied prompt beside its variant

add_options = completions.add_options


def run(options: argparse.Namespace) -> Result:
    """Raises SteerjaxError, as `completions.scored_rows`."""
    rows, summary = completions.scored_rows(options, read, _check_once)
    chance = dict.fromkeys(SUBSETS, 0.25) | {"Ties": None, "mean": None}
    return completions.result(
        options, rows, summary, columns(rows), measure, title="RewardBench 2", sections=chance, whole=_WHOLE,
        ties="where the point is shared, as in the official code",
    )  # fmt: skip


def read(row: dict, source: str) -> tuple[dict, list[Conversation]]:
    """The conversations, the chosen first. Raises DataError, which names the key."""
    subset = value_of(row, "subset", str)
    if subset not in SUBSETS:
        raise DataError(f"'{subset}' is no subset of RewardBench 2", "subset", f"one of: {', '.join(SUBSETS)}")
    chosen, rejected = (completions.texts_of(row, key) for key in ("chosen", "rejected"))
    if (said := row.get("num_correct")) is not None and said != len(chosen):
        raise DataError(f"{said}, beside {len(chosen)} chosen completions", "num_correct", "repair or remove the row")
    if subset == "Ties":
        kind, colon, number = value_of(row, "id", str).partition(":")
        if kind not in ("ref", "tied") or not colon or not number.isdecimal():
            raise DataError(f"'{row['id']}' names no prompt of Ties", "id", "ref:NUMBER or tied:NUMBER")
        if kind == "tied" and len(chosen) < 2:
            raise DataError("one right answer, where a tied prompt has several", "chosen", "name it ref:NUMBER")
    prompt = completions.prompt_of(row)
    sides = [completions.completed(prompt, said, "chosen") for said in chosen]
    sides += [completions.completed(prompt, said, "rejected") for said in rejected]
    return {"subset": subset, "num_correct": len(chosen)}, sides


def _check_once(items: Sequence[completions.Item]) -> None:
    """A prompt of Ties that stands twice would be taken for one with the completions of both."""
    first = {}
    for item in items:
        place, name = item.conversations[0], item.kept["id"]
        if item.kept["subset"] == "Ties" and first.setdefault(name, place) is not place:
            twice = f"'{name}' of Ties stands at line {first[name].line}, too"
            raise DataError(twice, "id", "keep one of the two", file=place.file, line=place.line)


def columns(rows: Sequence[dict]) -> Columns:
    """`subset`, its number; `reference`, whether it is a `ref:N` of Ties, which is one unit with `tied:N`; for each
    score (by prefix) `right`, the point, and of a tied prompt with a reference `preferred`, `hard`, `margin`."""
    rows = completions.scored(rows)
    found = {
        UNIT: np.array([f"{row['subset']} {row['id'].removeprefix('ref:').removeprefix('tied:')}" for row in rows]),
        "subset": np.array([SUBSETS.index(row["subset"]) for row in rows], np.int64),
        "reference": np.array([row["subset"] == "Ties" and row["id"].startswith("ref:") for row in rows], bool),
    }
    for prefix, scores in completions.scores_of(rows).items():
        right, equal = np.zeros(len(rows)), np.full(len(rows), np.nan)
        parts, margins = {name: np.full(len(rows), np.nan) for name in _PARTS}, {}
        for place, (row, values) in enumerate(zip(rows, scores, strict=True)):
            if row["subset"] == "Ties":
                chosen, rejected = values[: row["num_correct"]], values[row["num_correct"] :]
                margins[row["id"]] = min(chosen) - max(rejected), max(chosen) - min(chosen), place
                right[place] = min(chosen) > max(rejected)
            else:
                share = 1 / values.count(max(values))
                right[place] = share if values[0] == max(values) else 0.0
                equal[place] = values[0] == max(values) and share < 1
        for name, (gap, spread, place) in margins.items():
            if name.startswith("tied:") and (reference := margins.get(name.replace("tied", "ref"))):
                for part, value in zip(_PARTS, _tied(gap, reference[0], spread), strict=True):
                    parts[part][place] = value
        found |= {f"{prefix}right": right, f"{prefix}equal": equal}
        found |= {f"{prefix}{part}": values for part, values in parts.items()}
    return found


def _tied(gap: float, reference: float, spread: float) -> tuple[bool, bool, float]:
    """`process_single_model` of rewardbench/utils.py at 0.1.5, for one prompt: right answers differ by `spread`, the
    worst of them from the best wrong one by `gap`, in the prompt's variant by `reference`.

    With no spread the margin is 1, -1, or for 0/0 0, and counts in the mean; the package 0.1.4 leaves such a prompt out
    of the mean of margins (weight 0.01) instead.
    """
    least = min(gap, reference)
    margin = np.tanh(least / spread - 1) if spread else np.sign(least)
    return gap > spread, least > spread, float(margin)


def measure(columns: Columns) -> dict[str, tuple[float, int]]:
    """As scripts/run_v2.py, but NaN for a subset without rows, and for Ties without a pair of prompts."""
    found, subset, reference = {}, columns["subset"], columns["reference"]
    counts, ties = np.bincount(subset, minlength=len(SUBSETS)), subset == TIES
    for prefix in completions.prefixes(columns, "right"):
        right = columns[f"{prefix}right"]
        shares = completions.section_means(subset, right, len(SUBSETS))
        parts = [mean_of(right[ties & ~reference])[0], mean_of(right[ties & reference])[0]]
        parts += [mean_of(columns[prefix + part])[0] for part in _PARTS]
        shares[TIES] = np.dot([0.3, 0.3, 0.2, 0.2, 0.01], parts)
        found |= {prefix + name: (float(shares[place]), int(counts[place])) for place, name in enumerate(SUBSETS)}
        found[f"{prefix}mean"] = float(shares.mean()), len(subset)
        found[f"{prefix}equal scores"] = mean_of(columns[f"{prefix}equal"])
    return found
