"""The device mesh: axes `data`, `fsdp`, `tensor`, `context`."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated

import pydantic.dataclasses
from pydantic import AfterValidator

from steerjax.errors import ConfigError
from steerjax.typed import STRICT, typed

if TYPE_CHECKING:
    import jax
    from jax.sharding import Mesh

AXES = ("data", "fsdp", "tensor", "context")


def _size(value: int) -> int:
    if value == -1 or value >= 1:
        return value
    raise ValueError("no size of an axis; cure: at least 1, or -1 for all devices that are left")


Size = Annotated[int, AfterValidator(_size)]


@pydantic.dataclasses.dataclass(frozen=True, config=STRICT)
class MeshConfig:
    """Devices along each axis of the mesh; one of them may be -1, "all that are left"."""

    data: Size = -1
    fsdp: Size = 1
    tensor: Size = 1
    context: Size = 1

    def __post_init__(self):
        if (self.data, self.fsdp, self.tensor, self.context).count(-1) > 1:
            raise ValueError("several axes that take all devices that are left; cure: -1 for at most one")


def parse_mesh(text: str) -> MeshConfig:
    """`fsdp=2,tensor=4`, as command lines have it.

    Raises:
        ConfigError: an axis that is not there, or no size.
    """
    entries = [entry.partition("=") for entry in text.split(",") if entry]
    try:
        sizes = {name: int(size) for name, _, size in entries}
    except ValueError:
        raise ConfigError(f"--mesh {text}: no sizes; cure: e.g. fsdp=2,tensor=4 (axes {', '.join(AXES)})") from None
    return typed(MeshConfig, sizes, "--mesh", ConfigError)


def mesh_shape(config: MeshConfig, devices: int) -> tuple[int, ...]:
    """Sizes of the four axes for this many devices; one axis may be -1, "all that are left".

    Raises:
        ConfigError: sizes that do not multiply to the number of devices.
    """
    sizes = [config.data, config.fsdp, config.tensor, config.context]
    known = math.prod(size for size in sizes if size > 0)
    if -1 in sizes:
        if devices % known:
            raise ConfigError(
                f"mesh {dict(zip(AXES, sizes, strict=True))}: {known} does not divide {devices} devices; "
                "cure: axis sizes whose product divides the number of devices"
            )
        sizes[sizes.index(-1)] = devices // known
    elif known != devices:
        raise ConfigError(
            f"mesh {dict(zip(AXES, sizes, strict=True))} wants {known} devices and there are {devices}; "
            "cure: set one axis to -1 or change the sizes"
        )
    return tuple(sizes)


def make_mesh(config: MeshConfig, devices: list[jax.Device] | None = None) -> Mesh:
    """The mesh over all devices (or those given), neighbours in the interconnect kept together."""
    import jax
    from jax.experimental import mesh_utils
    from jax.sharding import AxisType, Mesh

    devices = jax.devices() if devices is None else devices
    shape = mesh_shape(config, len(devices))
    auto = (AxisType.Auto,) * len(AXES)
    try:
        return jax.make_mesh(shape, AXES, axis_types=auto, devices=devices)
    except NotImplementedError:  # 8 by 2 on 4 by 4 chips: an axis of the machine has to be cut
        grid = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
        return Mesh(grid, AXES, axis_types=auto)
