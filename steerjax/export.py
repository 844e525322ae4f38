"""Writes a Hugging Face folder that transformers, vLLM and SGLang load.

python -m steerjax.export --checkpoint DIR --output DIR
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from steerjax.errors import SteerjaxError


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
    return parser.parse_args(arguments)


def export(checkpoint: str, output: Path, *, dtype: str, max_shard_size: str, template: str | None) -> None:
    """Exports a checkpoint, or writes a Hugging Face folder anew.

    Raises:
        SteerjaxError: see `steerjax.hf.export`.
    """
    from steerjax.checkpoints.opening import describe_model, locate_model
    from steerjax.checkpoints.reader import CheckpointReader, is_checkpoint
    from steerjax.hf.config import read_config
    from steerjax.hf.export import architecture_of, checkpoint_tensors, convert_folder, export_model, folder_tensors

    folder = locate_model(checkpoint)
    if template is None and not is_checkpoint(folder):
        convert_folder(folder, output, dtype=dtype, max_shard_size=max_shard_size)
        return
    description = describe_model(checkpoint, template=template)
    if is_checkpoint(folder):
        stored = checkpoint_tensors(description, CheckpointReader(folder))
    else:
        stored = folder_tensors(folder, read_config(folder), architecture_of(description))
    export_model(
        description, stored, output, dtype=dtype, max_shard_size=max_shard_size, evaluation=_metrics(folder)
    )  # fmt: skip


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
    try:
        export(
            options.checkpoint, options.output, dtype=options.dtype, max_shard_size=options.max_shard_size,
            template=options.template,
        )  # fmt: skip
    except SteerjaxError as error:
        sys.exit(f"error: {error}")
    print(f"wrote {options.output}")


if __name__ == "__main__":
    main()
