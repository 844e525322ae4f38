"""The safetensors of a Hugging Face folder, read by slices, straight into the shards of our parameters."""

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import ml_dtypes  # noqa: F401 (with it numpy knows bfloat16)
import numpy as np
import pydantic

from steerjax.errors import ModelError
from steerjax.hf.config_json import DTYPES, HuggingFaceConfig
from steerjax.hf.keys import HEAD, Index, Tensor, stacked_shapes, tensors
from steerjax.typed import read_json

_AGAIN = "download it again"
_THREADS = min(8, os.cpu_count() or 1)  # that read at once; each holds a tensor of one layer
_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"


def resolve_source(source: str) -> Path:
    """A local folder, or that of a hub id "owner/name", downloaded without pickles and code.

    Raises ModelError: neither, or it cannot be had.
    """
    path = os.path.expanduser(source)
    if os.path.isdir(path):  # of any name; pathlib's raises for one that is too long
        return Path(path)
    known = "a run's folder, checkpoints/STEP, a Hugging Face folder, or a hub id owner/name"
    if os.path.exists(path) or not re.fullmatch(r"\w[\w.-]*/[\w.-]+", source):
        raise ModelError(f"no model folder '{source}'\n  cure: {known}")
    import huggingface_hub

    patterns = ["*.json", "model*.safetensors", "adapter_model.safetensors", "tokenizer.model", "*.jinja"]
    try:
        return Path(huggingface_hub.snapshot_download(source, allow_patterns=patterns, ignore_patterns=["*/*"]))
    except Exception as error:  # the hub's errors share no base
        cure = f"{known}; log in with `hf auth login` for a gated model, or download it and give its folder"
        raise ModelError(f"'{source}' is no folder, and cannot be had from the hub: {error}\n  cure: {cure}") from error


@pydantic.dataclasses.dataclass(frozen=True, config=pydantic.ConfigDict(strict=True))
class _Shards:
    weight_map: dict[str, str]  # tensor -> file


class Header(NamedTuple):
    file: Path
    shape: tuple[int, ...]
    dtype: str


def read_headers(folder: Path) -> dict[str, Header]:
    """The tensors of a folder by name, in its one file or those that its index names.

    Raises ModelError: no safetensors, a file that is not whole, a tensor in two files, a dtype that is not read.
    """
    index, found = folder / _INDEX, {}
    if (folder / _SINGLE).is_file():
        files = [folder / _SINGLE]
    elif index.is_file():
        files = sorted({folder / name for name in read_json(_Shards, index, ModelError, _AGAIN).weight_map.values()})
    else:
        pickles = {f.name for f in folder.iterdir() if f.suffix in (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")}
        said = f", only {_some(pickles)}, which may be pickles and could run code" if pickles else ""
        cure = "the whole folder; transformers' save_pretrained writes safetensors"
        raise ModelError(f"'{folder}' has neither {_SINGLE} nor {_INDEX}{said}\n  cure: {cure}")
    for file in files:
        headers = file_headers(file)
        if both := [name for name in headers if name in found]:
            raise ModelError(f"{both[0]} stands in '{file}' and '{found[both[0]].file}'\n  cure: {_AGAIN}")
        found |= headers
    return found


def file_headers(file: Path) -> dict[str, Header]:
    """The tensors of one file by name. Raises ModelError: it is not whole, or has a dtype that is not read."""
    found = {}
    with _opened(file) as opened:
        for name in opened.keys():  # noqa: SIM118
            view = opened.get_slice(name)
            if (dtype := view.get_dtype()) not in DTYPES:
                cure = "a model that is not quantized, in float32, bfloat16 or float16"
                raise ModelError(f"'{file}': {name} has dtype {dtype}, which is not read\n  cure: {cure}")
            found[name] = Header(file, tuple(view.get_shape()), DTYPES[dtype])
    return found


def read_tensor(file: Path, name: str, index: Index = ()) -> np.ndarray:
    """A tensor, or the part of it at `index`, in the dtype that it is stored in."""
    # Opened anew each time: the pages of a mapped file count as resident memory for as long as it is open.
    with _opened(file) as opened:
        return opened.get_slice(name)[index] if index else opened.get_tensor(name)


def check_tensors(what: str, headers: Mapping[str, Header], known: Iterable[Tensor], cure: str) -> None:
    """Raises ModelError: the tensors are not the known ones, or have other shapes; begins with `what`."""
    have, want = {name: header.shape for name, header in headers.items()}, {t.name: t.shape for t in known}
    if wrong := {name for name, _ in have.items() ^ want.items()}:
        shown = [f"{n} is {have.get(n, 'absent')}, not {want.get(n, 'absent')}" for n in wrong]
        raise ModelError(f"{what}: {_some(shown)}\n  cure: {cure}")


class TensorReader:
    """Parameters under our names, as `bundle.reader.CheckpointReader` has a checkpoint's.

    `shapes` and `dtypes` are by path ("llama/layers/attention/q/kernel"); where layers differ, the dtype is "float32".
    `stacks` are the tensors of each.
    """

    def __init__(self, directory: Path, stacks: dict[str, list[tuple[Tensor, Header]]]):
        self.directory, self.stacks = directory, stacks
        self.shapes = stacked_shapes([tensor for stack in stacks.values() for tensor, _ in stack])
        dtypes = {path: {header.dtype for _, header in stack} for path, stack in stacks.items()}
        self.dtypes = {path: found.pop() if len(found) == 1 else "float32" for path, found in dtypes.items()}

    @staticmethod
    def stacked(known: Iterable[Tensor], headers: Mapping[str, Header]) -> dict[str, list[tuple[Tensor, Header]]]:
        """Each parameter's tensors, layer by layer."""
        stacks: dict[str, list[tuple[Tensor, Header]]] = {}
        for tensor in known:
            stacks.setdefault(tensor.path, []).append((tensor, headers[tensor.name]))
        return stacks

    def read(self, path: str, index: Index, dtype) -> np.ndarray:
        """The part of a parameter at `index`, read layer by layer, several at once."""
        stack = self.stacks[path]
        stacked = stack[0][0].layer is not None
        layers, part = (stack[index[0]], index[1:]) if stacked else (stack, index)
        out = np.empty((len(layers), *(one.stop - one.start for one in part)), dtype)

        def fill(place: int) -> None:
            tensor, header = layers[place]
            out[place] = tensor.to_ours(read_tensor(header.file, tensor.name, tensor.hf_index(part)), part)

        with ThreadPoolExecutor(_THREADS) as pool:
            list(pool.map(fill, range(len(layers))))
        return out if stacked else out[0]


class FolderReader(TensorReader):
    """A folder's parameters.

    Raises ModelError: as `read_headers`, or tensors and shapes are not those of the architecture.
    """

    def __init__(self, folder: Path, config: HuggingFaceConfig):
        headers = read_headers(folder)
        prefix = "model." if any(name.startswith("model.") for name in headers) else ""
        known = tensors(config.model, config.architecture, len(config.labels), prefix=prefix)
        tied = {"lm_head.weight", f"{prefix}embed_tokens.weight"}
        if config.model.tie_word_embeddings and tied <= headers.keys():
            # A tied model may store its head a second time, but only the same numbers.
            if len({read_tensor(headers[name].file, name).tobytes() for name in tied}) > 1:
                said = f"'{folder}': lm_head.weight is not the embedding, and config.json says tie_word_embeddings"
                raise ModelError(f"{said}\n  cure: set it to false if the head was trained, else remove the tensor")
            del headers["lm_head.weight"]
        # Old files hold RoPE's frequencies, which follow from the config.
        headers = {name: header for name, header in headers.items() if not name.endswith("rotary_emb.inv_freq")}
        said = f"'{folder}' is not the {config.architecture} of its config.json"
        check_tensors(said, headers, known, "the whole model with its own config.json")
        super().__init__(folder, self.stacked(known, headers))


def check_finite(array: np.ndarray, name: str, directory: Path) -> None:
    """Raises ModelError: a NaN or an infinity, which no answer and no rating would survive."""
    flat, size = array.reshape(-1), 1 << 16  # what a processor's cache holds
    parts = (flat[at : at + size] for at in range(0, flat.size, size))
    if bad := sum(part.size - np.count_nonzero(np.isfinite(part)) for part in parts):
        said = f"'{directory}': parameter {name} has {bad} of {flat.size} numbers that are NaN or infinite"
        raise ModelError(f"{said}\n  cure: another step of the run, another model, or {_AGAIN}")


def unfit(reader, path: str, expected: tuple[int, ...] | None) -> ModelError:
    said = f"'{reader.directory}': parameter {path} has shape {reader.shapes.get(path)}, and {expected} is expected"
    return ModelError(f"{said}\n  cure: another model, or another step of the run")


class FirstLogitReader:
    """A causal model as a reward model whose one output is the logit of token 0 (Nemotron's layout)."""

    def __init__(self, reader):
        self._reader, self.directory = reader, reader.directory
        self.shapes = {**reader.shapes, HEAD: (reader.shapes["llama/embedding"][1], 1)}
        self.dtypes = {**reader.dtypes, HEAD: "float32"}

    def read(self, path: str, index: Index, dtype) -> np.ndarray:
        """As the reader's own."""
        if path != HEAD:
            return self._reader.read(path, index, dtype)
        if "lm_head" in self._reader.shapes:
            return self._reader.read("lm_head", (index[0], slice(0, 1)), dtype)
        return self._reader.read("llama/embedding", (slice(0, 1), index[0]), dtype).T


class GrownReader:
    """A model with more tokens: `size` rows in the embedding, and as many columns in an untied head.

    The model's own come first. `means` names the rows that the others begin as the mean of, new token -> tokens; a row
    without a token is zero.
    """

    def __init__(self, reader, size: int, means: Mapping[int, Sequence[int]]):
        self._reader, self.directory, self._means = reader, reader.directory, means
        axes, self.dtypes = {"llama/embedding": 0, "lm_head": 1}, reader.dtypes
        self._axes = {path: axis for path, axis in axes.items() if path in reader.shapes}
        grown = {path: list(reader.shapes[path]) for path in self._axes}
        for path, axis in self._axes.items():
            grown[path][axis] = size
        self.shapes = reader.shapes | {path: tuple(shape) for path, shape in grown.items()}

    def read(self, path: str, index: Index, dtype) -> np.ndarray:
        """As the reader's own."""
        if path not in self._axes:
            return self._reader.read(path, index, dtype)
        axis = self._axes[path]
        sizes = [range(*part.indices(size)) for part, size in zip(index, self.shapes[path], strict=True)]
        rows, there, out = sizes[axis], self._reader.shapes[path][axis], np.zeros([*map(len, sizes)], dtype)

        def read(first: int, last: int) -> np.ndarray:
            part = [slice(first, last) if place == axis else one for place, one in enumerate(index)]
            return self._reader.read(path, tuple(part), "float32").swapaxes(0, axis)

        view = out.swapaxes(0, axis)
        if rows.start < there:
            view[: min(rows.stop, there) - rows.start] = read(rows.start, min(rows.stop, there))
        means = {row: tokens for row, tokens in self._means.items() if row in rows}
        known = {token: read(token, token + 1)[0] for token in {*chain(*means.values())}}
        for row, tokens in means.items():
            view[row - rows.start] = np.mean([known[token] for token in tokens], axis=0)
        return out


def load_parameters(reader, abstract: Mapping) -> dict:
    """A folder's or checkpoint's parameters as global arrays, each process reading only what its devices hold.

    `abstract` are ShapeDtypeStructs with shardings under our names; groups may be left out, and of the layers only the
    first be wanted.

    Raises ModelError: a parameter that is not there, has another shape, or is not finite.
    """
    import jax

    def check(path, leaf) -> str:
        path = jax.tree_util.keystr(path, simple=True, separator="/")
        found, stacked = reader.shapes.get(path, ()), path.startswith("llama/layers/")
        if found[stacked:] != leaf.shape[stacked:] or found[0] < leaf.shape[0]:
            raise unfit(reader, path, leaf.shape)
        return path

    def load(leaf, path: str):
        # jax.make_array_from_callback would hold the parts of all local devices in host memory.
        places: dict[tuple, list[jax.Device]] = {}
        for device, index in leaf.sharding.addressable_devices_indices_map(leaf.shape).items():
            bounds = tuple(part.indices(size)[:2] for part, size in zip(index, leaf.shape, strict=True))
            places.setdefault(bounds, []).append(device)
        shards = []
        for bounds, devices in places.items():
            part = reader.read(path, tuple(slice(*pair) for pair in bounds), leaf.dtype)
            check_finite(part, path, reader.directory)
            copies = [jax.device_put(part, device, may_alias=False) for device in devices]
            shards += jax.block_until_ready(copies)  # so that `part` can go before the next one comes
        return jax.make_array_from_single_device_arrays(leaf.shape, leaf.sharding, shards)

    paths = jax.tree_util.tree_map_with_path(check, abstract)  # all, before the first is read
    return jax.tree.map(load, abstract, paths)


def _opened(file: Path):
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(file, framework="np")
    except (SafetensorError, OSError) as error:
        raise ModelError(f"'{file}' is truncated, missing or no safetensors file ({error})\n  cure: {_AGAIN}") from None


def _some(names: Iterable[str]) -> str:
    names = sorted(names)
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
