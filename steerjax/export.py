"""Writes a Hugging Face folder that transformers, vLLM and SGLang load.

steerjax export --checkpoint DIR --output DIR
"""

from __future__ import annotations

import argparse
import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from steerjax.errors import ConfigError, DataError, reported_errors
from steerjax.schema import SCHEMAS, Schema, parse_label, schema_from_json

if TYPE_CHECKING:
    from steerjax.hf.description import Description


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="steerjax export", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--checkpoint", required=True, metavar="DIR",
        help="a run's folder (its newest checkpoint), checkpoints/STEP, a Hugging Face folder, or hub id")  # fmt: skip
    add("--output", required=True, metavar="DIR", type=Path, help="the new folder; must not exist yet")
    add("--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16"),
        help="auto: a folder's own, float32 for a checkpoint")  # fmt: skip
    add("--max-shard-size", default="5GB", metavar="SIZE", help="of a safetensors file; default 5GB")
    add("--template", help="give a plain Hugging Face folder this chat template: extra_id, chatml, llama3 or llama2")
    own = parser.add_mutually_exclusive_group()
    own.add_argument("--schema", choices=tuple(SCHEMAS), help="attributes that a plain chat model's template takes")
    own.add_argument("--attributes", metavar="NAME:LOW..HIGH,...", help="the same, attributes of your own")
    add("--default-ratings", metavar="NAME=N,...",
        help="what a chat model is asked for where a request names nothing; '' is no ratings")  # fmt: skip
    return parser.parse_args(arguments)


def export(
    checkpoint: str,
    output: Path,
    *,
    dtype: str = "auto",
    max_shard_size: str = "5GB",
    template: str | None = None,
    schema: Schema | None = None,
    default_ratings: str | None = None,
) -> None:
    """Exports a checkpoint, or writes a Hugging Face folder anew.

    Args:
        template, schema, default_ratings: for a plain chat model, which gets our chat template by them.

    Raises:
        SteerjaxError: see `steerjax.hf.export`, or options that do not fit the model.
    """
    from steerjax.bundle import describe, locate
    from steerjax.bundle.reader import is_checkpoint, open_reader
    from steerjax.hf.export import convert_folder, export_model

    folder, sizes = locate(checkpoint), {"dtype": dtype, "max_shard_size": max_shard_size}
    if template is schema is default_ratings is None and not is_checkpoint(folder):
        convert_folder(folder, output, **sizes)
        return
    description = _steered(describe(checkpoint, template=template), schema, default_ratings)
    evaluation = _metrics(folder) if is_checkpoint(folder) else None
    export_model(description, open_reader(folder), output, evaluation=evaluation, **sizes)


def _steered(description: Description, schema: Schema | None, default_ratings: str | None) -> Description:
    """The chat model with the attributes and default ratings that the user names."""
    if schema is default_ratings is None:
        return description
    if description.kind != "chat":
        raise ConfigError(
            "--schema, --attributes and --default-ratings steer a chat model, and this one rates; cure: leave them out"
        )
    if schema is None and description.schema is None:
        raise ConfigError(
            "--default-ratings of a model without attributes; cure: name them with --schema or --attributes"
        )
    if None not in (schema, description.schema) and schema != description.schema:
        raise ConfigError("the model has attributes of its own; cure: leave --schema and --attributes out")
    description = dataclasses.replace(description, schema=schema or description.schema)
    if default_ratings is None:
        return description
    try:
        ratings = parse_label(default_ratings.replace("=", ":"), description.schema)
    except DataError as error:
        raise ConfigError(f"--default-ratings {default_ratings}: {error}") from None
    return dataclasses.replace(description, default_ratings=ratings)


def parse_schema(text: str) -> Schema:
    """`wit:1..5,depth:1..10` as attributes with these ranges.

    Raises:
        ConfigError: it is not of that form, a range holds no whole number, or a name stands twice.
    """
    entries = []
    for entry in text.split(","):
        found = re.fullmatch(r"\s*([\w.-]+):(-?\d+(?:\.\d+)?)\.\.(-?\d+(?:\.\d+)?)\s*", entry)
        if not found:
            raise ConfigError(f"--attributes: '{entry}'; cure: NAME:LOW..HIGH with commas between, e.g. wit:1..5")
        entries.append({"name": found[1], "low": float(found[2]), "high": float(found[3])})
    return schema_from_json(entries, "--attributes", ConfigError)


def _metrics(checkpoint: Path) -> dict[str, dict[str, float]] | None:
    """Attribute -> metric -> value of the evaluation at the checkpoint's step, where the run's metrics say it."""
    from steerjax.report.records import read_metrics

    found: dict[str, dict[str, float]] = {}
    for record in read_metrics(checkpoint.absolute().parent.parent / "metrics.jsonl"):
        if str(record["step"]) == checkpoint.name and record["split"] == "validation":
            for key, value in record.items():
                if key.startswith("attributes/"):
                    _, name, metric = key.split("/")
                    found.setdefault(name, {})[metric] = value
    return found or None


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse_arguments(arguments)
    with reported_errors():
        schema = parse_schema(options.attributes) if options.attributes else SCHEMAS.get(options.schema)
        export(
            options.checkpoint, options.output, dtype=options.dtype, max_shard_size=options.max_shard_size,
            template=options.template, schema=schema, default_ratings=options.default_ratings,
        )  # fmt: skip
    print(f"wrote {options.output}")


if __name__ == "__main__":
    main()
