"""What a model is asked for and what comes back: settings of the ratings, sampling, answers. No jax."""

import hashlib
import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import pydantic.dataclasses
from pydantic import Field

from steerjax.chat.templates import Template
from steerjax.data.conversation import Conversation
from steerjax.errors import ConfigError, DataError
from steerjax.schema import Schema, check_rating, parse_label, round_rating
from steerjax.typed import STRICT, typed

# Attribute -> whole rating; None leaves the attribute out of the label line. Over the model's default ratings.
Setting = Mapping[str, int | None]


@pydantic.dataclasses.dataclass(frozen=True, config=STRICT)
class Sampling:
    """How tokens are drawn. Of tokens of equal probability the one with the lower id comes first."""

    temperature: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0  # 0 takes the most likely token
    top_k: Annotated[int, Field(ge=0)] = 0  # 0 is all
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0  # of the tokens that top-k left
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0  # the same seed and prompt give the same text
    max_new_tokens: Annotated[int, Field(ge=1)] = 512


def make_sampling(temperature: float | None, samples: int, where: str, **asked: Any) -> Sampling:
    """Greedy where no temperature is given, unless something asks to draw: then 1.

    Raises ConfigError: a value out of range, named after `where`.
    """
    if temperature is None:
        temperature = 1.0 if samples > 1 or asked["top_k"] or asked["top_p"] < 1 else 0.0
    return typed(Sampling, asked | {"temperature": temperature}, where, ConfigError)


@dataclass(frozen=True)
class Answer:
    """A response, without its end."""

    text: str
    finish: str  # "stop", the model ended its turn; "length", it was cut at `max_new_tokens`; a server has more words
    tokens: int | None  # drawn, the end included; None where a server does not say
    ids: tuple[int, ...] = ()  # those tokens; empty from a server


def end_space(template: Template) -> str:
    """The white space that the end of a response begins with."""
    return template.end[: len(template.end) - len(template.end.lstrip())]


def parse_attributes(text: str, schema: Schema) -> dict[str, int | None]:
    """`helpfulness=4,verbosity=1`; `humor=none` leaves an attribute out, `none` alone the label line.

    Raises ConfigError: an unknown name, no number, or a rating out of range.
    """
    if text.strip() == "none":
        return dict.fromkeys(schema.names)
    entries = [[part.strip() for part in entry.split("=")] for entry in text.split(",")]
    try:
        given = parse_label(",".join(":".join(entry) for entry in entries if entry[-1] != "none"), schema)
        left_out = {schema[entry[0]].name: None for entry in entries if entry[-1] == "none"}
        if twice := given.keys() & left_out.keys():
            raise DataError("stands twice", min(twice), "name it once")
    except DataError as error:
        raise ConfigError(f"--attributes {text}: {error}") from None
    return {name: round_rating(rating, schema[name]) for name, rating in given.items()} | left_out


def parse_sweep(text: str, schema: Schema) -> dict[str, list[int]]:
    """`verbosity=0..4`, `verbosity=4..0`, `verbosity=0,2,4`, or `verbosity` for its whole range: {attribute: ratings}.

    Raises ConfigError as `parse_attributes`.
    """
    name, equals, values = (part.strip() for part in text.partition("="))
    try:
        attribute = schema[name]
        if not equals:
            return {name: list(attribute.labels)}
        between = ".." in values
        ratings = [int(check_rating(int(value), attribute)) for value in values.split(".." if between else ",")]
        if between:
            first, last = ratings
            ratings = list(range(first, last + 1) or range(first, last - 1, -1))
        return {name: ratings}
    except (ValueError, DataError) as error:
        said = error.reason if isinstance(error, DataError) else "no list or range of whole numbers"
        cure = f"e.g. verbosity=0..4, of {', '.join(schema.names)}, in the attribute's range"
        raise ConfigError(f"--sweep {text}: {said}\n  cure: {cure}") from None


def swept(attributes: str, sweeps: Sequence[str], schema: Schema) -> list[dict[str, int | None]]:
    """The settings that --attributes asks for with every combination of the ratings of each --sweep."""
    base = parse_attributes(attributes, schema) if attributes else {}
    parsed = [parse_sweep(text, schema) for text in sweeps]
    sweeping = {name: ratings for each in parsed for name, ratings in each.items()}
    if len(sweeping) < len(parsed) or sweeping.keys() & base.keys():
        twice = next(iter(sweeping.keys() & base.keys()), min(sweeping))
        raise ConfigError(f"--sweep {', '.join(sweeps)}: {twice} is asked for twice; cure: name an attribute once")
    return [base | dict(zip(sweeping, each, strict=True)) for each in itertools.product(*sweeping.values())]


def label_of(setting: Setting, defaults: Mapping[str, float] | None) -> dict[str, float]:
    """The ratings that the label line names; empty for no label line."""
    return {name: value for name, value in {**(defaults or {}), **setting}.items() if value is not None}


def top_combinations(rows: Iterable[Conversation], schema: Schema, quality: str | None = None) -> list[Setting]:
    """The combinations of ratings that occur with the highest rating of `quality`, sorted (arXiv 2310.05344, step 4a).

    A turn's predicted ratings count, else its human ones, rounded as in a label line. Without `quality`, the first that
    is rated of quality, helpfulness, the schema's first. Raises DataError: no turn has a rating of it.
    """
    rated = [
        tuple(round_rating(ratings[a.name], a) if a.name in ratings else None for a in schema.attributes)
        for row in rows
        for turn in row.turns
        if (ratings := turn.predicted_ratings or turn.ratings)
    ]
    names = (schema[quality].name,) if quality else ("quality", "helpfulness", schema.names[0])
    for place in (schema.names.index(name) for name in names if name in schema.names):
        best = max((each[place] for each in rated if each[place] is not None), default=None)
        if best is not None:
            top = {each for each in rated if each[place] == best}
            ordered = sorted(top, key=lambda each: [(value is not None, value or 0) for value in each])
            return [dict(zip(schema.names, each, strict=True)) for each in ordered]
    cure = "annotate the file first, or use --quality"
    raise DataError(f"no turn has a rating of {' or '.join(dict.fromkeys(names))}", cure=cure)


def hashed(*values: Any) -> int:
    """A number from 0 to 2^31 - 1 that follows from plain values: one seed gives other draws for other prompts."""
    digest = hashlib.blake2b(json.dumps(values).encode(), digest_size=4).digest()
    return int.from_bytes(digest) >> 1
