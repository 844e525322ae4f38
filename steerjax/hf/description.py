"""What is known of a model besides its arrays."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from steerjax.chat.templates import Template
from steerjax.chat.tokenizer import Tokenizer
from steerjax.models.config import LlamaConfig
from steerjax.schema import Schema


@dataclass(frozen=True)
class ModelDescription:
    """A model that can be opened. No arrays, and no jax to make one.

    Attributes:
        path: a Hugging Face folder, or `checkpoints/STEP` of a run.
        kind: "reward", or "chat" (any causal language model).
        model: the architecture.
        tokenizer, template: how a conversation becomes tokens.
        schema: the attributes in order; None for a model that says nothing about them.
        system_prompt: of conversations without one; None is the template's own.
        readout: where a reward is read, "last" or "mean".
        default_ratings: what a chat model is asked for where a request names nothing.
        provenance: what the checkpoint or export says about its making; empty for a model that is not ours.
    """

    path: Path
    kind: str
    model: LlamaConfig
    tokenizer: Tokenizer
    template: Template
    schema: Schema | None
    system_prompt: str | None
    readout: str
    default_ratings: Mapping[str, float] | None
    provenance: Mapping[str, Any]
