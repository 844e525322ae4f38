"""The one place that builds a module and chooses how it is computed, for training, inference and plans."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.core import meta
from jax.sharding import Mesh, NamedSharding

from steerjax.bundle.describe import output_names
from steerjax.bundle.reader import CheckpointReader, is_checkpoint, open_reader
from steerjax.hf.description import Description
from steerjax.hf.weights import load_parameters
from steerjax.models.attention import Choice, choose_backend
from steerjax.models.config import ComputeConfig, HeadConfig, LlamaConfig
from steerjax.models.llama import CausalLM, Compute
from steerjax.models.reward import RewardModel
from steerjax.parallel.rules import parameter_shardings


def resolve_compute(config: ComputeConfig, model: LlamaConfig, row_length: int, mesh: Mesh) -> tuple[Compute, Choice]:
    """How a model runs on a mesh, and the attention with the reason for it.

    Raises:
        ConfigError: the config names an attention that cannot run this.
    """
    platform = mesh.devices.flat[0].platform  # a plan's is another machine's
    name = config.dtype if config.dtype != "auto" else "float32" if platform == "cpu" else "bfloat16"
    attention = choose_backend(
        config.attention, platform, name, model.head_dim, row_length, config.attention_chunk, mesh.shape["context"]
    )
    unroll = config.unroll or (model.num_layers if platform == "cpu" else 1)
    return Compute(jnp.dtype(name), config.remat, unroll, attention.name, config.attention_chunk), attention


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
    """Random parameters, every leaf made in its own shards; `abstract` may be a part of the module's tree."""

    def init(key):
        params = meta.unbox(module.init(key, method="initialize")["params"])
        return {name: params[name] for name in abstract}

    shardings: dict[str, NamedSharding] = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    return jax.jit(init, out_shardings=shardings)(jax.random.key(seed))


def stored_head(about: Description) -> HeadConfig:
    """How a described reward model's head reads."""
    bias = is_checkpoint(about.path) and "reward_bias" in CheckpointReader(about.path).shapes
    return HeadConfig(about.readout, bias)


def stored_module(about: Description, compute: Compute) -> nn.Module:
    """The module whose parameters a described model has; a classifier of somebody else's may have any outputs."""
    return build_module(about.kind, about.model, compute, len(output_names(about)), stored_head(about))


def stored_parameters(about: Description, abstract: dict) -> dict:
    """A described model's parameters in the shards of `abstract`, each process reading only what its devices hold.

    Args:
        abstract: may lack groups, and have the first of the layers only.

    Raises:
        ModelError, CheckpointError: what is stored does not fit.
    """
    return load_parameters(open_reader(about.path), abstract)
