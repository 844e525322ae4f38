"""How a label line spells its ratings: in numbers (the papers'), in words, or in special tokens, one for each attribute
and label (UC-MOA, arXiv 2503.10669, finds that numbers steer weakly).

    helpfulness:4,verbosity:0        helpfulness:very high,verbosity:very low        <helpfulness:4><verbosity:0>

Data files hold numbers in every form (`schema.parse_label`). The functions take a schema that `check_labels` lets pass.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Literal

from steerjax.errors import ConfigError
from steerjax.schema import Attribute, Schema, round_rating

LabelForm = Literal["numbers", "words", "tokens"]

WORDS = {  # by the number of labels
    2: ("low", "high"),
    3: ("low", "medium", "high"),
    4: ("very low", "low", "high", "very high"),
    5: ("very low", "low", "medium", "high", "very high"),
    6: ("very low", "low", "fairly low", "fairly high", "high", "very high"),
    7: ("very low", "low", "fairly low", "medium", "fairly high", "high", "very high"),
}
LABEL_TOKEN = re.compile(r"<[\w.-]+:-?\d+>")
_MOST_TOKENS = 1000  # of one attribute


def check_labels(schema: Schema, form: LabelForm) -> None:
    """Raises ConfigError, which names the attribute: more labels than the form can write, or fewer."""
    for attribute in schema.attributes:
        count, cure = len(attribute.labels), "config.chat.labels 'numbers'"
        said = f"attribute '{attribute.name}' has {count} labels"
        if form == "words" and count not in WORDS:
            raise ConfigError(f"{said}, and words are for {min(WORDS)} to {max(WORDS)}; cure: {cure}, or 'tokens'")
        if form == "tokens" and count > _MOST_TOKENS:
            raise ConfigError(f"{said}, and tokens are for at most {_MOST_TOKENS}; cure: {cure}")


def label_words(attribute: Attribute) -> tuple[str, ...]:
    """Of each label, ascending."""
    return WORDS[len(attribute.labels)]


def label_parts(schema: Schema, names: Collection[str], form: LabelForm) -> list[tuple[str, dict[int, str]]]:
    """Of each named attribute, in the schema's order: what stands before its value, and each label's text.

    Put together they are a label line.
    """
    attributes = [attribute for attribute in schema.attributes if attribute.name in names]
    return [
        (_before(attribute, place == 0, form), {label: _text(attribute, label, form) for label in attribute.labels})
        for place, attribute in enumerate(attributes)
    ]


def label_tokens(schema: Schema, form: LabelForm) -> tuple[str, ...]:
    """The special tokens that label lines are made of, in order; none but in the form of tokens."""
    parts = label_parts(schema, schema.names, form) if form == "tokens" else ()
    return tuple(token for _, texts in parts for token in texts.values())


def label_line(ratings: Mapping[str, float], schema: Schema, form: LabelForm) -> str:
    """The ratings in the schema's order, each rounded as `schema.round_rating`; missing ratings are left out.

    Raises DataError: a name outside the schema, or NaN.
    """
    labels = {name: round_rating(value, schema[name]) for name, value in ratings.items()}
    line = ""
    for attribute in schema.attributes:
        if attribute.name in labels:
            line += _before(attribute, not line, form) + _text(attribute, labels[attribute.name], form)
    return line


def _before(attribute: Attribute, first: bool, form: LabelForm) -> str:
    return "" if form == "tokens" else f"{'' if first else ','}{attribute.name}:"


def _text(attribute: Attribute, label: int, form: LabelForm) -> str:
    if form == "words":
        return label_words(attribute)[label - attribute.labels[0]]
    return f"<{attribute.name}:{label}>" if form == "tokens" else str(label)
