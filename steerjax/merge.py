"""One model of several, as a Hugging Face folder.

steerjax merge MODEL MODEL ... --output DIR              their average
steerjax merge WEAK STRONG --factor 1.52 --output DIR    ExPO: weak + factor * (strong - weak)

Models are runs, checkpoints or Hugging Face folders of one architecture and recipe. Averages and extrapolations are of
parameters, slice by slice, so that no model is whole in memory. ExPO: arXiv 2404.16792; HelpSteer2-Preference, arXiv
2410.01257, extrapolates its reward model so, with 1.52.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path

from steerjax.command import add_verify_option, describe_model
from steerjax.errors import ConfigError, reported_errors


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="steerjax merge", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("models", nargs="+", metavar="MODEL", help="two or more; for --factor the weak, then the strong one")
    add("--output", required=True, metavar="DIR", type=Path, help="the new folder; must not exist yet")
    add("--factor", type=float, metavar="F", help="of the step from the first of two models to the second")
    add("--weights", metavar="W,...", help="one a model, in place of equal ones; they add up to 1")
    add("--dtype", default="float32", choices=("float32", "bfloat16", "float16"), help="of what is written")
    add("--max-shard-size", default="5GB", metavar="SIZE", help="of a safetensors file; default 5GB")
    add("--template", help="of Hugging Face folders that do not name it")
    add_verify_option(parser)
    options = parser.parse_args(arguments)
    with reported_errors():
        merge(options)
    print(f"wrote {options.output}")


def merge(o: argparse.Namespace) -> None:
    """Raises SteerjaxError: weights that make no model, or models that are not of one kind."""
    from steerjax.bundle.reader import open_reader
    from steerjax.hf.export import export_model
    from steerjax.hf.lora import folded
    from steerjax.hf.merge import MergedReader, check_mergeable

    weights = merge_weights(len(o.models), o.factor, o.weights)
    found = [describe_model(model, o) for model in o.models]
    models, readers = zip(*(folded(model, open_reader(model.path)) for model in found), strict=True)
    check_mergeable(models, readers)
    merged = {"merged": {str(model.path): weight for model, weight in zip(models, weights, strict=True)}}
    about = dataclasses.replace(models[-1], provenance={**models[-1].provenance, **merged})
    export_model(about, MergedReader(readers, weights), o.output, dtype=o.dtype, max_shard_size=o.max_shard_size)


def merge_weights(count: int, factor: float | None, weights: str | None) -> list[float]:
    """Of each of `count` models. Raises ConfigError: not as many numbers, or they do not add up to 1."""
    if count < 2 or (factor is not None and (count != 2 or weights)):
        raise ConfigError("merge needs two models or more, and --factor two and no --weights; cure: name them")
    if factor is not None:
        return [1 - factor, factor]
    try:
        found = [float(weight) for weight in weights.split(",")] if weights else [1 / count] * count
    except ValueError as error:
        raise ConfigError(f"--weights {weights}: {error}; cure: numbers with commas, one a model") from None
    if len(found) != count or abs(sum(found) - 1) > 1e-6:
        cure = f"{count} that do, e.g. {','.join([f'{1 / count:.3g}'] * count)}"
        raise ConfigError(f"--weights {weights} are {len(found)} that add up to {sum(found):g}; cure: {cure}")
    return found


if __name__ == "__main__":
    main()
