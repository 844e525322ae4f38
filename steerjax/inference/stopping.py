"""Where a response ends.

The end of a turn is a string of the template (`<|im_end|>`, `"\\n<extra_id_1>"`). With most tokenizers it is one token,
with others several, and those may join what stands before it. So the device looks for the token sequences that the
end is usually written with, and the host looks for the strings, which decides.

Any other control string ends a response too: what the model writes after it is no text of this turn.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from steerjax.chat.templates import Template
from steerjax.chat.tokenizer import Tokenizer


class Ending(NamedTuple):
    """The text of a response, and whether its end was found in it."""

    text: str
    stopped: bool


class Stops:
    """The ends of a response, for one tokenizer and template.

    Attributes:
        tokens: ids that are an end by themselves.
    """

    def __init__(self, tokenizer: Tokenizer, template: Template):
        self._tokenizer, self._template = tokenizer, template
        self._strings = sorted(template.control_strings | tokenizer.special_strings)
        self._ids = {index for index in (tokenizer.eos_id, tokenizer.bos_id) if index is not None}
        written = [
            tokenizer.encode(string, continuation=True, controls=template.control_strings)
            for string in (*self._strings, template.end)
        ]
        sequences = {tuple(ids) for ids in written} | {(index,) for index in self._ids}
        self.tokens = sorted(ids[0] for ids in sequences if len(ids) == 1)
        several = sorted(ids for ids in sequences if len(ids) > 1)
        longest = max(map(len, several), default=0)
        self._several = np.array([(-1,) * (longest - len(ids)) + ids for ids in several], np.int32)  # -1: any token

    def ended(self, tokens: Int[Array, "B M"], last: Int[Array, ""]) -> Bool[Array, " B"]:
        """Whether an end is written with the tokens up to `last`."""
        found = jnp.isin(tokens[:, last], jnp.array(self.tokens, jnp.int32))
        if len(self._several):
            places = last - self._several.shape[1] + 1 + jnp.arange(self._several.shape[1])
            window = jnp.where(places >= 0, tokens[:, jnp.maximum(places, 0)], -2)  # -2: no token
            same = (window[:, None] == self._several) | (self._several == -1)
            found |= same.all(-1).any(-1)
        return found

    def find(self, tokens: Sequence[int]) -> Ending:
        """The response that these tokens spell, without its end."""
        tokens = list(map(int, tokens))
        stopped = bool(tokens) and tokens[-1] in self._ids
        text = self._tokenizer.decode(tokens[:-1] if stopped else tokens, continuation=True)
        places = [text.index(string) for string in self._strings if string in text]
        if places:
            end = self._template.end  # may begin with white space
            text, stopped = text[: min(places)].removesuffix(end[: len(end) - len(end.lstrip())]), True
        return Ending(text.strip() if self._template.strip else text, stopped)

    def settled(self, ending: Ending) -> str:
        """As much of an unfinished response as later tokens cannot change."""
        text = ending.text.rstrip("\ufffd")  # half of a character
        for string in self._strings:
            overlap = next((n for n in range(len(string) - 1, 0, -1) if text.endswith(string[:n])), 0)
            text = text[: len(text) - overlap]
        return text.rstrip()
