"""What the attribute model as a language model learns of a conversation, and that it learns it."""

import numpy as np
import pytest

from steerjax.chat.render import Renderer
from steerjax.chat.templates import TEMPLATES
from steerjax.chat.tokenizer import load_tokenizer
from steerjax.data.conversation import Conversation, Turn
from steerjax.data.packing import lay_out, pack
from steerjax.data.trees import grow
from steerjax.errors import DataError
from steerjax.objectives import Setting
from steerjax.objectives.attribute_lm import AttributeLM, AttributeLMConfig
from steerjax.objectives.objective import TRAIN, VALIDATION
from steerjax.schema import STEERLM
from tests.refusals import refused

pytestmark = pytest.mark.short

RENDERER = Renderer(load_tokenizer("embedded"), TEMPLATES["extra_id"], STEERLM)
TALK = Conversation(
    (
        Turn("user", "Hi"),
        Turn("assistant", "one", {"quality": 3.0}, id="m1"),
        Turn("user", "More"),
        Turn("assistant", "two", {"humor": 2.0, "quality": 0.6}, id="m2"),
    )
)


def objective(**limits) -> AttributeLM:
    return AttributeLM(AttributeLMConfig(), Setting(STEERLM, RENDERER, **limits))


def test_the_label_line_of_every_rated_turn_is_learnt_and_nothing_else():
    lm = objective()
    one, two = lm.examples(TALK, TRAIN)
    for example, line in ((one, "quality:3\n"), (two, "quality:1,humor:2\n")):
        assert RENDERER.tokenizer.decode(example.targets, continuation=True) == line
        np.testing.assert_array_equal(example.tokens[example.places + 1], example.targets)
        assert example.places[-1] == len(example.tokens) - 2
    said = RENDERER.tokenizer.decode(two.tokens)
    assert "quality:3" not in said  # an earlier rating would tell of this one
    assert lm.facts() == {"rated_attributes": ["quality", "humor"]}
    summary, missing = lm.summary()["attribute_lm, train"], [n for n in STEERLM.names if n not in ("quality", "humor")]
    count = len(one.places) + len(two.places)
    assert summary == f"2 rated responses; none rated for {', '.join(missing)}; {count} trained tokens"


def test_responses_share_their_prompt_and_a_text_with_two_labels_is_written_once():
    lm = objective()
    rated = (("one", 1), ("one", 2), ("two", 1))
    talks = [(TALK.turns[0], Turn("assistant", text, {"quality": rating})) for text, rating in rated]
    examples = [example for turns in talks for example in lm.examples(Conversation(turns), TRAIN)]
    (tree,) = grow(examples)
    prompt, (first, second, other) = examples[0].root, (len(example.tokens) for example in examples)
    assert tree.length < prompt + first + 6 + (other - prompt)
    (row,) = pack([tree], 256)
    weights = lay_out([tree], row, 256, ("attribute_lm",)).weights["attribute_lm"]
    assert weights.sum() == sum(len(example.places) for example in examples)
    assert second == first


@pytest.mark.parametrize("limits", [{"row_length": 30}, {"positions": 30}])
def test_a_text_that_is_too_long_with_its_label_line_leaves_nothing_behind(limits):
    lm = objective(**limits)
    with refused(DataError, "30", cure="config.data.on_bad_row"):
        lm.examples(TALK, TRAIN)
    assert (lm.data[TRAIN].rows, lm.tokens[TRAIN]) == ([], 0)


def test_no_rating_at_all_is_refused():
    lm = objective()
    for split in (TRAIN, VALIDATION):
        assert lm.examples(Conversation(TALK.turns[:1]), split) == []
    with refused(DataError, "train", cure="quality"):
        lm.check_data()
