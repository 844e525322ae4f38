"""Writes a Hugging Face folder that transformers, vLLM and SGLang load.

python -m steerjax.export --checkpoint DIR --output DIR
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from steerjax.errors import ConfigError, DataError, reported_errors
from steerjax.schema import SCHEMAS, parse_label

if TYPE_CHECKING:
    from steerjax.hf.description import ModelDescription


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m steerjax.export", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--checkpoint", required=True, metavar="DIR",
        help="a run's folder (its newest checkpoint), checkpoints/STEP, a Hugging Face folder, or a hub id",
    )  # fmt: skip
    parser.add_argument("--output", required=True, metavar="DIR", type=Path, help="the new folder; must not exist yet")
    parser.add_argument(
        "--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16"),
        help="auto: a folder's own, float32 for a checkpoint",
    )  # fmt: skip
    parser.add_argument("--max-shard-size", default="5GB", metavar="SIZE", help="of a safetensors file; default 5GB")
    parser.add_argument(
        "--template", help="give a plain Hugging Face folder this chat template: extra_id, chatml, llama3 or llama2"
    )
    parser.add_argument("--schema", choices=tuple(SCHEMAS), help="attributes that a plain chat model's template takes")
    parser.add_argument(
        "--default-ratings", metavar="NAME=N,...",
        help="what a chat model is asked for where a request names nothing; '' is no ratings",
    )  # fmt: skip
    return parser.parse_args(arguments)


def export(
    checkpoint: str,
    output: Path,
    *,
    dtype: str,
    max_shard_size: str,
    template: str | None,
    schema: str | None = None,
    default_ratings: str | None = None,
) -> None:
    """Exports a checkpoint, or writes a Hugging Face folder anew.

    Raises:
        SteerjaxError: see `steerjax.hf.export`, or options that do not fit the model.
    """
    from steerjax.bundle.opening import describe_model, locate_model
    from steerjax.bundle.reader import CheckpointReader, is_checkpoint
    from steerjax.hf.config import read_config
    from steerjax.hf.export import architecture_of, checkpoint_tensors, convert_folder, export_model, folder_tensors

    folder = locate_model(checkpoint)
    if template is schema is default_ratings is None and not is_checkpoint(folder):
        convert_folder(folder, output, dtype=dtype, max_shard_size=max_shard_size)
        return
    description = _steered(describe_model(checkpoint, template=template), schema, default_ratings)
    if is_checkpoint(folder):
        stored = checkpoint_tensors(description, CheckpointReader(folder))
    else:
        stored = folder_tensors(folder, read_config(folder), architecture_of(description))
    export_model(
        description, stored, output, dtype=dtype, max_shard_size=max_shard_size, evaluation=_metrics(folder)
    )  # fmt: skip


def _steered(description: ModelDescription, schema: str | None, default_ratings: str | None) -> ModelDescription:
    """The chat model with the attributes and default ratings that the user names."""
    if schema is default_ratings is None:
        return description
    if description.kind != "chat":
        raise ConfigError("--schema and --default-ratings steer a chat model, and this one rates; cure: leave them out")
    attributes = SCHEMAS[schema] if schema else description.schema
    if attributes is None:
        raise ConfigError("--default-ratings of a model without attributes; cure: name them with --schema")
    if description.schema not in (None, attributes):
        raise ConfigError(f"the model has attributes of its own, not those of {schema}; cure: leave --schema out")
    description = dataclasses.replace(description, schema=attributes)
    if default_ratings is None:
        return description
    try:
        ratings = parse_label(default_ratings.replace("=", ":"), attributes)
    except DataError as error:
        raise ConfigError(f"--default-ratings {default_ratings}: {error}") from None
    return dataclasses.replace(description, default_ratings=ratings)


def _metrics(checkpoint: Path) -> dict[str, dict[str, float]] | None:
    """Attribute -> metric -> value of the evaluation at the checkpoint's step, where the run's metrics say it."""
    from steerjax.training.metrics import read_metrics

    file = checkpoint.absolute().parent.parent / "metrics.jsonl"
    if not checkpoint.name.isdigit() or not file.is_file():
        return None
    found: dict[str, dict[str, float]] = {}
    for record in read_metrics(file):
        if record["step"] == int(checkpoint.name) and record["split"] == "validation":
            for key, value in record.items():
                if key.startswith("attributes/"):
                    _, name, metric = key.split("/")
                    found.setdefault(name, {})[metric] = value
    return found or None


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse_arguments(arguments)
    with reported_errors():
        export(
            options.checkpoint, options.output, dtype=options.dtype, max_shard_size=options.max_shard_size,
            template=options.template, schema=options.schema, default_ratings=options.default_ratings,
        )  # fmt: skip
    print(f"wrote {options.output}")


if __name__ == "__main__":
    main()
