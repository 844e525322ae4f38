"""Model FLOPs (no recomputation counted) and the one table of peaks."""

from __future__ import annotations

from steerjax.models.config import LlamaConfig

# Peak bfloat16 FLOP/s of a device, by the words in `jax.Device.device_kind`. Vendors' data sheets.
PEAK_FLOPS = {
    "TPU v5 lite": 197e12,
    "TPU v5p": 459e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
    "TPU7x": 2307e12,
    "H100": 989e12,
    "H200": 989e12,
    "A100": 312e12,
}


def training_flops(
    config: LlamaConfig,
    tokens: int,
    attention_pairs: int,
    head_outputs: float = 0,
    frozen_layers: int = 0,
    cached: bool = False,
) -> float:
    """Model FLOPs of forward and backward pass.

    6 a token and parameter of the layers (2 forward, 4 backward), and 12 N H a layer for each (query, key) pair that
    the mask allows: causal, and within segments, so that packing does not flatter. The embedding look-up is free.

    Args:
        tokens: without padding.
        attention_pairs: over all rows; see `data.packing.row_pairs`.
        head_outputs: width of the head times the share of tokens it reads, e.g. the vocabulary for a language model.
        frozen_layers: so many of the layers have no backward pass.
        cached: and no forward pass either.
    """
    layer = 6.0 * tokens * config.block_parameters + 12.0 * attention_pairs * config.num_heads * config.head_dim
    layers = config.num_layers - frozen_layers + (0 if cached else frozen_layers / 3)
    return layers * layer + 6.0 * tokens * config.hidden_size * head_outputs


def peak_flops(device_kind: str) -> float | None:
    """Peak bfloat16 FLOP/s of a device, or None where the table lacks it (a CPU)."""
    return next((peak for words, peak in PEAK_FLOPS.items() if words in device_kind), None)
