"""The device mesh: axes `data`, `fsdp`, `tensor`, `context`."""

from __future__ import annotations

import math

import jax
from jax.experimental import mesh_utils
from jax.sharding import Mesh

from steerjax.config import MeshConfig
from steerjax.errors import ConfigError

AXES = ("data", "fsdp", "tensor", "context")


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
    devices = jax.devices() if devices is None else devices
    shape = mesh_shape(config, len(devices))
    auto = (jax.sharding.AxisType.Auto,) * len(AXES)
    try:
        return jax.make_mesh(shape, AXES, axis_types=auto, devices=devices)
    except NotImplementedError:  # 8 by 2 on 4 by 4 chips: an axis of the machine has to be cut
        grid = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
        return Mesh(grid, AXES, axis_types=auto)
