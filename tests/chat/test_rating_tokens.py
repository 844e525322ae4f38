"""The label line behind a response: NeMo's text, and decoding starts from the tokens that training saw."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
from chat_helpers import talk

from steerjax.chat.render import Renderer
from steerjax.chat.templates import TEMPLATES
from steerjax.data.conversation import Turn
from steerjax.errors import DataError
from steerjax.schema import HELPSTEER, STEERLM
from tests.refusals import refused

TALK = talk("Hi", "Yo.", "More?\n", "No: 3", system="SYS", file="rows.jsonl", line=3)
RATINGS = {"helpfulness": 2.5, "coherence": 4.0, "verbosity": 0.0}
TOKENIZERS = ("embedded", "gpt2_like", "llama3_like", "llama_spm", "llama_hf", "nfkc", "smollm2")


@pytest.mark.parametrize("form", ["numbers", "words", "tokens"])
@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("name", TOKENIZERS)
def test_decoding_starts_from_what_training_saw_and_can_write_every_line(name, template, form, request):
    tokenizer = request.getfixturevalue(name)
    renderer = Renderer(tokenizer, replace(TEMPLATES[template], labels=form), HELPSTEER)
    conversation = TALK if TEMPLATES[template].system else replace(TALK, system=None)
    for turn, values in itertools.product((1, 3), ((0, 4, 2), (3, 1, 0))):
        ratings = dict(zip(RATINGS, map(float, values), strict=True))
        tokens, root, places = renderer.rating_tokens(conversation, turn, ratings)
        prompt, same_root, none = renderer.rating_tokens(conversation, turn, {})
        parts, end = renderer.rating_parts(RATINGS)
        line = [token for part, v in zip(parts, values, strict=True) for token in (*part.before, *part.values[v])]
        assert tokens.tolist() == [*prompt, *line, *end]
        assert (root, len(none), places.tolist()) == (same_root, 0, [*range(len(prompt), len(tokens))])
        reward, _ = renderer.reward_tokens(conversation, turn)
        assert prompt[: len(reward)].tolist() == reward.tolist()


@pytest.mark.parametrize(
    ("template", "written"),
    [
        ("extra_id", "Yo.\n<extra_id_2>helpfulness:2,coherence:4,verbosity:0\n"),
        ("chatml", "Yo.<|im_end|><|attributes|>helpfulness:2,coherence:4,verbosity:0\n"),
        ("llama2", "Yo. </s> <|attributes|>helpfulness:2,coherence:4,verbosity:0\n"),
    ],
)
def test_the_text(embedded, template, written):
    renderer = Renderer(embedded, TEMPLATES[template], STEERLM)
    rendered = renderer.render(TALK, rated=1, rating=RATINGS)
    assert rendered.text.endswith(written)
    tokens, _, places = renderer.rating_tokens(TALK, 1, RATINGS)
    assert embedded.decode(tokens[places], continuation=True) == written[written.index("helpfulness") :]


def test_the_references_text(embedded):
    """NeMo-Aligner's row for TEXT_TO_VALUE, with earlier turns unlabelled as in its reward model's data."""
    rendered = Renderer(embedded, TEMPLATES["extra_id"], STEERLM).render(TALK, rated=3, rating={"quality": 4})
    assert rendered.text == (
        "<extra_id_0>System\nSYS\n<extra_id_1>User\nHi\n<extra_id_1>Assistant\nYo.\n<extra_id_1>User\nMore?\n\n"
        "<extra_id_1>Assistant\nNo: 3\n<extra_id_2>quality:4\n"
    )


def test_a_response_that_spells_a_label_writes_none(embedded):
    renderer = Renderer(embedded, TEMPLATES["extra_id"], STEERLM)
    marker = embedded.token_id("<extra_id_2>")
    looks = replace(TALK, turns=(TALK.turns[0], Turn("assistant", "Yo.\n<extra_id_2>quality:4\n")))
    tokens, _, places = renderer.rating_tokens(looks, 1, {"quality": 1})
    assert np.flatnonzero(tokens == marker).tolist() == [places[0] - 1]


def test_what_cannot_be_rated_names_its_place(embedded):
    renderer = Renderer(embedded, TEMPLATES["extra_id"], STEERLM)
    with refused(DataError, "rows.jsonl:3", "turns[1].ratings.wit", cure="quality"):
        renderer.rating_tokens(TALK, 1, {"wit": 1.0})
    with refused(DataError, "turns[0]", cure="assistant turn"):
        renderer.rating_tokens(TALK, 0, {"quality": 1.0})
