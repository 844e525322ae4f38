"""Which processes make up this run, as the environment tells.

STEERJAX_COORDINATOR, STEERJAX_PROCESSES, STEERJAX_PROCESS: host:port of process 0, how many, and which this is. Cloud
TPU, GKE with TPUs, Slurm (srun) and Open MPI need none of them.
"""

import math
import re
from collections.abc import Mapping

from steerjax.errors import ConfigError

PLAIN = ("STEERJAX_COORDINATOR", "STEERJAX_PROCESSES", "STEERJAX_PROCESS")


def find_cluster(environment: Mapping[str, str]) -> dict | None:
    """Arguments of jax.distributed.initialize, {} where jax finds out for itself; None for a single process.

    Raises:
        ConfigError: names the variable.
    """
    given = [name for name in PLAIN if environment.get(name)]
    if given and len(given) < len(PLAIN):
        missing = ", ".join(name for name in PLAIN if name not in given)
        raise ConfigError(f"{given[0]} is set and {missing} not; cure: set all three, or none")
    if given:
        address, index = environment["STEERJAX_COORDINATOR"], whole_number(environment, "STEERJAX_PROCESS", 0)
        count = whole_number(environment, "STEERJAX_PROCESSES", 1)
        if not re.fullmatch(r".+:\d+", address):
            raise ConfigError(f"STEERJAX_COORDINATOR is {address!r}; cure: host:port of process 0, e.g. node1:9876")
        if index >= count:
            raise ConfigError(f"STEERJAX_PROCESS is {index} of {count} processes; cure: 0 to {count - 1}")
        plain = {"coordinator_address": address, "num_processes": count, "process_id": index}
        return plain | {"cluster_detection_method": "deactivate"} if count > 1 else None
    if int(environment.get("SLURM_NTASKS", "1")) > 1 and "SLURM_STEP_NODELIST" in environment:
        return {"local_device_ids": _slurm_devices(environment)}
    if int(environment.get("OMPI_COMM_WORLD_SIZE", "1")) > 1:
        if "OMPI_MCA_orte_hnp_uri" not in environment:  # Open MPI 5
            cure = "set STEERJAX_COORDINATOR, STEERJAX_PROCESSES and STEERJAX_PROCESS (launch/README.md)"
            raise ConfigError(f"this Open MPI does not say where process 0 is; cure: {cure}")
        return {}
    return {} if _on_tpu_pod(environment) else None


def _slurm_devices(environment: Mapping[str, str]) -> list[int]:
    """Which of the visible GPUs a task takes; [] is all. (jax always takes one, so one task a node left the rest idle.)

    With `srun --gpus-per-task` a task sees its own GPUs only, else all of the node's, which its tasks share out.
    """
    nodes = re.findall(r"(\d+)(?:\(x(\d+)\))?", environment.get("SLURM_STEP_TASKS_PER_NODE", "1"))  # such as 8(x2),4
    tasks = [int(count) for count, times in nodes for _ in range(int(times or 1))][int(environment["SLURM_NODEID"])]
    gpus = len(environment.get("CUDA_VISIBLE_DEVICES", "").split(","))
    if tasks == 1 or gpus == 1 or "SLURM_GPUS_PER_TASK" in environment:
        return []
    if gpus % tasks:
        raise ConfigError(f"{tasks} Slurm tasks on a node cannot share its {gpus} GPUs; cure: one task a node or a GPU")
    each, local = gpus // tasks, int(environment["SLURM_LOCALID"])
    return list(range(local * each, (local + 1) * each))


def _on_tpu_pod(environment: Mapping[str, str]) -> bool:
    """Whether this is one TPU host of several; those of Colab and Kaggle are alone."""
    from jax._src import cloud_tpu_init  # jax's own test: libtpu and TPU chips are here
    from jax._src.clusters.cloud_tpu_cluster import GceTpuCluster

    if environment.get("JAX_PLATFORMS", "tpu").split(",")[0] != "tpu" or not cloud_tpu_init.running_in_cloud_tpu_vm:
        return False
    hosts = environment.get("TPU_PROCESS_ADDRESSES") or environment.get("TPU_WORKER_HOSTNAMES", "")
    bounds = environment.get("TPU_PROCESS_BOUNDS", "")
    if "," in hosts or int(environment.get("MEGASCALE_NUM_SLICES") or 1) > 1:
        return True
    if hosts or bounds or environment.get("TPU_SKIP_MDS_QUERY"):
        return math.prod(int(bound) for bound in bounds.split(",") if bound) > 1
    try:  # Cloud TPU VMs are told by their metadata server only
        return GceTpuCluster.is_env_present() and GceTpuCluster.get_process_count() > 1
    except (OSError, ImportError):  # no such server, or no `requests`, which jax[tpu] brings
        return False


def whole_number(environment: Mapping[str, str], name: str, least: int, default: str = "") -> int:
    """The value of a variable. Raises ConfigError: no whole number, or less than `least`."""
    text = environment.get(name, default)
    if not text.isdecimal() or int(text) < least:
        raise ConfigError(f"{name} is {text!r}; cure: a whole number, {least} or more")
    return int(text)
