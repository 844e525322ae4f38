"""Ratings read off a language model's label lines: what transformers says, whatever texts are packed with."""

import os
from dataclasses import asdict, replace

import numpy as np
import pytest

from steerjax.bundle import open_bundle
from steerjax.chat.templates import TEMPLATES
from steerjax.errors import ModelError
from steerjax.export import export
from steerjax.inference.label_reader import make_question
from steerjax.inference.scorer import Scorer, assistant_turns
from steerjax.parallel.mesh import MeshConfig
from steerjax.schema import HELPSTEER, Attribute, Schema
from tests.hf.test_export import imported
from tests.inference.test_scorer import LONG, assert_same_scores, scores
from tests.refusals import names, refused
from tests.reward_models import chat_folder, some_conversations

TOLERANCE = 1e-4
TWO = Schema(HELPSTEER.attributes[:2])
WIDE = Schema((Attribute("wit", 1, 10), Attribute("depth", 0, 12)))  # 1 and 10 begin alike
MISTRAL = {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": 24}


@pytest.fixture(autouse=True)
def short_rows(monkeypatch):
    monkeypatch.setattr("steerjax.inference.packed._SHORTEST_ROW", 256)


def run(folder, workdir, schema=HELPSTEER, template="extra_id", **changes):
    """A checkpoint of a model that learnt label lines, with a folder's parameters."""
    said = {"objectives": ("attribute_lm",), "attributes": schema.to_json(), "rated_attributes": schema.names}
    imported(folder, workdir, template=template, **(said | changes))
    return workdir


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return chat_folder(tmp_path_factory.mktemp("chat"), context=512)


@pytest.fixture(scope="module")
def opened(folder, tmp_path_factory):
    return open_bundle(run(folder, tmp_path_factory.mktemp("run"), TWO))


def expected_ratings(model, renderer, conversation, turn) -> list[float]:
    """With one call of transformers' model a label, each text written anew."""
    import torch

    def log_likelihoods(tokens, start) -> list[float]:
        with torch.no_grad():
            logits = model(torch.tensor([tokens])).logits[0].log_softmax(-1)
        return [float(logits[place - 1, tokens[place]]) for place in range(start, len(tokens))]

    chosen, found = {}, []
    for place, attribute in enumerate(renderer.schema.attributes):
        after = {a.name: a.low for a in renderer.schema.attributes[place + 1 : place + 2]}  # what may come next
        texts = {
            label: renderer.rating_tokens(conversation, turn, chosen | {attribute.name: label} | after)[0].tolist()
            for label in attribute.labels
        }
        start = len(os.path.commonprefix(list(texts.values())))  # noqa: RUF071 - tokens
        chances = []
        for label, tokens in texts.items():
            others = (x for other, x in texts.items() if other != label)
            shared = max(len(os.path.commonprefix([tokens, x])) for x in others)  # noqa: RUF071 - tokens
            chances.append(np.exp(sum(log_likelihoods(tokens[: shared + 1], start))))
        chances = np.array(chances) / sum(chances)
        found.append(float(chances @ attribute.labels))
        chosen[attribute.name] = attribute.labels[int(chances.argmax())]
    return found


def assert_equal_to_transformers(bundle, folder) -> None:
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    conversations = some_conversations(4, seed=1, longest=20)
    ours = scores(Scorer(bundle), conversations)
    assert np.ptp(np.stack(list(ours.values())), axis=0).min() > 0.01
    theirs = {
        (conversation.id, turn): expected_ratings(model, bundle.renderer(), conversation, turn)
        for conversation in conversations
        for turn in assistant_turns(conversation)
    }
    assert_same_scores(ours, theirs, TOLERANCE)


@pytest.mark.parity
def test_expected_ratings_equal_transformers_on_an_export(folder, tmp_path):
    run(folder, tmp_path / "run")
    export(str(tmp_path / "run"), tmp_path / "out")
    assert_equal_to_transformers(open_bundle(tmp_path / "out"), tmp_path / "out")


@pytest.mark.parity
@pytest.mark.parametrize(
    ("template", "form", "schema", "changes"),
    [
        ("llama3", "numbers", WIDE, MISTRAL),
        pytest.param("chatml", "words", TWO, {}, marks=pytest.mark.slow),
        # which are no tokens of this tokenizer: a path goes through all of a name
        pytest.param("extra_id", "tokens", TWO, {}, marks=pytest.mark.slow),
    ],
)
def test_labels_of_several_tokens_equal_transformers(tmp_path, template, form, schema, changes):
    folder = chat_folder(tmp_path / "chat", context=512, **changes)
    run(folder, tmp_path / "run", schema, asdict(replace(TEMPLATES[template], labels=form)))
    assert_equal_to_transformers(open_bundle(tmp_path / "run"), folder)


@pytest.mark.slow
def test_ratings_do_not_depend_on_batch_order_packing_or_mesh(opened):
    conversations = [*some_conversations(8, longest=30), LONG]
    scorer = Scorer(opened)
    together = scores(scorer, conversations)
    assert scorer.counts.shapes == {(8, 256), (8, 512)}
    alone: dict = {}
    for conversation in conversations[::-1]:
        alone |= scores(scorer, [conversation])
    assert_same_scores(together, alone, TOLERANCE)
    sharded = open_bundle(opened.description.path, MeshConfig(data=2, fsdp=2, tensor=2))
    assert_same_scores(scores(Scorer(sharded, rows=4), conversations), alone, TOLERANCE)
    assert_same_scores(scores(scorer, conversations), together, tolerance=0)


def test_only_attributes_that_were_trained_are_rated(folder, tmp_path):
    scorer = Scorer(open_bundle(run(folder, tmp_path, rated_attributes=("verbosity", "correctness"))))
    assert scorer.schema.names == ("correctness", "verbosity")
    assert len(scorer._reader.questions) == 2


def test_a_label_line_needs_positions_too(opened):
    """The text fits the model, and its label line does not."""
    scorer = Scorer(opened, row_length=512)
    assert scorer._longest < 512 - 8
    text = replace(LONG, turns=(replace(LONG.turns[0], content="Go on. " * 10), LONG.turns[1]))
    length = len(scorer.prepare([text], [[1]]).trees[0].examples[0].tokens)
    scorer._longest = length - 1
    chunk = scorer.prepare([text], [[1]])
    reason = chunk.refused[0, 1].reason
    assert all(names(reason, fact) for fact in (str(length), "positions", "label line")), reason


def test_a_chat_model_that_learnt_no_label_line_is_refused(folder, tmp_path):
    imported(folder, tmp_path)
    with refused(ModelError, str(tmp_path), cure="reward model"):
        Scorer(open_bundle(tmp_path))


PATHS = {  # values, what follows -> the tokens that tell them apart
    "digits": ({0: [5], 1: [6]}, [9], {0: [5], 1: [6]}),
    "one and ten": ({1: [5], 10: [5, 4], 2: [6]}, [9, 8], {1: [5, 9], 10: [5, 4], 2: [6]}),
    "words": ({0: [7, 5], 1: [5], 2: [7, 6, 3]}, [9], {0: [7, 5], 1: [5], 2: [7, 6]}),
    "one": ({3: [5, 6]}, [9], {3: [5]}),
}


@pytest.mark.short
@pytest.mark.parametrize("case", PATHS)
def test_labels_are_told_apart_by_as_few_tokens_as_can_be(case):
    values, after, paths = PATHS[case]
    question = make_question([1, 2], values, after)
    assert [[t for t in row if t >= 0] for row in question.token.tolist()] == list(paths.values())
    tokens = [None, *question.nodes.tolist()]
    for at, path in zip(question.at, paths.values(), strict=True):
        assert [tokens[node] for node in at[1 : len(path)]] == path[: len(path) - 1]
    written = zip(question.written.tolist(), question.lengths, strict=True)
    assert [row[len(row) - n :] for row, n in written] == list(values.values())


@pytest.mark.short
def test_labels_of_the_same_tokens_are_refused():
    with pytest.raises(ValueError, match="1"):
        make_question([1], {1: [5], 2: [5]}, [9])
