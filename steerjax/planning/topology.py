"""Machines by name, and their devices without having them: XLA's compilers only want to know what they compile for."""

from __future__ import annotations

import importlib.util
import math
import os
import re
from dataclasses import dataclass

from steerjax.errors import ConfigError
from steerjax.models.flops import CHIPS, Chip

KINDS = {"v5e": "TPU v5 lite", "v5p": "TPU v5", "v6e": "TPU v6 lite", "h100": "H100"}
_EXAMPLES = "v5e:4x4 (16 chips), v5p:4x4x8 (128 chips, sold as v5p-256), v6e:4x4, h100:1x8 (nodes x GPUs)"

# What XLA's GPU compiler asks about an H100 (SXM, 80 GB): NVIDIA's architecture paper and the CUDA programming guide,
# compute capability 9.0.
_H100_CONFIG = """
gpu_device_info {
  cuda_compute_capability { major: 9 minor: 0 }
  core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98
  device_memory_size: 84929347584 memory_bandwidth: 3352320000000 l2_cache_size: 52428800
  threads_per_warp: 32 threads_per_block_limit: 1024 threads_per_core_limit: 2048
  registers_per_block_limit: 65536 registers_per_core_limit: 65536
  shared_memory_per_block: 49152 shared_memory_per_block_optin: 232448 shared_memory_per_core: 233472
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
}
platform_name: "CUDA" runtime_version { major: 13 } dnn_version_info { major: 9 minor: 12 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""


@dataclass(frozen=True)
class Topology:
    """Some chips and how they are joined.

    Attributes:
        name: as the user wrote it.
        kind: a name of KINDS.
        shape: chips along each axis of a TPU slice; nodes and GPUs a node for H100.
    """

    name: str
    kind: str
    shape: tuple[int, ...]

    @property
    def chip(self) -> Chip:
        return CHIPS[KINDS[self.kind]]

    @property
    def devices(self) -> int:
        return math.prod(self.shape)

    @property
    def on_gpu(self) -> bool:
        return self.kind == "h100"


def parse_topology(name: str) -> Topology:
    """`v5p:4x4x8` as a Topology. No jax is imported.

    Raises:
        ConfigError: a kind that we have no compiler for, or another way of writing.
    """
    match = re.fullmatch(r"(\w+):(\d+(?:x\d+)*)", name)
    if match is None or match[1] not in KINDS:
        raise ConfigError(f"--topology {name}: not a machine that can be planned; cure: one of {_EXAMPLES}")
    shape = tuple(map(int, match[2].split("x")))
    topology = Topology(name, match[1], (1, *shape) if match[1] == "h100" and len(shape) == 1 else shape)
    axes = 3 if topology.kind == "v5p" else 2
    if len(topology.shape) != axes or 0 in topology.shape:
        raise ConfigError(f"--topology {name}: {topology.kind} has {axes} axes; cure: e.g. {_EXAMPLES}")
    return topology


def prepare_environment(topology: Topology) -> None:
    """Environment variables that have to stand before jax is imported.

    No accelerator of this machine is touched: the platform is the CPU, libtpu does not look for its TPU's metadata and
    may be loaded beside a program that holds the TPU; the CUDA plugin does not ask for a driver.
    """
    if topology.on_gpu:
        os.environ |= {"JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1", "JAX_PLATFORMS": "", "CUDA_VISIBLE_DEVICES": ""}
        return
    os.environ |= {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "true"}
    for name, value in {"ACCELERATOR_TYPE": "v5e-16", "WORKER_HOSTNAMES": "localhost", "WORKER_ID": "0"}.items():
        os.environ.setdefault(f"TPU_{name}", value)  # else libtpu complains that it cannot find them out


def topology_devices(topology: Topology) -> list:
    """The chips as jax devices that can be compiled for and nothing else.

    Raises:
        ConfigError: the compiler is not installed, or knows no such machine.
    """
    from jax.errors import JaxRuntimeError
    from jax.experimental import topologies

    machine = {"platform": "tpu", "topology_name": topology.name}
    if topology.on_gpu:
        nodes, gpus = topology.shape
        machine = {"platform": "cuda", "topology_name": "h100", "target_config": _H100_CONFIG,
                   "topology": f"1x{nodes}x{gpus}"}  # fmt: skip
    elif importlib.util.find_spec("libtpu") is None:
        raise ConfigError(f"--topology {topology.name}: the TPU compiler is not installed; cure: pip install libtpu")
    try:
        return list(topologies.get_topology_desc(**machine).devices)
    except (JaxRuntimeError, NotImplementedError, RuntimeError, KeyError) as error:
        cure = "pip install 'jax[cuda13]>=0.12' (Python 3.12 or newer)" if topology.on_gpu else f"e.g. {_EXAMPLES}"
        raise ConfigError(f"--topology {topology.name}: {str(error).splitlines()[0]}; cure: {cure}") from error
