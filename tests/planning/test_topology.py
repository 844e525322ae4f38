"""Machines by name; what cannot be planned is refused with the cure."""

import importlib.util

import pytest

from steerjax.errors import ConfigError
from steerjax.parallel.mesh import MeshConfig, make_mesh
from steerjax.planning import topology as topologies
from steerjax.planning.topology import parse_topology, topology_devices
from tests.refusals import refused

pytestmark = pytest.mark.short


def test_names():
    assert parse_topology("v5p:4x4x8").devices == 128
    assert parse_topology("v5e:4x4").chip.peak_flops == 197e12
    assert parse_topology("h100:2x8").devices == 16
    for name in ("v5p-256", "v9:4x4", "v5p:4x4", "v5e:0x4", "v6e:4", "v5e:", ""):
        with refused(ConfigError, "--topology", cure="v5e:4x4"):
            parse_topology(name)


def test_without_libtpu_the_message_says_what_to_install(monkeypatch):
    monkeypatch.setattr(topologies.importlib.util, "find_spec", lambda name: None)
    with refused(ConfigError, cure="pip install libtpu"):
        topology_devices(parse_topology("v5e:4x4"))


@pytest.mark.tpu_compiler
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
def test_a_mesh_may_cut_an_axis_of_the_machine(monkeypatch):
    for name in ("JAX_PLATFORMS", "TPU_SKIP_MDS_QUERY", "ALLOW_MULTIPLE_LIBTPU_LOAD"):
        monkeypatch.setenv(name, "")  # and put back afterwards
    machine = parse_topology("v6e:4x4")
    topologies.prepare_environment(machine)
    mesh = make_mesh(MeshConfig(data=1, fsdp=8, tensor=2), topology_devices(machine))
    assert mesh.devices.shape == (1, 8, 2, 1)
    assert len(set(mesh.devices.flat)) == 16
    with refused(ConfigError, "--topology", "v6e:3x5"):
        topology_devices(parse_topology("v6e:3x5"))


@pytest.mark.skipif(importlib.util.find_spec("jax_cuda13_plugin") is not None, reason="the CUDA plugin is installed")
def test_without_the_cuda_plugin_the_message_says_what_to_install():
    with refused(ConfigError, "h100:1x8", cure="pip install 'jax[cuda13]"):
        topology_devices(parse_topology("h100:1x8"))
