"""The JSON files of a run and of an evaluation: metrics.jsonl read, results.json written."""

import json
from pathlib import Path

from steerjax.errors import DataError


def read_metrics(path: Path) -> list[dict]:
    """The records of a metrics.jsonl; a last line that a killed process left half written is dropped."""
    records = []
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n")[:-1] if path.exists() else (), start=1):
        try:
            records.append(json.loads(line))
        except ValueError as error:
            raise DataError(f"broken JSON: {error}", file=str(path), line=number, cure="delete the line") from None
    return records


def write_json(path: Path, value: dict) -> None:
    """Writes plain data; a number that is not finite is null."""
    finite = json.loads(json.dumps(value), parse_constant=lambda _: None)
    path.write_text(json.dumps(finite, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
