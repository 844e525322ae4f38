"""The safetensors of a Hugging Face folder, read by slices, straight into the shards of our parameters."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pydantic

from steerjax.errors import ModelError
from steerjax.hf.config_json import HuggingFaceConfig
from steerjax.hf.keys import Index, Tensor, tensors
from steerjax.typed import read_json

# Safetensors' names -> ours.
_DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.pickle")
_HUB_ID = re.compile(r"\w[\w.-]*/[\w.-]+")
_AGAIN = "\n  cure: download it again"


def resolve_source(source: str) -> Path:
    """A local folder, or that of a hub id "owner/name", downloaded where it is not yet: no pickle, no code.

    Raises:
        ModelError: neither, or it cannot be had.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        return path
    if path.exists() or not _HUB_ID.fullmatch(source):
        raise ModelError(f"no model folder '{source}'\n  cure: give a Hugging Face folder or a hub id owner/name")
    import huggingface_hub

    try:
        folder = huggingface_hub.snapshot_download(
            source,
            allow_patterns=["*.json", "model*.safetensors", "tokenizer.model", "*.jinja"],
            ignore_patterns=["*/*"],
        )
    except Exception as error:  # the hub's errors share no base: HTTP, offline, gated, not found
        raise ModelError(
            f"'{source}' is no folder here, and cannot be had from the hub: {error}\n"
            "  cure: check the name, log in with `hf auth login` for a gated model, or download it and give the folder"
        ) from error
    return Path(folder)


@pydantic.dataclasses.dataclass(frozen=True, config=pydantic.ConfigDict(strict=True))
class _ShardIndex:
    weight_map: dict[str, str]  # tensor -> file


class FolderWeights:
    """The tensors of a folder: names, shapes and dtypes are known, values are read when asked for.

    Attributes:
        folder: where they lie.
        shapes: name -> shape.
        dtypes: name -> "float32", "bfloat16" or "float16".

    Raises:
        ModelError: no safetensors, an index that names what is not there, a truncated file, a dtype that is not read.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, str] = {}
        self._files: dict[str, Path] = {}
        listed = _listed(folder)
        for file in sorted(set(listed.values())) or [_SINGLE]:
            self._read_header(folder / file, listed)
        if lacking := listed.keys() - self.shapes.keys():
            raise ModelError(f"'{folder / _INDEX}' lists {_some(sorted(lacking))}, which no file holds{_AGAIN}")

    def _read_header(self, file: Path, listed: Mapping[str, str]) -> None:
        with _opened(file) as opened:
            for name in opened.keys():  # noqa: SIM118 (a reader, no dict)
                if listed.get(name, file.name) != file.name:
                    raise ModelError(f"'{file}' holds {name}, which {_INDEX} lists elsewhere{_AGAIN}")
                view = opened.get_slice(name)
                if view.get_dtype() not in _DTYPES:
                    raise ModelError(
                        f"'{file}': {name} has dtype {view.get_dtype()}, which is not read\n"
                        "  cure: a model that is not quantized, in float32, bfloat16 or float16"
                    )
                self._files[name], self.shapes[name] = file, tuple(view.get_shape())
                self.dtypes[name] = _DTYPES[view.get_dtype()]

    def read(self, name: str, index: Index = ()) -> np.ndarray:
        """A tensor, or the part of it at `index`, in the dtype that it is stored in."""
        # Opened anew each time: the pages of a mapped file count as resident memory for as long as it is open.
        with _opened(self._files[name]) as opened:
            return opened.get_slice(name)[index] if index else opened.get_tensor(name)

    def expected(self, config: HuggingFaceConfig) -> tuple[Tensor, ...]:
        """The architecture's tensors. Raises ModelError where the folder lacks one, has others or another shape."""
        prefix = "model." if any(name.startswith("model.") for name in self.shapes) else ""
        known = tensors(config.model, config.architecture, len(config.labels), prefix=prefix)
        if missing := [t.name for t in known if t.name not in self.shapes]:
            raise ModelError(
                f"'{self.folder}' lacks {_some(missing)} of a {config.architecture}\n"
                "  cure: the whole model, with the config.json that belongs to it"
            )
        for tensor in known:
            if self.shapes[tensor.name] != tensor.shape:
                raise ModelError(
                    f"'{self._files[tensor.name]}': {tensor.name} has shape {list(self.shapes[tensor.name])} and "
                    f"config.json says {list(tensor.shape)}\n  cure: the config.json that belongs to the weights"
                )
        # Old files hold RoPE's frequencies, which follow from the config.
        extra = [n for n in self.shapes.keys() - {t.name for t in known} if not n.endswith("rotary_emb.inv_freq")]
        if "lm_head.weight" in extra and config.model.tie_word_embeddings:
            # A tied model may store its head a second time, but only the same numbers.
            if self.read("lm_head.weight").tobytes() != self.read(f"{prefix}embed_tokens.weight").tobytes():
                raise ModelError(
                    f"'{self._files['lm_head.weight']}': lm_head.weight is not the embedding, and config.json says "
                    "tie_word_embeddings\n  cure: set it to false if the head was trained, else remove the tensor"
                )
            extra.remove("lm_head.weight")
        if extra:
            raise ModelError(
                f"'{self.folder}' has {_some(sorted(extra))}, which a {config.architecture} does not have\n"
                "  cure: the config.json that belongs to the weights; adapters must be merged first"
            )
        return known


def load_parameters(folder: Path, config: HuggingFaceConfig, abstract: Mapping, layers: int | None = None) -> dict:
    """The parameters of a folder in our tree, each process reading only what its devices hold.

    Args:
        config: `read_config(folder)`.
        abstract: ShapeDtypeStructs with shardings under our names; groups that are not wanted may be left out.
        layers: so many first layers only; None is all.

    Raises:
        ModelError: the folder and the architecture do not fit, or a group is asked for that the folder lacks.
    """
    weights = FolderWeights(folder)
    parts: dict[str, list[Tensor]] = {}
    for tensor in weights.expected(config):
        if layers is None or tensor.layer is None or tensor.layer < layers:
            parts.setdefault(tensor.path, []).append(tensor)

    def reader(path: str, leaf) -> Callable[[Index], np.ndarray]:
        if path not in parts:
            raise ModelError(f"'{folder}' is a {config.architecture} and has no {path}\n  cure: another model")
        stack = parts[path]
        shape = stack[0].our_shape if stack[0].layer is None else (len(stack), *stack[0].our_shape)
        if leaf.shape != shape:
            raise ModelError(f"'{folder}': {path} has shape {list(shape)}, and {list(leaf.shape)} is asked for")
        return lambda index: _read_stack(weights, stack, index, leaf.dtype)

    return load_tree(abstract, reader)


def load_tree(abstract: Mapping, reader: Callable[[str, object], Callable[[Index], np.ndarray]]) -> dict:
    """A tree of global arrays, made shard by shard.

    Args:
        abstract: ShapeDtypeStructs with shardings.
        reader: (path, leaf) -> what reads the leaf's part at an index; all are asked for before the first one reads.
    """
    import jax

    def plan(path, leaf):
        return reader(jax.tree_util.keystr(path, simple=True, separator="/"), leaf)

    return jax.tree.map(_load, abstract, jax.tree_util.tree_map_with_path(plan, abstract))


def _load(leaf, read: Callable[[Index], np.ndarray]):
    """One global array. jax.make_array_from_callback would hold the parts of all local devices in host memory."""
    import jax

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


def _read_stack(weights: FolderWeights, stack: list[Tensor], index: Index, dtype) -> np.ndarray:
    """Our array at `index`, layer by layer.

    Orbax's SafetensorsLayout reads whole flat tensors, which would then be stacked and turned: twice the memory.
    """

    def one(tensor: Tensor, part: Index) -> np.ndarray:
        return tensor.to_ours(weights.read(tensor.name, tensor.hf_index(part)), part)

    if stack[0].layer is None:
        return np.ascontiguousarray(one(stack[0], index), dtype)
    layers = stack[index[0]]
    out = np.empty((len(layers), *(part.stop - part.start for part in index[1:])), dtype)
    for place, tensor in enumerate(layers):
        out[place] = one(tensor, index[1:])
    return out


def _listed(folder: Path) -> dict[str, str]:
    """The index's tensor -> file; empty where the folder has one file."""
    if (folder / _SINGLE).is_file():
        return {}
    index = folder / _INDEX
    if not index.is_file():
        pickles = sorted(file.name for pattern in _PICKLES for file in folder.glob(pattern))
        found = f", only {_some(pickles)}, which may be pickles and could run code" if pickles else ""
        raise ModelError(
            f"'{folder}' has neither {_SINGLE} nor {_INDEX}{found}\n"
            "  cure: the whole folder; transformers' save_pretrained writes safetensors"
        )
    listed = read_json(_ShardIndex, index, ModelError, "download it again").weight_map
    for name, file in listed.items():
        if Path(file).name != file or not (folder / file).is_file():
            raise ModelError(f"'{index}' names '{file}' (for {name}), which is not there\n  cure: download that file")
    return listed


def _opened(file: Path):
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(file, framework="np")
    except (SafetensorError, OSError) as error:
        raise ModelError(f"'{file}' is truncated or no safetensors file ({error}){_AGAIN}") from None


def _some(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
