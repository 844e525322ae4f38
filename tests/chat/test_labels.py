"""The forms of a label line."""

import pytest

from steerjax.chat.labels import WORDS, check_labels, label_line, label_parts, label_tokens
from steerjax.errors import ConfigError
from steerjax.schema import HELPSTEER, Attribute, Schema, parse_label
from tests.refusals import refused

pytestmark = pytest.mark.short
FORMS = ("numbers", "words", "tokens")
RATINGS = {"verbosity": 2.5, "helpfulness": 4, "coherence": -3.0}
ODD = Schema((Attribute("a", -1, 1), Attribute("b", 0.5, 7.5), Attribute("c", 3, 4)))


@pytest.mark.parametrize(
    ("form", "line"),
    [
        ("numbers", "helpfulness:4,coherence:0,verbosity:2"),
        ("words", "helpfulness:very high,coherence:very low,verbosity:medium"),
        ("tokens", "<helpfulness:4><coherence:0><verbosity:2>"),
    ],
)
def test_lines(form, line):
    assert label_line(RATINGS, HELPSTEER, form) == line
    assert label_line({}, HELPSTEER, form) == ""


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("schema", [HELPSTEER, ODD])
def test_parts_make_lines(form, schema):
    """Every label of every attribute, alone and with others; numbers are read back."""
    names = schema.names[1:]
    parts = label_parts(schema, names, form)
    for place in range(max(len(attribute.labels) for attribute in schema.attributes)):
        ratings = {name: schema[name].labels[min(place, len(schema[name].labels) - 1)] for name in names}
        line = "".join(before + texts[ratings[name]] for name, (before, texts) in zip(names, parts, strict=True))
        assert label_line(ratings, schema, form) == line
        assert form != "numbers" or parse_label(line, schema) == ratings


def test_words_go_up_and_differ():
    assert all(len({*words}) == count == len(words) for count, words in WORDS.items())
    rank = {"very low": 0, "low": 1, "fairly low": 2, "medium": 3, "fairly high": 4, "high": 5, "very high": 6}
    assert all([rank[word] for word in words] == sorted(rank[word] for word in words) for words in WORDS.values())


def test_tokens_of_a_schema():
    assert label_tokens(ODD, "tokens")[:4] == ("<a:-1>", "<a:0>", "<a:1>", "<b:1>")
    assert len(label_tokens(HELPSTEER, "tokens")) == len({*label_tokens(HELPSTEER, "tokens")}) == 25
    assert label_tokens(HELPSTEER, "numbers") == label_tokens(HELPSTEER, "words") == ()


@pytest.mark.parametrize(
    ("form", "attribute", "cure"),
    [
        ("words", Attribute("score", 0, 7), "tokens"),
        ("words", Attribute("score", 0.5, 1.5), "numbers"),
        ("tokens", Attribute("score", 0, 1e6), "numbers"),
    ],
)
def test_too_many_labels(form, attribute, cure):
    schema = Schema((Attribute("a"), attribute))
    with refused(ConfigError, "score", str(len(attribute.labels)), cure=cure):
        check_labels(schema, form)
