"""A model that can be run, from any folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from steerjax.bundle.describe import describe
from steerjax.chat.render import Renderer
from steerjax.errors import ConfigError
from steerjax.hf.description import Description
from steerjax.models.config import ComputeConfig
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
    from steerjax.bundle.build import abstract_parameters, resolve_compute, stored_module, stored_parameters

    config = typed(ComputeConfig, {"dtype": dtype, "attention": attention}, "compute", ConfigError)
    about, devices = describe(path, template=template), make_mesh(mesh or MeshConfig())
    compute, _ = resolve_compute(config, about.model, _ROW_LENGTH, devices)
    module = stored_module(about, compute)
    params = stored_parameters(about, abstract_parameters(module, devices, compute.dtype))
    return Bundle(about, module, params, devices)
