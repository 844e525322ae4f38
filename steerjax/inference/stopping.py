"""Where a response ends: at the template's end of turn (`<|im_end|>`, `"\\n<extra_id_1>"`) or any control string.

That may be several tokens, joined with what stands before. So the device looks for the token sequences that it is
usually written with, and the host for the strings, which decides.
"""

import functools
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from steerjax.chat.templates import Template
from steerjax.chat.tokenizer import Tokenizer
from steerjax.inference.steering import end_space


class Stops:
    """The ends of a response, for one tokenizer and template. `tokens`: ids that are an end by themselves."""

    def __init__(self, tokenizer: Tokenizer, template: Template):
        self._tokenizer, self._template = tokenizer, template
        self._strings = sorted(template.control_strings | tokenizer.special_strings)
        marked = {tokenizer.token_id(string) for string in template.control_strings}
        self._ids = {tokenizer.eos_id, tokenizer.bos_id} - marked - {None}  # those of the template are found as text
        encode = functools.partial(tokenizer.encode, continuation=True, controls=template.control_strings)
        sequences = {(index,) for index in self._ids} | {tuple(encode(s)) for s in (*self._strings, template.end)}
        self.tokens = sorted(ids[0] for ids in sequences if len(ids) == 1)
        several = sorted(ids for ids in sequences if len(ids) > 1)
        longest = max(map(len, several), default=0)
        self._several = np.array([(-1,) * (longest - len(ids)) + ids for ids in several], np.int32)  # -1: any token

    def ended(self, tokens: Int[Array, "B M"], last: Int[Array, "*B"]) -> Bool[Array, " B"]:
        """Whether an end is written with the tokens of each row up to its `last`."""
        last = jnp.broadcast_to(last, len(tokens))[:, None]
        found = jnp.isin(jnp.take_along_axis(tokens, last, axis=1)[:, 0], jnp.array(self.tokens, jnp.int32))
        if len(self._several):
            places = last - self._several.shape[1] + 1 + jnp.arange(self._several.shape[1])
            window = jnp.take_along_axis(tokens, jnp.maximum(places, 0), axis=1)
            window = jnp.where(places >= 0, window, -2)  # -2: no token
            same = (window[:, None] == self._several) | (self._several == -1)
            found |= same.all(-1).any(-1)
        return found

    def find(self, tokens: Sequence[int]) -> tuple[str, bool]:
        """The response that these tokens spell, without its end, and whether that was found."""
        tokens = list(map(int, tokens))
        stopped = bool(tokens) and tokens[-1] in self._ids
        text = self._tokenizer.decode(tokens[:-1] if stopped else tokens, continuation=True)
        places = [text.index(string) for string in self._strings if string in text]
        if places:
            text, stopped = text[: min(places)].removesuffix(end_space(self._template)), True
        return self._template.answer(text), stopped

    def settled(self, text: str) -> str:
        """As much of an unfinished response as later tokens cannot change."""
        text = text.rstrip("\ufffd")  # half of a character
        for string in self._strings:
            overlap = next((n for n in range(len(string) - 1, 0, -1) if text.endswith(string[:n])), 0)
            text = text[: len(text) - overlap]
        return text.rstrip()
