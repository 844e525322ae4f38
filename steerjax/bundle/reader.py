"""The parameters of a checkpoint, read slice by slice, without a device and without the rest of the training state."""

import contextlib
import json
from pathlib import Path

import numpy as np

from steerjax.errors import CheckpointError
from steerjax.hf.adapter import AdapterReader, is_adapter
from steerjax.hf.config_json import read_config
from steerjax.hf.keys import Index
from steerjax.hf.weights import FolderReader, TensorReader


def is_checkpoint(directory: Path) -> bool:
    """Whether this is a whole checkpoint (Orbax writes under another name and renames at the end)."""
    return (directory / "params" / "_METADATA").is_file() and (directory / "provenance").is_dir()


class CheckpointReader:
    """An Orbax checkpoint, `checkpoints/STEP`: its `shapes` and `dtypes` by path, "llama/layers/attention/q/kernel".

    Raises CheckpointError: a broken one.
    """

    def __init__(self, directory: Path):
        self.directory = directory.resolve()  # tensorstore takes no ".."
        try:
            leaves = json.loads((self.directory / "params" / "_METADATA").read_text())["tree_metadata"].values()
            names = [[part["key"] for part in leaf["key_metadata"]] for leaf in leaves]
        except (OSError, ValueError, RecursionError, KeyError) as error:
            raise CheckpointError(f"'{directory}' is broken ({error!r}); cure: another step of the run") from error
        self._stores = {"/".join(name): self._open(".".join(name)) for name in names}
        self.shapes = {path: tuple(store.shape) for path, store in self._stores.items()}
        self.dtypes = {path: store.dtype.name for path, store in self._stores.items()}

    def read(self, path: str, index: Index, dtype="float32") -> np.ndarray:
        """The part of a parameter at `index`."""
        with self._whole(path):
            return self._stores[path][index].read().result().astype(dtype, copy=False)

    def _open(self, name: str):
        """Orbax keeps every array as a zarr in an OCDBT database; both are formats of tensorstore."""
        import tensorstore

        base = {"driver": "file", "path": f"{self.directory}/params/"}
        spec = {"driver": "zarr", "kvstore": {"driver": "ocdbt", "base": base, "path": f"{name}/"}}
        with self._whole(name):
            return tensorstore.open(spec, open=True, read=True).result()

    @contextlib.contextmanager
    def _whole(self, name: str):
        try:
            yield
        except ValueError as error:  # all that tensorstore raises
            said = f"'{self.directory}': {name} cannot be read ({error})"
            raise CheckpointError(f"{said}; cure: another step of the run") from error


def open_reader(path: Path) -> CheckpointReader | TensorReader:
    """The parameters of a checkpoint, of a Hugging Face folder or of a PEFT adapter with its base, by our names."""
    if is_checkpoint(path):
        return CheckpointReader(path)
    return AdapterReader(path) if is_adapter(path) else FolderReader(path, read_config(path))
