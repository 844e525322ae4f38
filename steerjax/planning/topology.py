"""Machines by name, and their devices without having them: XLA's compilers only want to know what they compile for."""

from __future__ import annotations

import importlib.util
import math
import os
import re
from dataclasses import dataclass

import jax
from jax.experimental import topologies

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
    """Some chips and how they are joined."""

    name: str  # as the user wrote it
    shape: tuple[int, ...]  # chips along each axis of a TPU slice; nodes and GPUs a node for H100
    chip: Chip

    @property
    def devices(self) -> int:
        return math.prod(self.shape)

    @property
    def on_gpu(self) -> bool:
        return self.name.startswith("h100")


def parse_topology(name: str) -> Topology:
    """`v5p:4x4x8` as a Topology. Raises ConfigError: a kind that we have no compiler for, or another way of writing."""
    if not re.fullmatch(r"(v5p:Nx|(v5e|v6e|h100):)NxN".replace("N", r"[1-9]\d*"), name):
        raise ConfigError(f"--topology {name}: not a machine that can be planned; cure: one of {_EXAMPLES}")
    kind, shape = name.split(":")
    return Topology(name, tuple(map(int, shape.split("x"))), CHIPS[KINDS[kind]])


def prepare_environment(topology: Topology) -> None:
    """Sets what has to stand before jax looks for devices, so that it touches no accelerator of this machine.

    The platform is the CPU; libtpu does not look for its TPU's metadata and may be loaded beside a program that holds
    the TPU; the CUDA plugin does not ask for a driver.
    """
    if topology.on_gpu:
        os.environ |= {"JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1", "JAX_PLATFORMS": "", "CUDA_VISIBLE_DEVICES": ""}
    else:
        os.environ |= {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "true"}
        for name, value in {"ACCELERATOR_TYPE": "v5e-16", "WORKER_HOSTNAMES": "localhost", "WORKER_ID": "0"}.items():
            os.environ.setdefault(f"TPU_{name}", value)  # else libtpu complains that it cannot find them out
    jax.config.update("jax_platforms", os.environ["JAX_PLATFORMS"] or None)  # it was loaded with the recipe


def topology_devices(topology: Topology) -> list[jax.Device]:
    """The chips as jax devices that can be compiled for and nothing else.

    Raises:
        ConfigError: the compiler is not installed, or knows no such machine.
    """
    machine, cure = {"platform": "tpu", "topology_name": topology.name}, f"e.g. {_EXAMPLES}"
    if topology.on_gpu:
        cure = "pip install 'jax[cuda13]>=0.12' (Python 3.12 or newer)"
        shape = "1x{}x{}".format(*topology.shape)
        machine = {"platform": "cuda", "topology_name": "h100", "target_config": _H100_CONFIG, "topology": shape}
    elif importlib.util.find_spec("libtpu") is None:
        raise ConfigError(f"--topology {topology.name}: the TPU compiler is not installed; cure: pip install libtpu")
    try:
        return list(topologies.get_topology_desc(**machine).devices)
    except (RuntimeError, KeyError) as error:
        raise ConfigError(f"--topology {topology.name}: {str(error).splitlines()[0]}; cure: {cure}") from error
