"""Ends of one token and of several, and what a stream may show of them."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from steerjax.chat.templates import CHATML, EXTRA_ID, LLAMA2, LLAMA3
from steerjax.chat.tokenizer import load_tokenizer
from steerjax.inference.stopping import Stops

pytestmark = pytest.mark.short
TOKENIZER = load_tokenizer("embedded")
TEMPLATES = pytest.mark.parametrize("template", [EXTRA_ID, CHATML, LLAMA2, LLAMA3], ids=lambda t: t.name)


def ids(text, template):
    return TOKENIZER.encode(text, continuation=True, controls=template.control_strings)


def ends_at(stops, tokens):
    """The place at which the device sees an end."""
    padded = jnp.asarray([tokens + [0] * 8])
    return next((i for i in range(len(tokens)) if stops.ended(padded, jnp.int32(i))[0]), None)


@TEMPLATES
@pytest.mark.parametrize("text", ["Yes.", "A: 1 < 2\n\nB", "", "é 😀"])
def test_the_end_is_seen_where_it_ends_and_is_no_text(template, text):
    stops = Stops(TOKENIZER, template)
    written = ids(text + template.end, template)
    assert ends_at(stops, written) == len(written) - 1
    assert stops.find(written) == (text, True)
    assert stops.find(ids(text, template)) == (text, False)


def test_several_tokens():
    """The embedded tokenizer has no piece for Llama 3's control strings."""
    assert len(ids(LLAMA3.end, LLAMA3)) > 3
    stops = Stops(TOKENIZER, LLAMA3)
    almost = ids(LLAMA3.end, LLAMA3)[:-1] + ids(" no", LLAMA3)
    assert ends_at(stops, almost) is None
    # Spelt in pieces of one character, which the device does not know, the host does.
    spelt = [i for character in "ok" + LLAMA3.end for i in ids(character, LLAMA3)]
    assert stops.find(spelt) == ("ok", True)


def test_other_ends():
    """End of text, and a control string that opens another turn."""
    stops = Stops(TOKENIZER, EXTRA_ID)
    eos = [*ids("hi\n", EXTRA_ID), TOKENIZER.eos_id]
    assert ends_at(stops, eos) == len(eos) - 1
    assert stops.find(eos) == ("hi\n", True)  # only the template's end takes a newline with it
    assert stops.find(ids("hi\n<extra_id_0>System", EXTRA_ID)) == ("hi", True)
    assert stops.find(ids(" hi \n", CHATML))[0] == " hi \n"
    assert Stops(TOKENIZER, CHATML).find(ids(" hi \n", CHATML))[0] == "hi"


def test_an_end_of_text_that_is_the_templates_end():
    """As exports name it: what belongs to the end goes with it."""
    tokenizer = dataclasses.replace(TOKENIZER, eos_id=TOKENIZER.token_id("<extra_id_1>"))
    assert Stops(tokenizer, EXTRA_ID).find(ids("hi" + EXTRA_ID.end, EXTRA_ID)) == ("hi", True)


@TEMPLATES
def test_what_is_shown_stays(template):
    stops = Stops(TOKENIZER, template)
    tokens = ids("A 😀 b <\nc <|x|> <extra\n\nd" + template.end, template)
    final, shown = stops.find(tokens)[0], ""
    for count in range(len(tokens)):
        ready = stops.settled(stops.find(tokens[:count])[0])
        assert final.startswith(ready)
        shown = max(shown, ready, key=len)
    assert len(shown) > 10
    assert np.isin(stops.tokens, np.arange(TOKENIZER.vocab_size)).all()


def test_an_id_that_spells_nothing():
    """An embedding may have more rows than its tokenizer has tokens, and any of them may be drawn."""
    tokens = [*ids("hi", EXTRA_ID), TOKENIZER.vocab_size, TOKENIZER.vocab_size + 1000]
    assert Stops(TOKENIZER, EXTRA_ID).find(tokens) == ("hi", False)
