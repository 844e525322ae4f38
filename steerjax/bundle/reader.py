"""The parameters of a checkpoint, read slice by slice, without a device and without the rest of the training state."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from steerjax.errors import CheckpointError
from steerjax.hf.keys import Index, layer_group
from steerjax.hf.weights import frozen_layers, load_tree

_STACKS = ("llama/frozen_layers/", "llama/layers/")


def is_checkpoint(directory: Path) -> bool:
    """Whether this is a whole checkpoint (Orbax writes under another name and renames at the end)."""
    return (directory / "params" / "_METADATA").is_file() and (directory / "provenance").is_dir()


class CheckpointReader:
    """An Orbax checkpoint, `checkpoints/STEP`.

    Attributes:
        provenance: what the checkpoint says about its making.
        shapes: path ("llama/layers/attention/q/kernel") -> shape.

    Raises:
        CheckpointError: no checkpoint there, or a broken one.
    """

    def __init__(self, directory: Path):
        self.directory = directory.resolve()  # tensorstore takes no ".."
        if not is_checkpoint(self.directory):
            raise CheckpointError(f"'{directory}' is no checkpoint of steerjax; cure: give WORKDIR/checkpoints/STEP")
        try:
            self.provenance: dict = json.loads((self.directory / "provenance" / "metadata").read_text())
            leaves = json.loads((self.directory / "params" / "_METADATA").read_text())["tree_metadata"].values()
            names = [[part["key"] for part in leaf["key_metadata"]] for leaf in leaves]
        except (OSError, ValueError, KeyError) as error:
            raise CheckpointError(f"'{directory}' is broken ({error!r}); cure: another step of the run") from error
        self._stores = {"/".join(name): self._open(".".join(name)) for name in names}
        self.shapes = {path: tuple(store.shape) for path, store in self._stores.items()}

    @property
    def frozen_layers(self) -> int:
        """How many first layers are a group of their own."""
        return self.shapes.get("llama/frozen_layers/attention_norm/scale", (0,))[0]

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
        abstract: ShapeDtypeStructs with shardings. Groups that are not wanted may be left out, and another number of
            first layers may be frozen than in the checkpoint.

    Raises:
        CheckpointError: a parameter that the checkpoint lacks or has in another shape.
    """
    frozen = frozen_layers(abstract)

    def parameter(path: str, leaf) -> Callable[[Index], np.ndarray]:
        stack = next((prefix for prefix in _STACKS if path.startswith(prefix)), None)
        if stack is None:
            _check_shape(reader, path, leaf.shape)
            return lambda index: reader.read(path, index).astype(leaf.dtype, copy=False)
        name = path.removeprefix(stack)
        numbers = range(frozen, frozen + leaf.shape[0]) if stack == "llama/layers/" else range(leaf.shape[0])
        places = [layer_group(number, reader.frozen_layers) for number in numbers]
        for group, layer in places:
            _check_shape(reader, f"llama/{group}/{name}", leaf.shape, layer)
        held = sum(reader.shapes.get(prefix + name, (0,))[0] for prefix in _STACKS)
        if stack == "llama/layers/" and numbers.stop != held:
            raise CheckpointError(f"'{reader.directory}' has {held} layers, and {numbers.stop} are expected")

        def read(index: Index) -> np.ndarray:
            out = np.empty(tuple(part.stop - part.start for part in index), leaf.dtype)
            for place, (group, layer) in enumerate(places[index[0]]):
                out[place] = reader.read(f"llama/{group}/{name}", (slice(layer, layer + 1), *index[1:]))[0]
            return out

        return read

    return load_tree(abstract, parameter)


def _check_shape(reader: CheckpointReader, path: str, wanted: tuple[int, ...], layer: int | None = None) -> None:
    """Of a layer in its stack, or of a whole array."""
    found = reader.shapes.get(path)
    fits = found == wanted if layer is None else found and found[1:] == wanted[1:] and layer < found[0]
    if not fits:
        raise CheckpointError(
            f"'{reader.directory}': parameter {path} has shape {found}, and {wanted} is expected; "
            "cure: another step of the run"
        )
