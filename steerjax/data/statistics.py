"""What a data set holds: counts, and mean, spread and correlation of its ratings.

As in Table 2 of HelpSteer, arXiv 2311.09528.
"""

from array import array

import numpy as np

from steerjax.data.conversation import Conversation
from steerjax.schema import Schema


class Statistics:
    """Collects conversations one by one; keeps the ratings and lengths of assistant turns, not the texts.

    A message that several threads share (`Turn.id`) counts once.
    """

    def __init__(self, schema: Schema):
        self._names = (*schema.names, "characters")
        self._rows = self._turns = self._rated = 0
        self._values = array("d")  # [assistant turns, attributes and length], NaN where not rated
        self._seen: set[tuple[str, int]] = set()  # id and content's hash: people number the turns of a row, too

    def add(self, conversation: Conversation) -> None:
        self._rows += 1
        for turn in conversation.turns:
            message = (turn.id, hash(turn.content))
            if turn.id and message in self._seen:
                continue
            self._seen.add(message)
            self._turns += 1
            if turn.role == "assistant":
                ratings = turn.ratings or {}
                self._rated += bool(ratings)
                self._values.extend([*(ratings.get(name, np.nan) for name in self._names[:-1]), len(turn.content)])

    def to_json(self) -> dict:
        """Counts, and per attribute that is rated (and for `characters`, the length of an assistant turn): `count`,
        `mean`, `std` (of the population), and `pearson` with `reference`: helpfulness, or the first attribute that is
        rated. `pearson` is over turns that have both; null where it is not defined."""
        values = np.array(self._values).reshape(-1, len(self._names))
        columns = {n: x for n, x in zip(self._names, values.T, strict=True) if not np.isnan(x).all()}
        rated = [name for name in columns if name != "characters"]
        reference = "helpfulness" if "helpfulness" in rated else next(iter(rated), None)
        return {
            "rows": self._rows, "turns": self._turns, "assistant_turns": len(values), "rated_turns": self._rated,
            "reference": reference, "values": {n: _summary(x, columns.get(reference)) for n, x in columns.items()},
        }  # fmt: skip


def _summary(column: np.ndarray, reference: np.ndarray | None) -> dict:
    present, pearson = ~np.isnan(column), None
    if reference is not None:
        x, y = np.stack([column, reference])[:, present & ~np.isnan(reference)]
        if len(x) and np.ptp(x) > 0 and np.ptp(y) > 0:
            pearson = float(np.corrcoef(x, y)[0, 1])
    column = column[present]
    return {"count": len(column), "mean": float(column.mean()), "std": float(column.std()), "pearson": pearson}


def format_statistics(statistics: dict) -> str:
    """The result of `to_json` as plain text: the counts on a line each, then the table of values."""
    lines = []
    for name, value in statistics.items():
        if isinstance(value, dict):
            value = ", ".join(f"{key}: {count}" for key, count in value.items()) or "none"
        if name not in ("values", "reference"):
            lines.append(f"{name.replace('_', ' '):15}  {value}")
    title = f"r with {statistics['reference']}" if statistics["reference"] else ""
    width = max(map(len, ("", *statistics["values"])))
    lines += ["", f"{'':{width}}  {'count':>7}  {'mean':>10}  {'std':>10}  {title}"]
    for name, value in statistics["values"].items():
        r = "-" if value["pearson"] is None else f"{value['pearson']:.4f}"
        row = f"{name:{width}}  {value['count']:7}  {value['mean']:10.4f}  {value['std']:10.4f}"
        lines.append(f"{row}  {r:>{len(title)}}" if title else row)
    return "\n".join(map(str.rstrip, lines))
