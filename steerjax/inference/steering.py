"""What a model is asked for: attributes, sweeps over them, and combinations seen at top quality."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable, Mapping, Sequence

from steerjax.data.conversation import Conversation
from steerjax.errors import ConfigError, DataError
from steerjax.schema import Schema, check_rating, parse_label, round_rating

# Attribute -> whole rating; None leaves the attribute out of the label line. Over the model's default ratings.
Setting = Mapping[str, int | None]


def parse_attributes(text: str, schema: Schema) -> dict[str, int | None]:
    """`helpfulness=4,verbosity=1`; `humor=none` leaves an attribute out, `none` alone leaves out the label line.

    Raises:
        ConfigError: a name outside the schema, no number, or a rating out of range.
    """
    if text.strip() == "none":
        return dict.fromkeys(schema.names)
    entries = [entry.strip() for entry in text.split(",")]
    try:
        left_out = {schema[e.split("=")[0].strip()].name: None for e in entries if e.endswith("none")}
        ratings = parse_label(",".join(e.replace("=", ":") for e in entries if not e.endswith("none")), schema)
    except DataError as error:
        raise ConfigError(f"--attributes {text}: {error}") from None
    return {name: round_rating(value, schema[name]) for name, value in ratings.items()} | left_out


def parse_sweep(text: str, schema: Schema) -> dict[str, list[int]]:
    """`verbosity=0..4` or `verbosity=0,2,4` as {attribute: ratings}.

    Raises:
        ConfigError: as `parse_attributes`.
    """
    name, _, values = (part.strip() for part in text.partition("="))
    try:
        if ".." in values:
            low, high = map(int, values.split(".."))
            ratings = list(range(low, high + 1))
        else:
            ratings = [int(value) for value in values.split(",")]
    except ValueError:
        raise ConfigError(f"--sweep {text}; cure: e.g. verbosity=0..4 or verbosity=0,2,4") from None
    try:
        return {name: [int(check_rating(rating, schema[name])) for rating in ratings]}
    except DataError as error:
        raise ConfigError(f"--sweep {text}: {error}") from None


def swept(base: Setting, sweeps: Sequence[Mapping[str, Sequence[int]]]) -> list[dict[str, int | None]]:
    """`base` with every combination of the swept ratings."""
    sweeping = {name: ratings for sweep in sweeps for name, ratings in sweep.items()}
    return [dict(base) | dict(zip(sweeping, each, strict=True)) for each in itertools.product(*sweeping.values())]


def label_of(setting: Setting, defaults: Mapping[str, float] | None) -> dict[str, float]:
    """The ratings that the label line names; empty for no label line."""
    return {name: value for name, value in {**(defaults or {}), **setting}.items() if value is not None}


def top_combinations(
    conversations: Iterable[Conversation], schema: Schema, quality: str | None = None
) -> list[dict[str, int | None]]:
    """The combinations of ratings that occur with the highest rating of one attribute that occurs at all.

    Step 4a of the SteerLM paper (arXiv 2310.05344, section 3.4). A turn's predicted ratings count, rounded as in a
    label line; human ones where there are none.

    Args:
        quality: the attribute; None takes quality, or helpfulness where quality is not rated.

    Returns:
        Settings of the whole schema, sorted; attributes that a combination lacks are left out (None).

    Raises:
        DataError: no turn has a rating of the attribute.
    """
    seen: set[tuple[int | None, ...]] = set()
    for conversation in conversations:
        for turn in conversation.turns:
            if ratings := turn.predicted_ratings or turn.ratings:
                seen.add(
                    tuple(round_rating(ratings[a.name], a) if a.name in ratings else None for a in schema.attributes)
                )
    names = (quality,) if quality else ("quality", "helpfulness")
    for place in (schema.names.index(schema[name].name) for name in names if quality or name in schema.names):
        values = [ratings[place] for ratings in seen if ratings[place] is not None]
        if values:
            top = {ratings for ratings in seen if ratings[place] == max(values)}
            ordered = sorted(top, key=lambda ratings: [-1 if value is None else value for value in ratings])
            return [dict(zip(schema.names, ratings, strict=True)) for ratings in ordered]
    raise DataError(f"no turn has a rating of {' or '.join(names)}", cure="annotate the file first, or use --quality")


def chosen(combinations: Sequence[Setting], seed: int, name: str) -> Setting:
    """One of the combinations, uniformly; follows from the seed and the name of the row."""
    digest = hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=8).digest()
    return combinations[int.from_bytes(digest) % len(combinations)]
