"""What is asked of a model and what comes back. No jax: a server's client needs none."""

from __future__ import annotations

from dataclasses import dataclass

from steerjax.errors import ConfigError


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn.

    Attributes:
        temperature: divides the logits; 0 takes the most likely token (greedy).
        top_k: only so many of the most likely tokens; 0 is all.
        top_p: only the fewest most likely tokens, of those that top-k left, whose probabilities add up to it.
        seed: the same seed and prompt give the same text.
        max_new_tokens: a response that has not ended by then is cut.

    Among tokens of equal probability the one with the lower id comes first.

    Raises:
        ConfigError: a value out of range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    max_new_tokens: int = 512

    def __post_init__(self):
        for name, holds, cure in (
            ("temperature", 0 <= self.temperature < float("inf"), "0 (greedy) or more"),
            ("top_k", self.top_k >= 0, "0 (all tokens) or more"),
            ("top_p", 0 < self.top_p <= 1, "more than 0 and at most 1"),
            ("seed", 0 <= self.seed < 2**31, "0 to 2^31 - 1"),
            ("max_new_tokens", self.max_new_tokens >= 1, "at least 1"),
        ):
            if not holds:
                raise ConfigError(f"{name} is {getattr(self, name)}; cure: {cure}")


@dataclass(frozen=True)
class Answer:
    """A response.

    Attributes:
        text: without its end.
        finish: "stop", the model ended its turn; "length", it was cut at `max_new_tokens`.
        tokens: how many were drawn, the end included; None where a server does not say.
        ids: those tokens; empty from a server.
    """

    text: str
    finish: str
    tokens: int | None
    ids: tuple[int, ...] = ()
