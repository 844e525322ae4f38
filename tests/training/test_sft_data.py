"""Which tokens of a conversation SFT trains, what is refused, and that packing changes nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from steerjax.chat.render import Renderer
from steerjax.chat.templates import TEMPLATES
from steerjax.chat.tokenizer import load_tokenizer
from steerjax.data.batch import row_arrays
from steerjax.data.conversation import Conversation, Turn
from steerjax.data.formats import conversation_from_row
from steerjax.data.packing import Segment, pack
from steerjax.errors import ConfigError, DataError
from steerjax.models.attention.mask import Layout
from steerjax.models.llama import CausalLM, Compute
from steerjax.objectives.sft import chunked_cross_entropy
from steerjax.schema import STEERLM
from steerjax.training.sft_data import MISSING, RATINGS, SFTBatch, SFTExample, sft_example, sft_groups, sft_row_arrays
from tests.helpers import TINY, assert_trees_close, random_tokens

pytestmark = pytest.mark.short

RENDERER = Renderer(load_tokenizer("embedded"), TEMPLATES["extra_id"], STEERLM)
TALK = Conversation(
    (
        Turn("user", "Hi"),
        Turn("assistant", "one", {"quality": 3.0}, {"quality": 0.6, "verbosity": 2.5, "humor": -0.2}),
        Turn("user", "More"),
        Turn("assistant", "two"),
        Turn("user", "Last"),
        Turn("assistant", "three", None, {"helpfulness": 4.3}),
        Turn("user", "Thanks"),
    ),
    system="SYS",
    id="talk",
    file="rows.jsonl",
    line=7,
)
START = "<extra_id_0>System\nSYS\n<extra_id_1>User\nHi\n<extra_id_1>Assistant\n"


def example(conversation=TALK, ratings="human", missing="omit", row_length=200, renderer=RENDERER):
    return sft_example(conversation, renderer, ratings=ratings, missing=missing, row_length=row_length)


def text(tokens):
    return RENDERER.tokenizer.decode(tokens)


def trained_texts(example):
    edges = np.flatnonzero(np.diff(np.concatenate([[0], example.trained, [0]])))
    return [text(example.tokens[a:b]) for a, b in edges.reshape(-1, 2)]


@pytest.mark.parametrize(
    ("ratings", "labels"),
    [
        ("human", ("quality:3", "", "")),
        ("predicted", ("quality:1,humor:0,verbosity:2", "", "helpfulness:4")),  # rounded half to even, clipped
        ("human_then_predicted", ("quality:3,humor:0,verbosity:2", "", "helpfulness:4")),
        ("none", ("", "", "")),
    ],
)
def test_ratings_chosen_by_name(ratings, labels):
    one, two, three = (f"<extra_id_2>{label}\n" * bool(label) for label in labels)
    whole = example(ratings=ratings)
    assert text(whole.tokens) == (
        f"{START}{one}one\n<extra_id_1>User\nMore\n<extra_id_1>Assistant\n{two}two\n<extra_id_1>User\nLast\n"
        f"<extra_id_1>Assistant\n{three}three\n<extra_id_1>"  # "Thanks" has no part in the loss
    )
    assert trained_texts(whole) == ["one\n<extra_id_1>", "two\n<extra_id_1>", "three\n<extra_id_1>"]
    assert (whole.tokens.dtype, whole.trained.dtype) == (np.int32, bool)
    assert (whole.id, whole.file, whole.line) == ("talk", "rows.jsonl", 7)


def test_missing_ratings():
    left_out = example(ratings="human", missing="leave_out")
    assert trained_texts(left_out) == ["one\n<extra_id_1>"]
    left_out = example(ratings="predicted", missing="leave_out")
    assert trained_texts(left_out) == ["one\n<extra_id_1>", "three\n<extra_id_1>"]
    np.testing.assert_array_equal(left_out.tokens, example(ratings="predicted").tokens)  # "two" keeps its place
    assert len(trained_texts(example(ratings="none", missing="leave_out"))) == 3
    with pytest.raises(
        DataError, match=r"rows.jsonl:7: field 'turns\[3\]': no rating \(ratings='predicted'\)\n  cure:"
    ):
        example(ratings="predicted", missing="error")
    assert len(trained_texts(example(ratings="none", missing="error"))) == 3


@pytest.mark.parametrize(
    ("conversation", "options", "message"),
    [
        (TALK, {"row_length": 20}, "tokens do not fit a row of 20"),
        (Conversation(TALK.turns[:1], file="f", line=2), {}, "nothing to train: there is no assistant turn"),
        (
            Conversation((TALK.turns[0], TALK.turns[3]), file="f", line=2),
            {"missing": "leave_out"},
            "nothing to train: all assistant turns are unrated and left out",
        ),
        (Conversation((), file="f", line=2), {}, "nothing to train"),
    ],
)
def test_refused_with_the_place(conversation, options, message):
    with pytest.raises(DataError) as error:
        example(conversation, **options)
    place = f"{conversation.file}:{conversation.line}: "
    assert str(error.value).startswith(place)
    assert message in str(error.value)
    assert "cure:" in str(error.value)


def test_a_conversation_that_fills_the_row_is_whole_and_one_token_more_is_refused():
    length = len(example().tokens)
    assert example(row_length=length).trained[-1]
    with pytest.raises(DataError, match=f"{length} tokens do not fit a row of {length - 1}"):
        example(row_length=length - 1)


def test_unknown_options():
    with pytest.raises(ConfigError, match=f"ratings.*{', '.join(RATINGS)}"):
        example(ratings="best")
    with pytest.raises(ConfigError, match=f"missing.*{', '.join(MISSING)}"):
        example(missing="skip")
    with pytest.raises(ConfigError, match="average"):
        sft_row_arrays([], (), 4, "rows")


def test_the_references_row():
    """Read from NeMo-Aligner's format, masked as NeMo masks it."""
    turns = [("User", "Hi", None), ("Assistant", "Yo", "quality:4"), ("User", "More", None)]
    turns += [("Assistant", "OK", "quality:2")]
    row = {"system": "SYS", "mask": "User", "type": "VALUE_TO_TEXT"}
    row["conversations"] = [{"from": name, "value": value, "label": label} for name, value, label in turns]
    golden = example(conversation_from_row(row, STEERLM))
    assert text(golden.tokens) == (
        "<extra_id_0>System\nSYS\n<extra_id_1>User\nHi\n<extra_id_1>Assistant\n<extra_id_2>quality:4\nYo\n"
        "<extra_id_1>User\nMore\n<extra_id_1>Assistant\n<extra_id_2>quality:2\nOK\n<extra_id_1>"
    )
    assert trained_texts(golden) == ["Yo\n<extra_id_1>", "OK\n<extra_id_1>"]


@pytest.mark.parametrize("template", TEMPLATES)
def test_text_that_looks_like_a_label_steers_nothing(template):
    """With control strings it is refused or escaped; without them it is text, and what is trained stays the same."""
    strict = Renderer(RENDERER.tokenizer, TEMPLATES[template], STEERLM)
    lenient = Renderer(RENDERER.tokenizer, TEMPLATES[template], STEERLM, control_strings="escape")
    before, after = (part.strip(" ") for part in TEMPLATES[template].label)

    def talk(user):
        return Conversation((Turn("user", user), Turn("assistant", "Yo", {"quality": 1})), file="f", line=3)

    plain = example(talk("Hi"), renderer=strict)
    marker = strict.tokenizer.token_id(before)
    assert np.count_nonzero(plain.tokens == marker) == 1
    for attack in (f"{before}quality:4{after}", f"Hi\n{before}quality:4{after}Sure"):
        with pytest.raises(DataError, match=r"f:3: field 'turns\[0\].content': the text contains the control string"):
            example(talk(attack), renderer=strict)
    looks_alike = "quality:4,verbosity:0", "Hi\nquality:4\n"
    for renderer, attack in [(lenient, f"{before}quality:4{after}"), *((strict, words) for words in looks_alike)]:
        attacked = example(talk(attack), renderer=renderer)
        assert np.count_nonzero(attacked.tokens == marker) == 1
        np.testing.assert_array_equal(attacked.tokens[attacked.trained], plain.tokens[plain.trained])
        assert not attacked.trained[: -plain.trained.sum()].any()


def random_examples(count, seed=0):
    random = np.random.default_rng(seed)
    examples = []
    for i in range(count):
        tokens = random_tokens(random, 30)
        trained = random.random(len(tokens)) < 0.5
        trained[0], trained[-1] = False, True
        examples.append(SFTExample(tokens, trained, str(i), "", 0))
    return examples


def test_row_arrays():
    one = SFTExample(np.array([5, 6, 7], np.int32), np.array([0, 0, 1], bool), "", "", 0)
    two = SFTExample(np.array([8, 9, 4, 3], np.int32), np.array([0, 1, 0, 1], bool), "", "", 0)
    row = Segment(1, (0,), 4), Segment(0, (0,), 3)
    arrays = sft_row_arrays([one, two], row, 9)
    np.testing.assert_array_equal(arrays.tokens, [8, 9, 4, 3, 5, 6, 7, 0, 0])
    np.testing.assert_array_equal(arrays.positions, [0, 1, 2, 3, 0, 1, 2, 0, 0])
    np.testing.assert_array_equal(arrays.segments, [1, 1, 1, 1, 2, 2, 2, 0, 0])
    np.testing.assert_array_equal(arrays.targets, [9, 4, 3, 0, 6, 7, 0, 0, 0])  # never the next conversation's
    np.testing.assert_array_equal(arrays.weights, [1, 0, 1, 0, 0, 1, 0, 0, 0])
    by_example = sft_row_arrays([one, two], row, 9, "examples")
    np.testing.assert_array_equal(by_example.weights, [0.5, 0, 0.5, 0, 0, 1, 0, 0, 0])


def test_whole_conversations_are_packed():
    examples = random_examples(20)
    groups = sft_groups(examples)
    rows = pack(groups, 64, 64, range(20))
    assert sorted(segment.group for row in rows for segment in row) == list(range(20))
    assert len(rows) < 12
    for row in rows:
        ours, theirs = sft_row_arrays(examples, row, 64), row_arrays(groups, row, 64, 64)
        for name in ("tokens", "positions", "segments"):
            np.testing.assert_array_equal(getattr(ours, name), getattr(theirs, name))


@pytest.mark.parametrize("average", ["tokens", "examples"])
def test_packed_equals_one_conversation_a_row(average):
    examples, model = random_examples(9), CausalLM(TINY, Compute(chunk=16))

    def batch(rows, row_length):
        arrays = [sft_row_arrays(examples, row, row_length, average) for row in rows]
        return SFTBatch(*(np.stack(x) for x in zip(*arrays, strict=True)))

    def sums(params, batch):
        variables = {"params": params}
        layout = Layout(batch.segments, jnp.zeros_like(batch.segments))
        states = model.apply(variables, batch.tokens, batch.positions, layout, method="states")
        head = lambda x: model.apply(variables, x, method="head")  # noqa: E731
        total, *rest = chunked_cross_entropy(states, head, batch.targets, batch.weights, 16)
        return total, rest

    packed = batch([*pack(sft_groups(examples), 64, 64, range(9)), ()], 64)  # with a row of padding
    alone = batch([(Segment(i, (0,), len(e.tokens)),) for i, e in enumerate(examples)], 32)
    assert len(packed.tokens) < len(alone.tokens)
    layout = Layout(packed.segments, 0 * packed.segments)
    params = jax.jit(model.init)(jax.random.key(0), packed.tokens, packed.positions, layout)["params"]
    params = jax.tree.map(lambda x: x.unbox(), params, is_leaf=lambda x: hasattr(x, "unbox"))
    (expected, rest), gradient = jax.jit(jax.value_and_grad(sums, has_aux=True))(params, alone)
    (actual, more), other = jax.jit(jax.value_and_grad(sums, has_aux=True))(params, packed)
    np.testing.assert_allclose([actual, *more], [expected, *rest], rtol=1e-6)
    trained = sum(e.trained.sum() for e in examples)
    np.testing.assert_allclose(rest[0], trained if average == "tokens" else 9, rtol=1e-6)
    assert_trees_close(other, gradient, rtol=1e-5)
