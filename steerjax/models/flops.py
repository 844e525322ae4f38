"""Model FLOPs (no recomputation counted) and the one table of chips."""

from typing import NamedTuple

from steerjax.models.config import LlamaConfig

GIB = 2**30


class Chip(NamedTuple):
    """One device, from its vendor's data sheet."""

    peak_flops: float  # dense bfloat16 FLOP/s
    hbm_bytes: float = 0.0  # what a program can use; for a TPU what its compiler says, less than the data sheet's


# By the words in `jax.Device.device_kind`; the first that is found counts.
CHIPS = {
    "TPU v5 lite": Chip(197e12, 15.75 * GIB),
    "TPU v5": Chip(459e12, 95.73 * GIB),  # v5p, which calls itself either
    "TPU v6 lite": Chip(918e12, 31.24 * GIB),
    "TPU7x": Chip(2307e12),
    "H100": Chip(989e12, 79.1 * GIB),
    "H200": Chip(989e12, 139.8 * GIB),
    "A100": Chip(312e12, 79.1 * GIB),
}


def training_flops(
    config: LlamaConfig,
    tokens: int,
    attention_pairs: int,
    head_outputs: float = 0,
    frozen_layers: int = 0,
    cached: bool = False,
    head_trained: bool = True,
) -> float:
    """Model FLOPs of forward and backward pass.

    6 a token and parameter of the layers (2 forward, 4 backward), and 12 N H a layer for each (query, key) pair that
    the mask allows. Frozen layers have no backward pass, and `cached` no forward pass either. With adapters the layers'
    own parameters have no gradients, 2 less, and those of the adapters do; nor has a head that is not trained.

    Args:
        tokens: without padding. attention_pairs: the sum of until[j] - j over them.
        head_outputs: width of the head times the share of tokens it reads, e.g. the vocabulary for a language model.
    """
    whole = config.block_parameters + config.adapter_parameters
    learnt = config.adapter_parameters if config.lora.rank else whole
    pairs = attention_pairs * config.num_heads * config.head_dim
    forward, backward = 2.0 * tokens * whole + 4.0 * pairs, 2.0 * tokens * (whole + learnt) + 8.0 * pairs
    trained = config.num_layers - frozen_layers
    layers = trained * (forward + backward) + (0 if cached else frozen_layers * forward)
    return layers + (6.0 if head_trained else 4.0) * tokens * config.hidden_size * head_outputs


def peak_flops(device_kind: str) -> float | None:
    """Peak bfloat16 FLOP/s of a device, or None where the table lacks it (a CPU)."""
    return next((chip.peak_flops for words, chip in CHIPS.items() if words in device_kind), None)
