"""The peer's batches in PyTorch: texts padded to the longest, as transformers wants them.

On a CPU it computes in float32, on a GPU in bfloat16 by autocast, as steerjax does; parameters are float32.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import LlamaForSequenceClassification, PreTrainedModel

BATCH = 8  # texts
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
PRECISION = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32  # of the computation


def padded(texts: Sequence[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids, and a mask that is 1 where they are; each int64 [B, T] on DEVICE, padded on the right with 0."""
    ids, mask = (torch.zeros(len(texts), max(map(len, texts)), dtype=torch.long) for _ in range(2))
    for row, text in enumerate(texts):
        ids[row, : len(text)] = torch.tensor(text)
        mask[row, : len(text)] = 1
    return ids.to(DEVICE), mask.to(DEVICE)


def rewards(model: LlamaForSequenceClassification, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """[B, A]. Read at the last token: transformers finds it by the padding token, which may be in a text."""
    with torch.autocast(DEVICE.type, PRECISION, enabled=torch.float32 != PRECISION):
        states = model.model(input_ids=ids, attention_mask=mask).last_hidden_state
    read = states[torch.arange(len(ids)), mask.sum(1) - 1]
    return model.score(read.to(model.score.weight.dtype)).float()


def adamw(model: PreTrainedModel, rate: float, betas: tuple[float, float], epsilon: float, decay: float):
    """The optimizer, with decay of matrices alone."""
    matrices = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": matrices, "weight_decay": decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=rate, betas=betas, eps=epsilon, fused=DEVICE.type == "cuda" or None)
