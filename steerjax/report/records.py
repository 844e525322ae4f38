"""The JSON files of a run and of an evaluation: metrics.jsonl read, results.json written."""

import contextlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

from steerjax.files import write_text


def read_metrics(path: Path) -> list[dict]:
    """The records of a metrics.jsonl; damaged lines are left out."""
    return [record for record in metrics_lines(path) if record]


def metrics_lines(path: Path) -> list[dict | None]:
    """The records of a metrics.jsonl, with None for a line that is none, as a damaged file has.

    What a killed process left half written, at the end, is no line.
    """
    text = path.read_bytes().decode("utf-8", errors="replace") if path.is_file() else ""
    return [_record(line) for line in text.split("\n")[:-1]]


def _record(line: str) -> dict | None:
    with contextlib.suppress(ValueError, KeyError, AttributeError, RecursionError):
        record = json.loads(line)
        numbers = [value for key, value in record.items() if key != "split" and value is not None]
        finite = all(type(value) in (int, float) and abs(value) < 1e300 for value in numbers)
        if finite and type(record["step"]) is int and type(record["split"]) is str:
            return record
    return None


def own_losses(records: Iterable[Mapping], objective: str, weight: float = 1.0) -> dict[str, np.ndarray]:
    """Split -> steps and losses [n, 2] of one objective, without its weight.

    `loss` of metrics.jsonl is the sum over objectives, each with its weight. A run of several objectives has each
    one's own beside it; a lone objective's is divided by its weight.
    """
    records, key = list(records), f"{objective}/loss"
    if not any(key in record for record in records):
        key = "loss"
    over = weight if key == "loss" else 1.0
    found: dict[str, list] = {"train": [], "validation": []}
    for record in records:
        if record.get(key) is not None and record["split"] in found and over:
            found[record["split"]].append((record["step"], record[key] / over))
    return {split: np.array(points, np.float64).reshape(-1, 2) for split, points in found.items()}


def write_json(path: Path, value: dict) -> None:
    """Writes plain data; a number that is not finite is null."""
    finite = json.loads(json.dumps(value), parse_constant=lambda _: None)
    write_text(path, json.dumps(finite, indent=2, ensure_ascii=False) + "\n")
