"""The counts of the suite as tables: on the terminal, in benchmarks/results/faults.json and docs/reliability.md.

python -m tests.faults.table
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from steerjax.files import write_text

REPOSITORY = Path(__file__).resolve().parent.parent.parent
RESULTS = REPOSITORY / "benchmarks" / "results" / "faults.json"
PAGE = REPOSITORY / "docs" / "reliability.md"
BEGIN, END = "<!-- tests/faults/table.py -->\n", "<!-- end -->\n"
Row = Sequence  # door, kind, tried, failed

# What is promised, the file of the test that holds it, and the doors whose counts say how often it was tried.
PROMISES: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("A run that is killed goes on to the bits of one that is not", "test_kills.py", ("run killed",)),
    (
        "So does any command that is killed before any one thing that it does to a file, and once more as it goes on",
        "test_every_moment.py",
        ("killed at every moment",),
    ),
    ("A run that is asked to stop goes on to the same bits", "test_kills.py", ("run stopped",)),
    ("Of two starts in one folder one is refused, and neither is damaged", "test_double_starts.py", ("double start",)),
    (
        "Any value of any key of a config works or is refused by name",
        "test_config_fuzz.py",
        ("config",),
    ),
    ("Any flag works or is refused in one sentence", "test_config_fuzz.py", ("flag",)),
    ("Any model folder opens as it is meant or is refused with file and key", "test_folder_fuzz.py", ("model folder",)),
    ("No NaN or infinity reaches a rating, a report or a checkpoint", "test_numbers.py", ("number",)),
    (
        "One of four processes that fails is named within 60 s, all end, and the run goes on to the same bits",
        "test_four_processes.py",
        ("one of four processes",),
    ),
    ("A full disk loses no checkpoint, and the run goes on to the same bits", "test_machine.py", ("full disk",)),
    ("What cannot be written is one sentence, and leaves nothing half", "test_machine.py", ("output refused",)),
    (
        "A command that is asked to end goes on to the same output, and leaves nothing half",
        "test_interrupted_commands.py",
        ("command interrupted",),
    ),
    ("Any name in a path works or is refused at the door", "test_names.py", ("name in a path",)),
    (
        "No damage to a file that we write is believed: an older checkpoint, or one sentence, or no effect by design",
        "test_damage.py",
        ("damage",),
    ),
    ("What is damaged ends the commands themselves so", "test_damage.py", ("damage, the command itself",)),
    ("Any row or file of data is used as it is meant, or refused by its place", "test_readers_fuzz.py", ("row read",)),
    (
        "No text of a conversation becomes a control token or spells one, with any tokenizer",
        "test_text_stays_text.py",
        ("conversation rendered",),
    ),
    (
        "Nor does one that a stock server renders with an exported template and tokenizer",
        "test_template_fuzz.py",
        ("template call",),
    ),
    ("Any answer of a server is used or refused by its reason, soon", "test_server_answers.py", ("server answer",)),
    ("Memory and descriptors stay level", "test_leaks.py", ("steps trained", "rows annotated")),
)


def text(rows: Iterable[Row]) -> str:
    """Rows with aligned columns."""
    lines = [("door", "kind", "tried", "failed"), *((d, k, f"{n:,}", f"{f:,}") for d, k, n, f in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(4)]
    return "\n".join(f"{a:<{widths[0]}}  {b:<{widths[1]}}  {c:>{widths[2]}}  {d:>{widths[3]}}" for a, b, c, d in lines)


def merge(path: Path, rows: Iterable[Row]) -> None:
    """Puts the rows into the results, in place of those of the same door and kind."""
    known = {(door, kind): (tried, failed) for door, kind, tried, failed in read(path)}
    known |= {(door, kind): (tried, failed) for door, kind, tried, failed in rows}
    write_text(path, json.dumps([[*key, *known[key]] for key in sorted(known)], indent=1) + "\n")


def read(path: Path = RESULTS) -> list[Row]:
    return json.loads(path.read_text()) if path.exists() else []


def table_text() -> str:
    """One line for each promise that was tried."""
    lines = ["| promise | held by | tried | failed |", "|---|---|---|---|"]
    for promise, test, doors in PROMISES:
        rows = [row for row in read() if row[0] in doors]
        if rows:
            counts = (f"{sum(row[column] for row in rows):,}" for column in (2, 3))
            lines.append(f"| {promise} | [{test}](../tests/faults/{test}) | {' | '.join(counts)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    before, _, rest = PAGE.read_text().partition(BEGIN)
    write_text(PAGE, before + BEGIN + table_text() + END + rest.partition(END)[2])


if __name__ == "__main__":
    main()
