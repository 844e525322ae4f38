"""How a label line spells its ratings: in numbers (the papers'), in words, or in special tokens, one for each attribute
and label (UC-MOA, arXiv 2503.10669, finds that numbers steer weakly).

    helpfulness:4,verbosity:0        helpfulness:very high,verbosity:very low        <helpfulness:4><verbosity:0>

Data files hold numbers in every form (`schema.parse_label`).
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Literal

from steerjax.errors import ConfigError, DataError
from steerjax.schema import Attribute, Schema, parse_label, round_rating

LabelForm = Literal["numbers", "words", "tokens"]

WORDS = {  # by the number of labels
    2: ("low", "high"),
    3: ("low", "medium", "high"),
    4: ("very low", "low", "high", "very high"),
    5: ("very low", "low", "medium", "high", "very high"),
    6: ("very low", "low", "fairly low", "fairly high", "high", "very high"),
    7: ("very low", "low", "fairly low", "medium", "fairly high", "high", "very high"),
}
_MOST_TOKENS = 1000  # of one attribute


def label_parts(schema: Schema, names: Collection[str], form: LabelForm) -> list[tuple[str, dict[int, str]]]:
    """Of each named attribute, in the schema's order: what stands before its value, and each label's text.

    Put together they are a label line. Raises ConfigError: more labels than the form has words or tokens for.
    """
    attributes = [attribute for attribute in schema.attributes if attribute.name in names]
    return [
        (_before(attribute, first, form), dict(zip(attribute.labels, _texts(attribute, form), strict=True)))
        for attribute, first in zip(attributes, (True, *[False] * len(attributes)), strict=False)
    ]


def label_tokens(schema: Schema, form: LabelForm) -> tuple[str, ...]:
    """The special tokens that label lines are made of, in order; none but in the form of tokens."""
    parts = label_parts(schema, schema.names, form) if form == "tokens" else ()
    return tuple(token for _, texts in parts for token in texts.values())


def label_line(ratings: Mapping[str, float], schema: Schema, form: LabelForm) -> str:
    """The ratings in the schema's order, each rounded as `schema.round_rating`; missing ratings are left out.

    Raises DataError: a name outside the schema, or NaN. ConfigError: as `label_parts`.
    """
    labels = {name: round_rating(value, schema[name]) for name, value in ratings.items()}
    line = ""
    for attribute in schema.attributes:
        if attribute.name in labels:
            text = _text(attribute, labels[attribute.name], form)
            line += _before(attribute, not line, form) + text
    return line


def parse_label_line(line: str, schema: Schema, form: LabelForm) -> dict[str, float]:
    """The inverse of `label_line`; any order of names is read.

    Raises DataError: as `schema.parse_label`, or what is not in this form. ConfigError: as `label_parts`.
    """
    if form == "tokens":
        if not re.fullmatch(r"(<[^<>]+>)*", line):
            raise DataError(f"'{line}' is no row of tokens", cure="write e.g. <helpfulness:4><correctness:3>")
        line = line[1:-1].replace("><", ",")
    elif form == "words":
        entries = [entry.partition(":") for entry in line.split(",")] if line.strip() else []
        line = ",".join(f"{name}:{_number(schema[name.strip()], word.strip())}" for name, _, word in entries)
    return parse_label(line, schema)


def _before(attribute: Attribute, first: bool, form: LabelForm) -> str:
    return "" if form == "tokens" else f"{'' if first else ','}{attribute.name}:"


def _text(attribute: Attribute, label: int, form: LabelForm) -> str:
    if form == "words":
        return _texts(attribute, form)[label - attribute.labels[0]]
    return f"<{attribute.name}:{label}>" if form == "tokens" else str(label)


def _texts(attribute: Attribute, form: LabelForm) -> tuple[str, ...]:
    """Of each label, ascending."""
    count, cure = len(attribute.labels), "config.chat.labels 'numbers', which write any label"
    if form == "words":
        if count not in WORDS:
            said = f"attribute '{attribute.name}' has {count} labels, and words are for 2 to 7"
            raise ConfigError(f"{said}; cure: {cure}, or 'tokens'")
        return WORDS[count]
    if form == "tokens" and count > _MOST_TOKENS:
        said = f"attribute '{attribute.name}' has {count} labels, and tokens are for at most {_MOST_TOKENS}"
        raise ConfigError(f"{said}; cure: {cure}")
    return tuple(_text(attribute, label, form) for label in attribute.labels)


def _number(attribute: Attribute, word: str) -> int:
    words = _texts(attribute, "words")
    if word not in words:
        message, cure = f"'{word}' is none of its words", f"use one of: {', '.join(words)}"
        raise DataError(message, field=attribute.name, cure=cure)
    return attribute.labels[words.index(word)]
