"""What a checkpoint says about itself (design, decision 13); read again by whoever opens or resumes it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import pydantic.dataclasses

from steerjax.errors import CheckpointError
from steerjax.models.config import LlamaConfig
from steerjax.schema import Attribute
from steerjax.typed import STRICT, read_json

EDITION = 2


@pydantic.dataclasses.dataclass(frozen=True, config=STRICT)
class TokenizerSource:
    """Where a run had its tokenizer from, and the hash of the file that defines its ids."""

    source: str
    sha256: str


@pydantic.dataclasses.dataclass(frozen=True, config=STRICT)
class Provenance:
    """Of a checkpoint.

    Attributes:
        edition: of the checkpoint's form.
        steerjax: version.
        kind: "reward" or "chat".
        objectives: what was trained.
        attributes: the schema.
        rated_attributes: those of a reward model that had ratings to learn from.
        default_ratings: what a chat model is asked for where a request names nothing.
        model, template, system_prompt, readout: as in `hf.description.Description`.
        base_model: where training started from.
        data: source -> hash.
        config: the resolved experiment.
        accepted: changes of data or tokenizer between two starts that the user accepted.
    """

    steerjax: str
    kind: Literal["reward", "chat"]
    objectives: tuple[str, ...]
    attributes: tuple[Attribute, ...]
    model: LlamaConfig
    template: str
    system_prompt: str | None
    readout: Literal["last", "mean"]
    tokenizer: TokenizerSource
    base_model: str
    data: dict[str, str]
    config: dict[str, Any]
    rated_attributes: tuple[str, ...] | None = None
    default_ratings: dict[str, float] | None = None
    accepted: tuple[str, ...] = ()
    edition: Literal[2] = EDITION


def read_provenance(directory: Path) -> Provenance:
    """Of `checkpoints/STEP`.

    Raises:
        CheckpointError: a run of another edition, or a broken file.
    """
    file = directory / "provenance" / "metadata"
    cure = "another step of the run"
    try:
        edition = json.loads(file.read_text(encoding="utf-8")).get("edition", 1)
    except (OSError, ValueError, AttributeError) as error:
        raise CheckpointError(f"'{file}' is broken ({error})\n  cure: {cure}") from None
    if edition != EDITION:
        raise CheckpointError(
            f"'{directory}' is a run of edition {edition} of steerjax, and this is edition {EDITION}\n"
            "  cure: train again, or export it with the version that trained it"
        )
    return read_json(Provenance, file, CheckpointError, cure)
