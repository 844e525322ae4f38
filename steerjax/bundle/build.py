"""The one place that opens or builds a module and chooses how it is computed: training, inference and plans."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.core import meta
from jax.sharding import Mesh

from steerjax.bundle.describe import describe, output_names
from steerjax.bundle.reader import is_checkpoint, open_reader
from steerjax.chat.render import Renderer
from steerjax.errors import ConfigError
from steerjax.hf.description import Description
from steerjax.hf.keys import HEAD
from steerjax.hf.weights import FirstLogitReader, GrownReader, load_parameters
from steerjax.models.attention import Choice, choose_backend
from steerjax.models.config import ComputeConfig, HeadConfig, LlamaConfig
from steerjax.models.llama import CausalLM, Compute, RewardModel
from steerjax.parallel.mesh import MeshConfig, make_mesh
from steerjax.parallel.rules import parameter_shardings, shardings_of
from steerjax.schema import Schema
from steerjax.typed import typed

_ROW_LENGTH = 4096  # what the attention of an opened model is chosen for; rows that do not fit it are computed densely


@dataclass(frozen=True)
class Bundle:
    """A model with all it needs."""

    description: Description  # all but the arrays
    module: nn.Module  # RewardModel or CausalLM
    params: dict  # in their shards on the mesh, in the dtype of the computation; a reward head is float32
    mesh: Mesh  # set it (`jax.set_mesh`) around a call

    def renderer(self, schema: Schema | None = None) -> Renderer:
        """What makes the model's tokens of a conversation; `schema` for a model that names no attributes."""
        about = self.description
        return Renderer(about.tokenizer, about.template, schema or about.schema or Schema(()), about.system_prompt)


def open_bundle(
    path: str | Path | Description,
    mesh: MeshConfig | None = None,
    *,
    template: str | None = None,
    dtype: str = "auto",
    attention: str = "auto",
    verify: bool = True,
) -> Bundle:
    """Opens a run, a checkpoint, a Hugging Face folder or a hub id, each process reading only what its devices hold.

    One that `describe` has found and verified is opened by its description. Without a `mesh` all devices are on the
    data axis. `template` is for a folder that does not say how it was trained; `dtype` (of the computation) and
    `attention` are `ComputeConfig`'s; `verify`: as `locate`.

    Raises SteerjaxError: nothing to open there, or weights that do not fit their description.
    """
    config = typed(ComputeConfig, {"dtype": dtype, "attention": attention}, "compute", ConfigError)
    about = path if isinstance(path, Description) else describe(path, template=template, verify=verify)
    devices = make_mesh(mesh or MeshConfig())
    compute, _ = resolve_compute(config, about.model, _ROW_LENGTH, devices)
    module = build_module(about.kind, about.model, compute, len(output_names(about)), stored_head(about))
    params = stored_parameters(about, abstract_parameters(module, devices, compute.dtype))
    return Bundle(about, module, params, devices)


def resolve_compute(config: ComputeConfig, model: LlamaConfig, row_length: int, mesh: Mesh) -> tuple[Compute, Choice]:
    """How a model runs on a mesh, and the attention with the reason for it.

    Raises ConfigError: the config names an attention that cannot run this.
    """
    platform = mesh.devices.flat[0].platform  # a plan's is another machine's
    name = config.dtype if config.dtype != "auto" else "float32" if platform == "cpu" else "bfloat16"
    attention = choose_backend(
        config.attention, platform, name, model.head_dim, row_length, config.attention_chunk, mesh.shape["context"]
    )
    flat = platform == "cpu" and mesh.shape["context"] == 1  # rows that are cut both ways are no one dimension
    compute = Compute(jnp.dtype(name), config.remat, config.unroll, attention.name, config.attention_chunk, flat=flat)
    return compute, attention


def build_module(kind: str, model: LlamaConfig, compute: Compute, attributes: int, head: HeadConfig) -> nn.Module:
    """A chat model ("chat") or a reward model ("reward") of so many attributes."""
    if kind == "chat":
        return CausalLM(model, compute)
    return RewardModel(model, attributes, head.readout, head.use_bias, compute)


def abstract_parameters(module: nn.Module, mesh: Mesh, dtype=jnp.float32) -> dict:
    """Shapes, dtypes and shardings of a module's parameters; nothing is allocated. Reward heads are float32."""
    boxed = jax.eval_shape(lambda key: module.init(key, method="initialize"), jax.random.key(0))["params"]

    def leaf(path, array, sharding):
        kind = jnp.float32 if path[0].key.startswith("reward") else dtype
        return jax.ShapeDtypeStruct(array.shape, kind, sharding=sharding)

    return jax.tree_util.tree_map_with_path(leaf, meta.unbox(boxed), parameter_shardings(boxed, mesh))


def random_parameters(module: nn.Module, abstract: dict, seed: int) -> dict:
    """Random parameters, every leaf made in its own shards and dtype; `abstract` may be a part of the module's tree."""

    def init(key):
        made = _part(meta.unbox(module.init(key, method="initialize")["params"]), abstract)
        return jax.tree.map(lambda x, like: x.astype(like.dtype), made, abstract)

    return jax.jit(init, out_shardings=shardings_of(abstract))(jax.random.key(seed))


def _part(params: dict, like: dict) -> dict:
    """The leaves of `params` that `like` has."""
    return {name: _part(params[name], part) if isinstance(part, dict) else params[name] for name, part in like.items()}


def stored_head(about: Description) -> HeadConfig:
    """How a described reward model's head reads."""
    bias = is_checkpoint(about.path) and "reward_bias" in open_reader(about.path).shapes  # servers know none
    return HeadConfig(about.readout, bias)


def stored_parameters(
    about: Description, abstract: dict, new_tokens: Mapping[int, Sequence[int]] | None = None
) -> dict:
    """A described model's parameters in the shards of `abstract`, each process reading only what its devices hold.

    `abstract` may lack groups, and have the first of the layers only, and more rows of the embedding where there are
    `new_tokens` (`GrownReader`). Raises ModelError, CheckpointError: what is stored does not fit.
    """
    reader = open_reader(about.path)
    if new_tokens:
        reader = GrownReader(reader, abstract["llama"]["embedding"].shape[0], new_tokens)
    if HEAD in abstract and HEAD not in reader.shapes and about.kind == "reward":
        reader = FirstLogitReader(reader)
    return load_parameters(reader, abstract)
