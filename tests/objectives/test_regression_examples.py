"""Which texts a reward model learns from, and what is counted."""

import pytest

from steerjax.chat.render import Renderer
from steerjax.chat.templates import TEMPLATES
from steerjax.chat.tokenizer import load_tokenizer
from steerjax.data.conversation import Conversation, Turn
from steerjax.errors import DataError
from steerjax.objectives import Setting
from steerjax.objectives.objective import TRAIN, VALIDATION
from steerjax.objectives.regression import Regression, RegressionConfig
from steerjax.schema import STEERLM
from tests.refusals import refused

pytestmark = pytest.mark.short

RENDERER = Renderer(load_tokenizer("embedded"), TEMPLATES["extra_id"], STEERLM)
TALK = Conversation(
    (
        Turn("user", "Hi"),
        Turn("assistant", "one", {"quality": 3.0}, id="m1"),
        Turn("user", "More"),
        Turn("assistant", "two", {"quality": 1.0, "humor": 2.0}, id="m2"),
    )
)


def regression(**limits) -> Regression:
    return Regression(RegressionConfig(), Setting(STEERLM, RENDERER, **limits))


def test_every_rated_turn_is_read_at_its_end_and_a_shared_one_once():
    objective = regression()
    examples = objective.examples(TALK, TRAIN)
    texts = [RENDERER.tokenizer.decode(example.tokens) for example in examples]
    assert [text.rsplit("Assistant\n", 1)[1] for text in texts] == ["one\n<extra_id_2>", "two\n<extra_id_2>"]
    assert all(example.places.tolist() == [len(example.tokens) - 1] for example in examples)
    other = Conversation((*TALK.turns[:2], Turn("user", "Less"), Turn("assistant", "three", {"quality": 0.0}, id="m3")))
    assert len(objective.examples(other, TRAIN)) == 1
    assert (objective.data[TRAIN].shared, len(objective.data[TRAIN].rows)) == (1, 3)


def test_turns_that_a_file_numbers_row_by_row_are_not_shared():
    """Equal answers to different prompts neither."""
    objective = regression()
    for prompt, answer in (("Hi", "one"), ("Hello", "one"), ("Hey", "two")):
        turns = (Turn("user", prompt, id="0"), Turn("assistant", answer, {"quality": 3.0}, id="1"))
        assert len(objective.examples(Conversation(turns), TRAIN)) == 1
    assert objective.data[TRAIN].shared == 0


def test_a_conversation_without_a_rating_is_counted_and_none_at_all_refused():
    objective = regression()
    for split in (TRAIN, VALIDATION):
        assert objective.examples(Conversation(TALK.turns[:1]), split) == []
    assert objective.data[TRAIN].unrated == 1
    with refused(DataError, "train", cure="quality"):
        objective.check_data()


@pytest.mark.parametrize("limits", [{"row_length": 30}, {"positions": 30}])
def test_a_text_that_is_too_long_is_refused_and_leaves_nothing_behind(limits):
    """Else its ratings would be compared with predictions that nobody made."""
    objective = regression(**limits)
    with refused(DataError, "30", cure="config.data.on_bad_row"):
        objective.examples(TALK, TRAIN)
    assert objective.data[TRAIN].rows == []
