"""A lower bound on the time of a step, from what the chip can do and what the compiled program must do."""

from __future__ import annotations

from dataclasses import dataclass

from steerjax.planning.compile import Compiled
from steerjax.planning.topology import Topology
from steerjax.training.config import Experiment

# What tuned training reaches of a chip's data sheet: MaxText's published Llama runs lie between 45% and 65% of the
# peak FLOP/s with recomputation left out of the count; a ring collective comes near four fifths of the links.
COMPUTE_PART, MEMORY_PART, LINK_PART = 0.6, 0.8, 0.8
RECOMPUTED = {"none": 0.0, "dots": 0.0, "full": 1 / 3}  # forward passes done again, of forward and backward (3)


@dataclass(frozen=True)
class Roofline:
    """Seconds a step on each resource, were it alone."""

    compute: float
    memory: float
    links: float

    @property
    def overlapped(self) -> float:
        """Seconds where all hide behind the slowest."""
        return max(self.compute, self.memory, self.links)

    @property
    def in_turn(self) -> float:
        """Seconds where nothing hides behind anything."""
        return self.compute + self.memory + self.links


def roofline(experiment: Experiment, topology: Topology, compiled: Compiled) -> Roofline:
    """Of a step whose rows are full. Over several nodes of GPUs all collectives are taken to cross the network."""
    chip, devices = topology.chip, topology.devices
    flops = compiled.flops * (1 + RECOMPUTED[experiment.compute.remat]) / devices
    bandwidth = chip.network_bandwidth if topology.on_gpu and topology.shape[0] > 1 else chip.link_bandwidth
    received = sum(c.received for c in compiled.collectives)
    return Roofline(
        compute=flops / (COMPUTE_PART * chip.peak_flops),
        memory=_memory_bytes(experiment, compiled, devices) / (MEMORY_PART * chip.hbm_bandwidth),
        links=received / (LINK_PART * bandwidth),
    )


def _memory_bytes(e: Experiment, compiled: Compiled, devices: int) -> float:
    """Bytes that a device reads from and writes to its memory in a step, roughly.

    The optimizer (32 a parameter: state, gradient, update), the layers' parameters in bfloat16 (a pass reads them, and
    a gather has written them before), the inputs and outputs of matrix products, and scores where the attention is not
    one kernel (12 a head and allowed pair: float32 and bfloat16, each written and read).
    """
    m = e.model
    passes = 4 if e.compute.remat == "full" else 3
    tokens = compiled.tokens * e.mesh.tensor / devices  # on one device, all micro-batches
    parameters = m.num_layers * m.block_parameters / e.mesh.tensor
    cut = 2 * (m.num_heads + m.num_kv_heads) * m.head_dim + 4 * m.intermediate_size  # over tensor
    widths = 7 * m.hidden_size + cut / e.mesh.tensor
    activations = 2 * tokens * m.num_layers * widths * passes
    scores = 0.0
    if compiled.attention == "chunked":
        heads = m.num_heads / e.mesh.tensor
        scores = 12 * tokens * m.num_layers * heads * e.batch.row_length / 2 * (passes + (e.compute.remat != "full"))
    return 32 * compiled.parameters / devices + 4 * parameters * passes * e.batch.micro_batches + activations + scores
