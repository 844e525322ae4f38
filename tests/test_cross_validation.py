"""The folds of benchmarks/cross_validation.py."""

import pytest

from benchmarks.cross_validation import kfold_by_prompt
from steerjax.data.conversation import Conversation, Turn
from steerjax.data.loading import shared_prompts
from steerjax.errors import ConfigError
from tests.refusals import refused


def made_up(prompts, responses=3):
    return [
        Conversation((Turn("user", f"prompt {p}"), Turn("assistant", f"answer {r}")), line=p * responses + r)
        for p in range(prompts)
        for r in range(responses)
    ]


def test_folds_cover_every_prompt_once():
    conversations = made_up(prompts=11)
    parts = [kfold_by_prompt(conversations, 4, fold, seed=3) for fold in range(4)]
    held_out = [{c.turns[0].content for c in validation} for _, validation in parts]
    assert sorted(map(len, held_out)) == [2, 3, 3, 3]
    assert sorted(c.line for _, validation in parts for c in validation) == [c.line for c in conversations]
    for train, validation in parts:
        assert shared_prompts(train, validation) == 0
        assert len(train) + len(validation) == len(conversations)


def test_data_of_one_prompt_is_cut_by_row():
    essays = [Conversation((Turn("user", "Write."), Turn("assistant", f"essay {i}")), line=i) for i in range(40)]
    folds = [kfold_by_prompt(essays, 5, fold, seed=1)[1] for fold in range(5)]
    assert [len(fold) for fold in folds] == [8] * 5
    assert sorted(c.line for fold in folds for c in fold) == list(range(40))


@pytest.mark.parametrize("folds", [1, 4])
def test_folds_that_cannot_be(folds):
    with refused(ConfigError, cure="--folds"):
        kfold_by_prompt(made_up(prompts=3), folds, 0, seed=0)
