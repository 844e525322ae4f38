"""The JSON files of a run and of an evaluation: metrics.jsonl read, results.json written."""

import json
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

from steerjax.checksums import without_own
from steerjax.files import write_text


def read_metrics(path: Path) -> list[dict]:
    """The records of a metrics.jsonl; lines that are none are left out, and said but for a half last one.

    A damaged line must not stop a run whose checkpoints are whole.
    """
    records, wrong = [], []
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1] if path.exists() else (), start=1):
        try:
            records.append(_record(line))
        except (ValueError, RecursionError):
            wrong.append(number)
    if wrong:
        print(f"{path}:{wrong[0]}: {len(wrong)} lines that are no records are left out", file=sys.stderr)
    return records


def validation_records(checkpoint: Path) -> list[dict]:
    """Of the validations at the step of `checkpoints/STEP`, where the run's metrics.jsonl has them."""
    records = read_metrics(checkpoint.absolute().parent.parent / "metrics.jsonl")
    return [each for each in records if (str(each["step"]), each["split"]) == (checkpoint.name, "validation")]


def _record(line: bytes) -> dict:
    """Raises ValueError: no JSON object with a step, a split, and numbers or null; or not as it was written."""
    record = json.loads(line.decode())
    if not (isinstance(record, dict) and type(record.get("step")) is int and isinstance(record.get("split"), str)):
        raise ValueError
    record = without_own(record)
    for key, value in record.items():
        if key != "split" and value is not None and (type(value) not in (int, float) or abs(value) > 1e308):
            raise ValueError
    return record


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
