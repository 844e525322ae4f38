"""What the environment says of a run's processes."""

import pytest

from steerjax.errors import ConfigError
from steerjax.parallel.cluster import find_cluster
from tests.refusals import refused

pytestmark = pytest.mark.short

PLAIN = {"STEERJAX_COORDINATOR": "node1:99", "STEERJAX_PROCESSES": "2", "STEERJAX_PROCESS": "1"}


@pytest.mark.parametrize(
    ("change", "facts", "cure"),
    [
        ({"STEERJAX_PROCESS": ""}, ["STEERJAX_PROCESS"], "STEERJAX_PROCESSES"),
        ({"STEERJAX_PROCESS": "2"}, ["STEERJAX_PROCESS", "2"], "0 to 1"),
        ({"STEERJAX_PROCESS": "-1"}, ["STEERJAX_PROCESS", "-1"], "0 or more"),
        ({"STEERJAX_PROCESSES": "two"}, ["STEERJAX_PROCESSES", "two"], "1 or more"),
        ({"STEERJAX_COORDINATOR": "node1"}, ["STEERJAX_COORDINATOR", "node1"], "host:port"),
    ],
)
def test_an_environment_that_makes_no_sense_is_refused(change, facts, cure):
    with refused(ConfigError, *facts, cure=cure):
        find_cluster(PLAIN | change)


def test_one_process():
    assert find_cluster({}) is None
    assert find_cluster(PLAIN | {"STEERJAX_PROCESSES": "1", "STEERJAX_PROCESS": "0"}) is None


SLURM = {"SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "n[1-2]", "SLURM_NTASKS": "2", "SLURM_PROCID": "1",
         "SLURM_LOCALID": "0", "SLURM_NODEID": "1", "SLURM_STEP_TASKS_PER_NODE": "1(x2)"}  # fmt: skip
EIGHT = "0,1,2,3,4,5,6,7"


@pytest.mark.parametrize(
    ("change", "devices"),
    [
        ({"CUDA_VISIBLE_DEVICES": EIGHT}, []),  # one task a node: all of its GPUs
        ({"SLURM_NTASKS": "16", "SLURM_STEP_TASKS_PER_NODE": "8(x2)", "SLURM_LOCALID": "3",
          "CUDA_VISIBLE_DEVICES": EIGHT}, [3]),  # one task a GPU, all see all
        ({"SLURM_NTASKS": "16", "SLURM_STEP_TASKS_PER_NODE": "8(x2)", "SLURM_LOCALID": "3",
          "CUDA_VISIBLE_DEVICES": "3"}, []),  # one task a GPU, bound to it
        ({"SLURM_NTASKS": "4", "SLURM_STEP_TASKS_PER_NODE": "2(x2)", "SLURM_LOCALID": "1",
          "CUDA_VISIBLE_DEVICES": EIGHT}, [4, 5, 6, 7]),  # two tasks a node
        ({"SLURM_NTASKS": "6", "SLURM_STEP_TASKS_PER_NODE": "4,2", "SLURM_GPUS_PER_TASK": "2",
          "CUDA_VISIBLE_DEVICES": "0,1"}, []),  # a task sees its own GPUs only
    ],
)  # fmt: skip
def test_slurm_tasks_share_out_a_nodes_gpus(change, devices):
    assert find_cluster(SLURM | change) == {"local_device_ids": devices}


def test_other_launchers():
    assert find_cluster(SLURM | {"SLURM_NTASKS": "1"}) is None
    assert find_cluster({"OMPI_COMM_WORLD_SIZE": "4", "OMPI_MCA_orte_hnp_uri": "1.0;tcp://10.0.0.1:3"}) == {}


@pytest.mark.parametrize("tasks", ["3(x2)", "4,2", "4(x2),2"])
def test_slurm_tasks_that_cannot_share_a_nodes_gpus_evenly_are_refused(tasks):
    with refused(ConfigError, "Slurm", tasks[0], "8 GPUs"):
        find_cluster(SLURM | {"SLURM_STEP_TASKS_PER_NODE": tasks, "CUDA_VISIBLE_DEVICES": EIGHT})


@pytest.mark.parametrize(
    ("environment", "cluster"),
    [
        ({}, None),  # Colab: no metadata server
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, None),
        ({"TPU_PROCESS_ADDRESSES": "local", "TPU_SKIP_MDS_QUERY": "1"}, None),  # Kaggle
        ({"TPU_WORKER_HOSTNAMES": "t-0.svc,t-1.svc", "TPU_SKIP_MDS_QUERY": "true"}, {}),  # GKE
        ({"TPU_WORKER_HOSTNAMES": "t-0.svc", "MEGASCALE_NUM_SLICES": "2"}, {}),
        ({"TPU_WORKER_HOSTNAMES": "t-0.svc,t-1.svc", "JAX_PLATFORMS": "cpu"}, None),
    ],
)
def test_one_tpu_host_is_no_pod(monkeypatch, environment, cluster):
    for module in ("cloud_tpu_init", "clusters.cloud_tpu_cluster"):
        monkeypatch.setattr(f"jax._src.{module}.running_in_cloud_tpu_vm", True)
    monkeypatch.delenv("TPU_SKIP_MDS_QUERY", raising=False)

    def nobody(key):
        raise ConnectionError("no metadata server")

    monkeypatch.setattr("jax._src.clusters.cloud_tpu_cluster.get_metadata", nobody)
    assert find_cluster(environment) == cluster


def test_tpu_vms_are_counted_by_their_metadata(monkeypatch):
    for module in ("cloud_tpu_init", "clusters.cloud_tpu_cluster"):
        monkeypatch.setattr(f"jax._src.{module}.running_in_cloud_tpu_vm", True)
    monkeypatch.delenv("TPU_SKIP_MDS_QUERY", raising=False)
    said = {"agent-worker-number": "0", "tpu-env": "ZONE: 'x'"}
    monkeypatch.setattr("jax._src.clusters.cloud_tpu_cluster.get_metadata", lambda key: (said[key], 200))
    for endpoints, cluster in (("10.0.0.1", None), ("10.0.0.1,10.0.0.2", {})):
        said["worker-network-endpoints"] = endpoints
        assert find_cluster({}) == cluster
