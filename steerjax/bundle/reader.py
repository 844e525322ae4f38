"""The parameters of a checkpoint, read slice by slice, without a device and without the rest of the training state."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from steerjax.errors import CheckpointError
from steerjax.hf.keys import Index
from steerjax.hf.weights import load_tree


def is_checkpoint(directory: Path) -> bool:
    """Whether this is a whole checkpoint (Orbax writes under another name and renames at the end)."""
    return (directory / "params" / "_METADATA").is_file() and (directory / "provenance").is_dir()


class CheckpointReader:
    """An Orbax checkpoint, `checkpoints/STEP`.

    Attributes:
        shapes: path ("llama/layers/attention/q/kernel") -> shape.

    Raises:
        CheckpointError: a broken one.
    """

    def __init__(self, directory: Path):
        self.directory = directory.resolve()  # tensorstore takes no ".."
        try:
            leaves = json.loads((self.directory / "params" / "_METADATA").read_text())["tree_metadata"].values()
            names = [[part["key"] for part in leaf["key_metadata"]] for leaf in leaves]
        except (OSError, ValueError, KeyError) as error:
            raise CheckpointError(f"'{directory}' is broken ({error!r}); cure: another step of the run") from error
        self._stores = {"/".join(name): self._open(".".join(name)) for name in names}
        self.shapes = {path: tuple(store.shape) for path, store in self._stores.items()}

    def read(self, path: str, index: Index) -> np.ndarray:
        """The part of a parameter at `index`."""
        try:
            return self._stores[path][index].read().result()
        except ValueError as error:  # all that tensorstore raises
            raise CheckpointError(f"'{self.directory}': {path} cannot be read ({error})") from error

    def _open(self, name: str):
        """Orbax keeps every array as a zarr in an OCDBT database; both are formats of tensorstore."""
        import tensorstore

        base = {"driver": "file", "path": f"{self.directory}/params/"}
        spec = {"driver": "zarr", "kvstore": {"driver": "ocdbt", "base": base, "path": f"{name}/"}}
        try:
            return tensorstore.open(spec, open=True, read=True).result()
        except ValueError as error:
            raise CheckpointError(
                f"'{self.directory}': {name} cannot be read ({error}); cure: another step of the run"
            ) from error


def load_checkpoint(reader: CheckpointReader, abstract: Mapping) -> dict:
    """The parameters of a checkpoint, each process reading only what its devices hold.

    Args:
        abstract: ShapeDtypeStructs with shardings. Groups that are not wanted may be left out, and of the layers
            only the first be wanted.

    Raises:
        CheckpointError: a parameter that the checkpoint lacks or has in another shape.
    """

    def parameter(path: str, leaf) -> Callable[[Index], np.ndarray]:
        found, stacked = reader.shapes.get(path), path.startswith("llama/layers/")
        if found is None or found[stacked:] != leaf.shape[stacked:] or found[0] < leaf.shape[0]:
            raise CheckpointError(
                f"'{reader.directory}': parameter {path} has shape {found}, and {leaf.shape} is expected; "
                "cure: another step of the run"
            )
        return functools.partial(_read, reader, path, leaf.dtype)

    return load_tree(abstract, parameter)


def _read(reader: CheckpointReader, path: str, dtype, index: Index) -> np.ndarray:
    return reader.read(path, index).astype(dtype, copy=False)
