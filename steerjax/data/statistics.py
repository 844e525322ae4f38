"""What a data set holds: counts, and mean and spread of its ratings, as in Table 2 of HelpSteer, arXiv 2311.09528."""

from collections.abc import Iterable

import numpy as np

from steerjax.data.conversation import Conversation
from steerjax.schema import Schema


def statistics_of(conversations: Iterable[Conversation], schema: Schema) -> dict:
    """`rows`, `turns`, `assistant_turns`, `rated_turns`, and `values`: `count`, `mean` and `std` (of the population) of
    each attribute that is rated, and of `characters`, the length of an assistant turn.

    A message that several threads share (`Conversation.messages`) counts once.
    """
    rows = turns = 0
    answers: list[tuple[dict, int]] = []  # ratings and length
    seen: set[tuple[str, int] | None] = set()
    for conversation in conversations:
        rows += 1
        for turn, message in zip(conversation.turns, conversation.messages(), strict=True):
            if message and message in seen:
                continue
            seen.add(message)
            turns += 1
            if turn.role == "assistant":
                answers.append((turn.ratings or {}, len(turn.content)))
    columns = {name: [ratings[name] for ratings, _ in answers if name in ratings] for name in schema.names}
    columns["characters"] = [length for _, length in answers]
    return {
        "rows": rows, "turns": turns, "assistant_turns": len(answers), "rated_turns": sum(bool(r) for r, _ in answers),
        "values": {
            name: {"count": len(values), "mean": float(np.mean(values)), "std": float(np.std(values))}
            for name, values in columns.items() if values
        },
    }  # fmt: skip


def format_statistics(statistics: dict) -> str:
    """Counts, one a line, then the table of `values`."""
    lines = []
    for name, value in statistics.items():
        if isinstance(value, dict):
            value = ", ".join(f"{key}: {count}" for key, count in value.items()) or "none"
        if name != "values":
            lines.append(f"{name.replace('_', ' '):15}  {value}")
    values = statistics["values"]
    width = max(map(len, values), default=0)
    lines += ["", f"{'':{width}}  {'count':>7}  {'mean':>10}  {'std':>10}"]
    lines += [f"{n:{width}}  {v['count']:7}  {v['mean']:10.4f}  {v['std']:10.4f}" for n, v in values.items()]
    return "\n".join(lines)
