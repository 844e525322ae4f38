"""Writes a Hugging Face folder that transformers, vLLM and SGLang load.

steerjax export --checkpoint DIR --output DIR
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path

from steerjax.command import add_verify_option
from steerjax.errors import ConfigError, DataError, reported_errors
from steerjax.schema import SCHEMAS, parse_label, parse_scalar


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="steerjax export", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--checkpoint", required=True, metavar="DIR",
        help="a run's folder (its newest checkpoint), checkpoints/STEP, a Hugging Face folder, or hub id")  # fmt: skip
    add("--output", required=True, metavar="DIR", type=Path, help="the new folder; must not exist yet")
    add("--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16"),
        help="auto: as it is stored")  # fmt: skip
    add("--max-shard-size", default="5GB", metavar="SIZE", help="of a safetensors file; default 5GB")
    add("--scalar", metavar="NAME|NAME=W,...",
        help="of a reward model: one score, the weighted sum of its attributes; goodness, llama3_70b, ...")  # fmt: skip
    add("--adapter", action="store_true", help="of a model with adapters: PEFT's adapter, in place of merged weights")
    add(
        "--template",
        help="for a plain Hugging Face folder: extra_id, chatml, llama3, llama2, or source (its own)",
    )
    add("--schema", choices=tuple(SCHEMAS), help="attributes that a plain chat model's template takes")
    add("--default-ratings", metavar="NAME=N,...",
        help="what a chat model is asked for where a request names nothing; '' is no ratings")  # fmt: skip
    add("--evaluation", action="append", default=[], metavar="DIR", type=Path,
        help="an output of evaluate of this model, for the card's model-index; repeatable")  # fmt: skip
    add_verify_option(parser)
    return parser.parse_args(arguments)


def export(
    checkpoint: str,
    output: Path,
    *,
    dtype: str = "auto",
    max_shard_size: str = "5GB",
    scalar: str | None = None,
    adapter: bool = False,
    template: str | None = None,
    schema: str | None = None,
    default_ratings: str | None = None,
    evaluation: Sequence[Path] = (),
    verify: bool = True,
) -> None:
    """Exports a checkpoint, or writes a Hugging Face folder anew.

    The card's `model-index` has the run's last validation and what the folders of `evaluation` say.
    `scalar` makes one score of a reward model's attributes.
    `template`, `schema` and `default_ratings` are for a plain chat model, which gets our chat template by them.
    `verify`: as `steerjax.bundle.locate`.
    Raises SteerjaxError: see `steerjax.hf.export`, or options that do not fit the model.
    """
    from steerjax.bundle import describe, locate
    from steerjax.bundle.reader import is_checkpoint, open_reader
    from steerjax.evaluation.model_index import suite_results, validation_results
    from steerjax.hf.adapter import is_adapter
    from steerjax.hf.export import convert_folder, export_model
    from steerjax.hf.lora import folded
    from steerjax.hf.scalar import ScalarReader, scalar_description

    folder, sizes = locate(checkpoint, verify=verify), {"dtype": dtype, "max_shard_size": max_shard_size}
    plain = not (adapter or is_checkpoint(folder) or is_adapter(folder))
    if plain and template is schema is default_ratings is scalar is None:
        if evaluation:
            raise ConfigError(
                "--evaluation of a folder whose card is kept as it is; cure: --template, which writes one"
            )
        convert_folder(folder, output, **sizes)
        return
    # It is verified; and a folder's provenance has the name that the user gave it.
    about = describe(folder if is_checkpoint(folder) else checkpoint, template=template, verify=False)
    about = _with_ratings(about, schema, default_ratings)
    results = validation_results(folder, about.provenance) if is_checkpoint(folder) and scalar is None else []
    results += [result for output in evaluation for result in suite_results(output, folder)]
    metrics, reader = _metrics(folder) if is_checkpoint(folder) else None, open_reader(folder)
    if not adapter:
        about, reader = folded(about, reader)
    if adapter and (scalar is not None or _kept_layers(about)):
        raise ConfigError(
            "--adapter with --scalar, or of a model cut by config.model.keep_layers; cure: merged weights"
        )
    if scalar is not None:
        if about.kind != "reward" or about.schema is None:
            raise ConfigError("--scalar is for a reward model that says what it rates; cure: leave it out")
        name, weights = parse_scalar(scalar, about.schema)
        reader = ScalarReader(reader, about.schema, weights)
        about, metrics = scalar_description(about, name, weights), None
    export_model(about, reader, output, evaluation=metrics, results=results, adapter=adapter, **sizes)


def _with_ratings(about, schema: str | None, default_ratings: str | None):
    """The description with these attributes and default ratings. Raises ConfigError: the model takes no such ones."""
    if not schema and default_ratings is None:
        return about
    own = about.schema or SCHEMAS.get(schema)
    if about.kind != "chat" or (schema and own != SCHEMAS[schema]):
        raise ConfigError(
            "--schema is for a chat model that names no attributes, --default-ratings for any chat model; "
            "cure: leave them out"
        )
    if own is None:
        raise ConfigError("--default-ratings of a model without attributes; cure: name them with --schema")
    if default_ratings is None:
        return dataclasses.replace(about, schema=own)
    try:
        ratings = parse_label(default_ratings.replace("=", ":"), own)
    except DataError as error:
        raise ConfigError(f"--default-ratings {default_ratings}: {error}") from None
    return dataclasses.replace(about, schema=own, default_ratings=ratings)


def _kept_layers(about) -> int:
    return about.provenance.get("config", {}).get("model", {}).get("keep_layers", 0)


def _metrics(checkpoint: Path) -> dict[str, dict[str, float]] | None:
    """Attribute -> metric -> value of the evaluation at the checkpoint's step, where the run's metrics say it."""
    from steerjax.report.records import validation_records

    found: dict[str, dict[str, float]] = {}
    for record in validation_records(checkpoint):
        for key in (key for key, value in record.items() if key.startswith("attributes/") and value is not None):
            _, name, metric = key.split("/")
            found.setdefault(name, {})[metric] = record[key]
    return found or None


def main(arguments: Sequence[str] | None = None) -> None:
    options = vars(parse_arguments(arguments))
    options["verify"] = not options.pop("no_verify")
    with reported_errors():
        export(options.pop("checkpoint"), output := options.pop("output"), **options)
    print(f"wrote {output}")


if __name__ == "__main__":
    main()
