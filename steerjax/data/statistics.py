"""What a data set holds: counts, and mean, spread and correlation of its ratings.

As in Table 2 of HelpSteer, arXiv 2311.09528.
"""

from __future__ import annotations

from array import array
from collections import Counter

import numpy as np

from steerjax.data.conversation import Conversation
from steerjax.data.preferences import STRONGEST, Preference
from steerjax.schema import Schema

CHARACTERS = "characters"


class ConversationStatistics:
    """Collects conversations one by one; keeps the ratings and lengths of assistant turns, not the texts."""

    def __init__(self, schema: Schema):
        self._names = (*schema.names, CHARACTERS)
        self._rows = self._turns = self._rated = 0
        self._values = array("d")  # [assistant turns, attributes and length], NaN where not rated

    def add(self, conversation: Conversation) -> None:
        self._rows += 1
        for turn in conversation.turns:
            self._turns += 1
            if turn.role == "assistant":
                ratings = turn.ratings or {}
                self._rated += bool(ratings)
                self._values.extend(ratings.get(name, np.nan) for name in self._names[:-1])
                self._values.append(len(turn.content))

    def to_json(self) -> dict:
        """Counts, and per attribute that is rated (and for `characters`, the length of an assistant turn): `count`,
        `mean`, `std` (of the population), `pearson` with `reference`: helpfulness, or quality where nothing has it.
        `pearson` is over turns that have both; null where it is not defined."""
        values = np.array(self._values).reshape(-1, len(self._names))
        rated = [name for name, column in zip(self._names, values.T, strict=True) if not np.isnan(column).all()]
        reference = next((name for name in ("helpfulness", "quality") if name in rated), None)
        columns = dict(zip(self._names, values.T, strict=True))
        return {
            "rows": self._rows,
            "turns": self._turns,
            "assistant_turns": len(values),
            "rated_turns": self._rated,
            "reference": reference,
            "values": {name: _summary(columns[name], columns.get(reference)) for name in rated},
        }


class PreferenceStatistics:
    """Collects preferences one by one; the same interface as `ConversationStatistics`."""

    def __init__(self):
        self._rows = self._turns = 0
        self._strengths: Counter[int] = Counter()
        self._lengths = array("d")

    def add(self, preference: Preference) -> None:
        self._rows += 1
        self._turns += len(preference.turns)
        self._strengths[preference.preference] += 1
        self._lengths.extend(len(response) for response in preference.responses)

    def to_json(self) -> dict:
        """Counts, pairs by preference, and the length of a response."""
        return {
            "rows": self._rows,
            "prompt_turns": self._turns,
            "preferences": {str(k): self._strengths[k] for k in range(-STRONGEST, STRONGEST + 1)},
            "reference": None,
            "values": {CHARACTERS: _summary(np.array(self._lengths), None)},
        }


def _summary(column: np.ndarray, reference: np.ndarray | None) -> dict:
    present = column[~np.isnan(column)]
    pearson = None
    if reference is not None:
        both = ~np.isnan(column) & ~np.isnan(reference)
        x, y = column[both], reference[both]
        if both.any() and np.ptp(x) > 0 and np.ptp(y) > 0:
            pearson = float(np.corrcoef(x, y)[0, 1])
    return {"count": len(present), "mean": float(present.mean()), "std": float(present.std()), "pearson": pearson}


def format_statistics(statistics: dict) -> str:
    """The result of `to_json` as plain text: the counts on a line each, then the table of values."""
    counts = []
    for name, value in statistics.items():
        if isinstance(value, dict) and name != "values":
            value = ", ".join(f"{key}: {count}" for key, count in value.items()) or "none"
        if name not in ("values", "reference"):
            counts.append([name.replace("_", " "), str(value)])
    reference = statistics["reference"]
    header = ["", "count", "mean", "std", *([f"r with {reference}"] if reference else [])]
    table = [header]
    for name, value in statistics["values"].items():
        pearson = "-" if value["pearson"] is None else f"{value['pearson']:.4f}"
        numbers = [str(value["count"]), f"{value['mean']:.4f}", f"{value['std']:.4f}", pearson]
        table.append([name, *numbers[: len(header) - 1]])
    return "\n".join([*_aligned(counts, right=False), "", *_aligned(table, right=True)])


def _aligned(rows: list[list[str]], right: bool) -> list[str]:
    """Columns of one width; all but the first go to the right where asked."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.rjust(width) if right and i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
