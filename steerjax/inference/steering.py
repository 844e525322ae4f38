"""What a model is asked for: attributes, sweeps over them, and combinations seen at top quality."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable, Mapping, Sequence

from steerjax.data.conversation import Conversation
from steerjax.errors import ConfigError, DataError
from steerjax.schema import Schema, check_rating, round_rating

# Attribute -> whole rating; None leaves the attribute out of the label line. Over the model's default ratings.
Setting = Mapping[str, int | None]


def parse_attributes(text: str, schema: Schema) -> dict[str, int | None]:
    """`helpfulness=4,verbosity=1`; `humor=none` leaves an attribute out, `none` alone leaves out the label line.

    Raises:
        ConfigError: a name outside the schema or twice, no number, or a rating out of range.
    """
    if text.strip() == "none":
        return dict.fromkeys(schema.names)
    asked: dict[str, int | None] = {}
    for entry in text.split(","):
        name, _, value = (part.strip() for part in entry.partition("="))
        try:
            attribute = schema[name]
            if name in asked:
                raise DataError("stands twice", field=name, cure="keep one")
            given = value != "none"
            asked[name] = round_rating(check_rating(float(value), attribute), attribute) if given else None
        except ValueError:
            cure = f"NAME=NUMBER or NAME=none, e.g. {name}={attribute.labels[-1]}"
            raise ConfigError(f"--attributes {text}: '{entry}'; cure: {cure}") from None
        except DataError as error:
            raise ConfigError(f"--attributes {text}: {error}") from None
    return asked


def parse_sweep(text: str, schema: Schema) -> dict[str, list[int]]:
    """`verbosity=0..4`, `verbosity=4..0`, `verbosity=0,2,4`, or `verbosity` for its whole range: {attribute: ratings}.

    Raises:
        ConfigError: as `parse_attributes`.
    """
    name, equals, values = (part.strip() for part in text.partition("="))
    try:
        attribute = schema[name]
        if not equals:
            return {name: list(attribute.labels)}
        separator = ".." if ".." in values else ","
        ratings = [int(check_rating(int(value), attribute)) for value in values.split(separator)]
        if separator == "..":
            first, last = ratings
            step = 1 if first <= last else -1
            ratings = list(range(first, last + step, step))
        return {name: ratings}
    except ValueError:
        low, high = attribute.labels[0], attribute.labels[-1]
        cure = f"e.g. {name}={low}..{high} or {name}={low},{high}"
        raise ConfigError(f"--sweep {text}: not whole numbers; cure: {cure}") from None
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
        quality: the attribute; None takes the first that is rated of quality, helpfulness and the schema's first.

    Returns:
        Settings of the whole schema, sorted; attributes that a combination lacks are left out (None).

    Raises:
        DataError: no turn has a rating of the attribute.
    """
    rated = (turn.predicted_ratings or turn.ratings for c in conversations for turn in c.turns)
    seen = {
        tuple(round_rating(ratings[a.name], a) if a.name in ratings else None for a in schema.attributes)
        for ratings in rated
        if ratings
    }
    names = (schema[quality].name,) if quality else ("quality", "helpfulness", schema.names[0])
    for place in (schema.names.index(name) for name in names if name in schema.names):
        values = [ratings[place] for ratings in seen if ratings[place] is not None]
        if values:
            top = [ratings for ratings in seen if ratings[place] == max(values)]
            top.sort(key=lambda ratings: [(value is not None, value or 0) for value in ratings])
            return [dict(zip(schema.names, ratings, strict=True)) for ratings in top]
    raise DataError(f"no turn has a rating of {' or '.join(dict.fromkeys(names))}",
                    cure="annotate the file first, or use --quality")  # fmt: skip


def chosen(combinations: Sequence[Setting], seed: int, name: str) -> Setting:
    """One of the combinations, uniformly; follows from the seed and the name of the row."""
    digest = hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=8).digest()
    return combinations[int.from_bytes(digest) % len(combinations)]
