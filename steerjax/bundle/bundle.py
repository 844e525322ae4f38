"""A model that can be run, from any folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from steerjax.bundle.describe import describe
from steerjax.bundle.reader import CheckpointReader, is_checkpoint
from steerjax.chat.render import Renderer
from steerjax.hf.config_json import read_config
from steerjax.hf.description import Description
from steerjax.models.config import ComputeConfig, HeadConfig
from steerjax.parallel.mesh import MeshConfig, make_mesh
from steerjax.schema import Schema
from steerjax.typed import typed

if TYPE_CHECKING:
    from flax import linen as nn
    from jax.sharding import Mesh

_ROW_LENGTH = 4096  # what the attention is chosen for; rows that do not fit it are computed densely


@dataclass(frozen=True)
class Bundle:
    """A model with all it needs.

    Attributes:
        description: all but the arrays.
        module: RewardModel or CausalLM.
        params: in their shards on the mesh, in the dtype of the computation; a reward head is float32.
        mesh: set it (`jax.set_mesh`) around a call.
    """

    description: Description
    module: nn.Module
    params: dict
    mesh: Mesh

    def renderer(self, schema: Schema | None = None) -> Renderer:
        """What makes the model's tokens of a conversation; `schema` for a model that names no attributes."""
        about = self.description
        schema = about.schema if schema is None else schema
        return Renderer(about.tokenizer, about.template, schema or Schema(()), about.system_prompt)


def open_bundle(
    path: str | Path,
    mesh: MeshConfig | None = None,
    *,
    template: str | None = None,
    dtype: str = "auto",
    attention: str = "auto",
) -> Bundle:
    """Opens a run, a checkpoint, a Hugging Face folder or a hub id, each process reading only what its devices hold.

    Args:
        mesh: None puts all devices on the data axis.
        template: for a folder that does not say how it was trained.
        dtype: of the computation: float32, bfloat16, or "auto", bfloat16 on accelerators and float32 on a CPU.
        attention: see `ComputeConfig`.

    Raises:
        SteerjaxError: nothing to open there, or weights that do not fit their description.
    """
    from steerjax.bundle.build import abstract_parameters, build_module, resolve_compute, stored_parameters
    from steerjax.errors import ConfigError

    compute_config = typed(ComputeConfig, {"dtype": dtype, "attention": attention}, "compute", ConfigError)
    about, devices = describe(path, template=template), make_mesh(mesh or MeshConfig())
    compute, _ = resolve_compute(compute_config, about.model, _ROW_LENGTH, devices)
    if is_checkpoint(about.path):
        outputs, bias = len(about.schema), "reward_bias" in CheckpointReader(about.path).shapes
    else:
        outputs, bias = len(read_config(about.path).labels), False
    module = build_module(about.kind, about.model, compute, outputs, HeadConfig(about.readout, bias))
    params = stored_parameters(about, abstract_parameters(module, devices, compute.dtype))
    return Bundle(about, module, params, devices)
