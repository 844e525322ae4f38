"""The safetensors of a Hugging Face folder, read by slices, straight into the shards of our parameters."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pydantic

from steerjax.errors import ModelError
from steerjax.hf.config_json import HuggingFaceConfig
from steerjax.hf.keys import Index, Tensor, tensors
from steerjax.typed import read_json

# Safetensors' names -> ours.
_DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_AGAIN = "\n  cure: download it again"


def resolve_source(source: str) -> Path:
    """A local folder, or that of a hub id "owner/name", downloaded where it is not yet: no pickle, no code.

    Raises:
        ModelError: neither, or it cannot be had.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        return path
    if path.exists() or not re.fullmatch(r"\w[\w.-]*/[\w.-]+", source):
        raise ModelError(f"no model folder '{source}'\n  cure: give a Hugging Face folder or a hub id owner/name")
    import huggingface_hub

    patterns = ["*.json", "model*.safetensors", "tokenizer.model", "*.jinja"]
    try:
        return Path(huggingface_hub.snapshot_download(source, allow_patterns=patterns, ignore_patterns=["*/*"]))
    except Exception as error:  # the hub's errors share no base: HTTP, offline, gated, not found
        raise ModelError(
            f"'{source}' is no folder here, and cannot be had from the hub: {error}\n"
            "  cure: check the name, log in with `hf auth login` for a gated model, or download it and give the folder"
        ) from error


@pydantic.dataclasses.dataclass(frozen=True, config=pydantic.ConfigDict(strict=True))
class _ShardIndex:
    weight_map: dict[str, str]  # tensor -> file


class Stored(NamedTuple):
    """A tensor and how to get it, or the part of it at an index."""

    shape: tuple[int, ...]
    dtype: str
    read: Callable[..., np.ndarray]


def read_headers(folder: Path) -> dict[str, Stored]:
    """The tensors of a folder by name; values are read when asked for, in the dtype that they are stored in.

    Raises:
        ModelError: no safetensors, a file that is not whole, an index that is wrong, a dtype that is not read.
    """
    found, listed = {}, _listed(folder)
    for file in sorted({folder / name for name in listed.values()}) or [folder / _SINGLE]:
        with _opened(file) as opened:
            names = set(opened.keys())
            if wrong := listed and names ^ {name for name in listed if listed[name] == file.name}:
                raise ModelError(f"'{folder / _INDEX}' is wrong about {_some(wrong)} in {file.name}{_AGAIN}")
            for name, view in ((name, opened.get_slice(name)) for name in names):
                if view.get_dtype() not in _DTYPES:
                    raise ModelError(
                        f"'{file}': {name} has dtype {view.get_dtype()}, which is not read\n"
                        "  cure: a model that is not quantized, in float32, bfloat16 or float16"
                    )
                read = functools.partial(read_tensor, file, name)
                found[name] = Stored(tuple(view.get_shape()), _DTYPES[view.get_dtype()], read)
    return found


def read_tensor(file: Path, name: str, index: Index | None = None) -> np.ndarray:
    # Opened anew each time: the pages of a mapped file count as resident memory for as long as it is open.
    with _opened(file) as opened:
        return opened.get_slice(name)[index] if index else opened.get_tensor(name)


def read_folder(folder: Path, config: HuggingFaceConfig) -> list[tuple[Tensor, Stored]]:
    """The architecture's tensors, in the order of the computation.

    Raises:
        ModelError: as `read_headers`, or the folder lacks one, has others or another shape.
    """
    stored = read_headers(folder)
    prefix = "model." if any(name.startswith("model.") for name in stored) else ""
    known = tensors(config.model, config.architecture, len(config.labels), prefix=prefix)
    have, want = {name: tensor.shape for name, tensor in stored.items()}, {t.name: t.shape for t in known}
    if "lm_head.weight" in have.keys() - want.keys() and config.model.tie_word_embeddings:
        # A tied model may store its head a second time, but only the same numbers.
        if stored["lm_head.weight"].read().tobytes() != stored[f"{prefix}embed_tokens.weight"].read().tobytes():
            raise ModelError(
                f"'{folder}': lm_head.weight is not the embedding, and config.json says tie_word_embeddings\n"
                "  cure: set it to false if the head was trained, else remove the tensor"
            )
        del have["lm_head.weight"]
    # Old files hold RoPE's frequencies, which follow from the config.
    wrong = {n for n, _ in have.items() ^ want.items() if not n.endswith("rotary_emb.inv_freq")}
    if wrong:
        shown = [f"{n} is {have.get(n, 'absent')}, not {want.get(n, 'absent')}" for n in wrong]
        raise ModelError(
            f"'{folder}' is not the {config.architecture} of its config.json: {_some(shown)}\n"
            "  cure: the whole model, with the config.json that belongs to it; adapters must be merged first"
        )
    return [(tensor, stored[tensor.name]) for tensor in known]


def load_parameters(folder: Path, config: HuggingFaceConfig, abstract: Mapping, layers: int | None = None) -> dict:
    """The parameters of a folder in our tree, each process reading only what its devices hold.

    Args:
        config: `read_config(folder)`.
        abstract: ShapeDtypeStructs with shardings under our names; groups that are not wanted may be left out.
        layers: so many first layers only; None is all.

    Raises:
        ModelError: the folder and the architecture do not fit, or a group is asked for that the folder lacks.
    """
    stacks: dict[str, list[tuple[Tensor, Stored]]] = {}
    for tensor, stored in read_folder(folder, config):
        if layers is None or tensor.layer is None or tensor.layer < layers:
            stacks.setdefault(tensor.path, []).append((tensor, stored))

    def reader(path: str, leaf) -> Callable[[Index], np.ndarray]:
        if path not in stacks:
            raise ModelError(f"'{folder}' is a {config.architecture} and has no {path}\n  cure: another model")
        tensor, stack = stacks[path][0][0], stacks[path]
        shape = tensor.ours if tensor.layer is None else (len(stack), *tensor.ours)
        if leaf.shape != shape:
            raise ModelError(f"'{folder}': {path} has shape {list(shape)}, and {list(leaf.shape)} is asked for")
        return functools.partial(_read_stack, stack, leaf.dtype)

    return load_tree(abstract, reader)


def load_tree(abstract: Mapping, reader: Callable[[str, object], Callable[[Index], np.ndarray]]) -> dict:
    """A tree of global arrays, made shard by shard.

    Args:
        abstract: ShapeDtypeStructs with shardings.
        reader: (path, leaf) -> what reads the leaf's part at an index; all are asked for before the first one reads.
    """
    import jax

    def load(leaf, read: Callable[[Index], np.ndarray]):
        """jax.make_array_from_callback would hold the parts of all local devices in host memory."""
        places: dict[tuple, list[jax.Device]] = {}
        for device, index in leaf.sharding.addressable_devices_indices_map(leaf.shape).items():
            bounds = tuple(part.indices(size)[:2] for part, size in zip(index, leaf.shape, strict=True))
            places.setdefault(bounds, []).append(device)
        shards = []
        for bounds, devices in places.items():
            part = read(tuple(slice(*pair) for pair in bounds))
            copies = [jax.device_put(part, device, may_alias=False) for device in devices]
            shards += jax.block_until_ready(copies)  # so that `part` can go before the next one comes
        return jax.make_array_from_single_device_arrays(leaf.shape, leaf.sharding, shards)

    readers = jax.tree_util.tree_map_with_path(
        lambda path, leaf: reader(jax.tree_util.keystr(path, simple=True, separator="/"), leaf), abstract
    )
    return jax.tree.map(load, abstract, readers)


def _read_stack(stack: list[tuple[Tensor, Stored]], dtype, index: Index) -> np.ndarray:
    """Our array at `index`, layer by layer.

    Orbax's SafetensorsLayout reads whole flat tensors, which would then be stacked and turned: twice the memory.
    """
    stacked = stack[0][0].layer is not None
    layers, part = (stack[index[0]], index[1:]) if stacked else (stack, index)
    out = np.empty((len(layers), *(one.stop - one.start for one in part)), dtype)
    for place, (tensor, stored) in enumerate(layers):
        out[place] = tensor.to_ours(stored.read(tensor.hf_index(part)), part)
    return out if stacked else out[0]


def _listed(folder: Path) -> dict[str, str]:
    """The index's tensor -> file; empty where the folder has one file."""
    if (folder / _SINGLE).is_file():
        return {}
    index = folder / _INDEX
    if not index.is_file():
        pickles = {f.name for f in folder.iterdir() if f.suffix in (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")}
        found = f", only {_some(pickles)}, which may be pickles and could run code" if pickles else ""
        raise ModelError(
            f"'{folder}' has neither {_SINGLE} nor {_INDEX}{found}\n"
            "  cure: the whole folder; transformers' save_pretrained writes safetensors"
        )
    return read_json(_ShardIndex, index, ModelError, "download it again").weight_map


def _opened(file: Path):
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(file, framework="np")
    except (SafetensorError, OSError) as error:
        raise ModelError(f"'{file}' is truncated, missing or no safetensors file ({error}){_AGAIN}") from None


def _some(names: Iterable[str]) -> str:
    names = sorted(names)
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
