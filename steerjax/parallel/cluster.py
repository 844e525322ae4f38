"""Which processes make up this run, as the environment tells.

STEERJAX_COORDINATOR (host:port of process 0), STEERJAX_PROCESSES and STEERJAX_PROCESS say it anywhere; Cloud TPU, GKE
with TPUs, Slurm (srun) and Open MPI 4 need none of them.
"""

import re
from collections.abc import Mapping

from steerjax.errors import ConfigError

PLAIN = ("STEERJAX_COORDINATOR", "STEERJAX_PROCESSES", "STEERJAX_PROCESS")


def find_cluster(environment: Mapping[str, str]) -> dict | None:
    """Arguments of jax.distributed.initialize, {} where jax finds out for itself; None for a single process.

    Raises:
        ConfigError: names the variable.
    """
    if missing := [name for name in PLAIN if not environment.get(name)]:
        if len(missing) < len(PLAIN):
            raise ConfigError(f"{', '.join(missing)} not set; cure: set all three of {', '.join(PLAIN)}, or none")
        if whole_number(environment, "SLURM_NTASKS", 1, "1") > 1 and "SLURM_STEP_NODELIST" in environment:
            return {"local_device_ids": _slurm_devices(environment)}
        several = whole_number(environment, "OMPI_COMM_WORLD_SIZE", 1, "1") > 1 or _on_tpu_pod(environment)
        return {} if several else None
    address = environment["STEERJAX_COORDINATOR"]
    if not re.fullmatch(r".+:\d+", address):
        raise ConfigError(f"STEERJAX_COORDINATOR is {address!r}; cure: host:port of process 0, e.g. node1:9876")
    count = whole_number(environment, "STEERJAX_PROCESSES", 1)
    index = whole_number(environment, "STEERJAX_PROCESS", 0)
    if index >= count:
        raise ConfigError(f"STEERJAX_PROCESS is {index} of {count} processes; cure: 0 to {count - 1}")
    plain = {"coordinator_address": address, "num_processes": count, "process_id": index}
    return plain | {"cluster_detection_method": "deactivate"} if count > 1 else None


def _slurm_devices(environment: Mapping[str, str]) -> list[int]:
    """Which of the GPUs it sees a task takes; [] is all. (jax always takes one, so one task a node left the rest idle.)

    With `srun --gpus-per-task` a task sees its own GPUs only, else all of the node's, which its tasks share out.
    """
    tasks = re.sub(r"\(x\d+\)$", "", environment.get("SLURM_STEP_TASKS_PER_NODE", "1"))  # 8 of 8(x2), two nodes of 8
    gpus = environment.get("CUDA_VISIBLE_DEVICES", "").count(",") + 1
    if tasks == "1" or gpus == 1 or "SLURM_GPUS_PER_TASK" in environment:
        return []
    if not tasks.isdecimal() or gpus % int(tasks):
        raise ConfigError(f"{tasks} Slurm tasks on a node cannot share its {gpus} GPUs; cure: one task a node or a GPU")
    each, local = gpus // int(tasks), whole_number(environment, "SLURM_LOCALID", 0)
    return list(range(local * each, (local + 1) * each))


def _on_tpu_pod(environment: Mapping[str, str]) -> bool:
    """Whether this is one TPU host of several; those of Colab and Kaggle are alone."""
    from jax._src import cloud_tpu_init  # jax's own test: libtpu and TPU chips are here
    from jax._src.clusters.cloud_tpu_cluster import GceTpuCluster

    if environment.get("JAX_PLATFORMS", "tpu").split(",")[0] != "tpu" or not cloud_tpu_init.running_in_cloud_tpu_vm:
        return False
    hosts = environment.get("TPU_PROCESS_ADDRESSES") or environment.get("TPU_WORKER_HOSTNAMES", "")
    if hosts or environment.get("TPU_SKIP_MDS_QUERY"):
        return "," in hosts or whole_number(environment, "MEGASCALE_NUM_SLICES", 1, "1") > 1
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
