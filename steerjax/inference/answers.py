"""What is asked of a model and what comes back. No jax: a server's client needs none."""

from __future__ import annotations

import dataclasses
from typing import Annotated

import pydantic.dataclasses
from pydantic import Field

from steerjax.typed import STRICT


@pydantic.dataclasses.dataclass(frozen=True, config=STRICT)
class Sampling:
    """How tokens are drawn. From outside, `typed(Sampling, ...)` words what is out of range.

    Attributes:
        temperature: divides the logits; 0 takes the most likely token (greedy).
        top_k: only so many of the most likely tokens; 0 is all.
        top_p: only the fewest most likely tokens, of those that top-k left, whose probabilities add up to it.
        seed: the same seed and prompt give the same text.
        max_new_tokens: a response that has not ended by then is cut.

    Among tokens of equal probability the one with the lower id comes first.
    """

    temperature: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    top_k: Annotated[int, Field(ge=0)] = 0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    max_new_tokens: Annotated[int, Field(ge=1)] = 512


@dataclasses.dataclass(frozen=True)
class Answer:
    """A response.

    Attributes:
        text: without its end.
        finish: "stop", the model ended its turn; "length", it was cut at `max_new_tokens`; a server has more words.
        tokens: how many were drawn, the end included; None where a server does not say.
        ids: those tokens; empty from a server.
    """

    text: str
    finish: str
    tokens: int | None
    ids: tuple[int, ...] = ()
