"""The device mesh: axes `data`, `fsdp`, `tensor`, `context`."""

from __future__ import annotations

import dataclasses
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np
import pydantic.dataclasses
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from pydantic import AfterValidator

from steerjax.errors import ConfigError
from steerjax.parallel.rules import replicated
from steerjax.typed import STRICT, typed

AXES = ("data", "fsdp", "tensor", "context")


def _size(value: int) -> int:
    if value == -1 or 1 <= value <= 2**20:
        return value
    raise ValueError("no size of an axis; cure: at least 1 and at most 1048576, or -1 for all devices that are left")


Size = Annotated[int, AfterValidator(_size)]


@pydantic.dataclasses.dataclass(frozen=True, config=STRICT)
class MeshConfig:
    """Devices along each axis of the mesh; one of them may be -1, "all that are left"."""

    data: Size = -1  # copies of the model, each with rows of its own
    fsdp: Size = 1  # cuts parameters, optimizer state and the batch's rows
    tensor: Size = 1  # cuts heads, feed-forward width and vocabulary
    context: Size = 1  # cuts the tokens of a row

    def __post_init__(self):
        if dataclasses.astuple(self).count(-1) > 1:
            raise ValueError("several axes that take all devices that are left; cure: -1 for at most one")


def parse_mesh(text: str) -> MeshConfig:
    """`fsdp=2,tensor=4`, as command lines have it. Raises ConfigError: an axis that is not there, or no size."""
    entries = (entry.partition("=") for entry in text.split(",") if entry)
    sizes = {name: int(size) if size.lstrip("-").isdecimal() else size for name, _, size in entries}
    return typed(MeshConfig, sizes, "--mesh", ConfigError)


def mesh_shape(config: MeshConfig, devices: int) -> tuple[int, ...]:
    """Sizes of the four axes for this many devices. Raises ConfigError: they do not multiply to it."""
    try:
        return np.empty(devices).reshape(dataclasses.astuple(config)).shape
    except ValueError:
        sizes = ", ".join(f"{axis} {getattr(config, axis)}" for axis in AXES)
        raise ConfigError(
            f"config.mesh: {sizes} does not fit {devices} devices; cure: sizes that multiply to {devices}, or one of -1"
        ) from None


def find_devices() -> list[jax.Device]:
    """All devices. Raises ConfigError: JAX_PLATFORMS names a kind that is not here."""
    try:
        return jax.devices()
    except (RuntimeError, AssertionError) as error:  # the second, which says nothing, for CUDA without its plugin
        named = jax.config.jax_platforms
        cure = "JAX_PLATFORMS=cpu, or pip install 'steerjax[cuda]' or 'steerjax[tpu]' on a machine that has one"
        raise ConfigError(f"JAX_PLATFORMS={named}: jax finds no such device. {error}\n  cure: {cure}") from error


def make_mesh(config: MeshConfig, devices: list[jax.Device] | None = None) -> Mesh:
    """The mesh over all devices (or those given), neighbours in the interconnect kept together."""
    devices = find_devices() if devices is None else devices
    # An axis of the machine is cut where it has to be, as for 8 by 2 on 4 by 4 chips.
    grid = mesh_utils.create_device_mesh(mesh_shape(config, len(devices)), devices, allow_split_physical_axes=True)
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def make_any(mesh: Mesh):
    """A function: true on this process -> true on any process, as an array that is not waited for.

    A flag that goes through the mesh behind each step is seen by all at the same step, and no step waits for it.
    """
    every = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
    any_of = jax.jit(jnp.any, out_shardings=replicated(mesh))
    return lambda flag: any_of(jax.make_array_from_callback((mesh.size,), every, lambda _: np.full(1, flag)))
