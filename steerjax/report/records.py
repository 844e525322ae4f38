"""The JSON files of a run and of an evaluation: metrics.jsonl read, results.json written."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

from steerjax.errors import DataError
from steerjax.files import write_text


def read_metrics(path: Path) -> list[dict]:
    """The records of a metrics.jsonl; a last line that a killed process left half written is dropped."""
    records = []
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n")[:-1] if path.exists() else (), start=1):
        try:
            records.append(json.loads(line))
        except ValueError as error:
            raise DataError(f"broken JSON: {error}", file=str(path), line=number, cure="delete the line") from None
    return records


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
