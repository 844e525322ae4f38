"""The rating schema as data: attribute names, order, range, meaning, label string and scalar weights.

A *rating* is the number a person or a model gives to an *attribute* of a response. Source: NeMo-Aligner
`examples/nlp/data/steerlm/common.py`; HelpSteer, arXiv 2311.09528, section 3.
"""

import contextlib
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Annotated

import pydantic.dataclasses

from steerjax.errors import ConfigError, DataError, SteerjaxError
from steerjax.typed import STRICT, typed


@pydantic.dataclasses.dataclass(frozen=True, config=STRICT)
class Attribute:
    """One thing that is rated.

    Attributes:
        name: as it stands in data files and label strings: letters, digits, `_`, `-` and `.`.
        low, high: the least and greatest rating, inclusive; a whole number lies between them, as labels are whole.
        meaning: what the raters were asked.
    """

    name: str
    low: Annotated[float, pydantic.Field(allow_inf_nan=False)] = 0.0
    high: Annotated[float, pydantic.Field(allow_inf_nan=False)] = 4.0
    meaning: str = ""

    def __post_init__(self):
        if not re.fullmatch(r"[\w.-]+", self.name):
            raise ValueError("no name of an attribute; cure: letters, digits, _, - and .")
        if self.low >= self.high or not self.labels:
            raise ValueError("no range with a whole number, as a label needs; cure: low less than high, or rescale")

    @property
    def labels(self) -> range:
        """The ratings that a label line can name: the whole numbers of the range."""
        return range(math.ceil(self.low), math.floor(self.high) + 1)


@dataclass(frozen=True)
class Schema:
    """An ordered set of attributes; the order is that of the reward head's outputs and of label strings."""

    attributes: tuple[Attribute, ...]

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(attribute.name for attribute in self.attributes)

    def __len__(self) -> int:
        return len(self.attributes)

    def __getitem__(self, name: str) -> Attribute:
        """The attribute called `name`. Raises DataError for a name outside the schema."""
        for attribute in self.attributes:
            if attribute.name == name:
                return attribute
        raise DataError(f"unknown attribute '{name}'", field=name, cure=f"use one of: {', '.join(self.names)}")

    def to_json(self) -> list[dict]:
        """Names, ranges and meanings in order, as checkpoints and exports carry them."""
        return [asdict(attribute) for attribute in self.attributes]


def _distinct(attributes: tuple[Attribute, ...]) -> tuple[Attribute, ...]:
    names = [attribute.name for attribute in attributes]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"'{twice[0]}' stands twice; cure: one name an attribute")
    return attributes


Attributes = Annotated[tuple[Attribute, ...], pydantic.AfterValidator(_distinct)]


def schema_from_json(entries: Iterable[Mapping], where: str, error: type[SteerjaxError]) -> Schema:
    """The inverse of `Schema.to_json`. Raises `error`, as `typed`: no attribute, or a name that stands twice."""
    return Schema(typed(Attributes, tuple(entries), where, error))


def make_schema(preset: str, attributes: Sequence[Sequence]) -> Schema:
    """The schema of these `(name, low, high[, meaning])`, or where there are none, the preset of that name.

    Raises ConfigError, which names the attribute.
    """
    for entry in attributes:
        if len(entry) not in (3, 4):
            cure = "(name, low, high) or (name, low, high, meaning)"
            raise ConfigError(f"config.data.attributes: {entry!r}; cure: {cure}")
    fields = ("name", "low", "high", "meaning")
    entries = [dict(zip(fields, entry, strict=False)) for entry in attributes]
    return schema_from_json(entries, "config.data.attributes", ConfigError) if entries else SCHEMAS[preset]


_HELPSTEER = (
    Attribute("helpfulness", meaning="overall helpfulness of the response to the prompt"),
    Attribute("correctness", meaning="all pertinent facts are there, and none is wrong"),
    Attribute("coherence", meaning="consistent and clear"),
    Attribute("complexity", meaning="depth of knowledge needed to write it: basic language (0) to expert (4)"),
    Attribute("verbosity", meaning="amount of detail, relative to what the prompt asks"),
)
_OASST = (
    Attribute("quality", meaning="overall quality"),
    Attribute("toxicity", meaning="rude or disrespectful"),
    Attribute("humor", meaning="funny"),
    Attribute("creativity", meaning="creative"),
)

HELPSTEER, OASST = Schema(_HELPSTEER), Schema(_OASST)
STEERLM = Schema(_OASST + _HELPSTEER)  # the reference's head order
SCHEMAS: dict[str, Schema] = {"helpsteer": HELPSTEER, "oasst": OASST, "steerlm": STEERLM}

# HelpSteer2 (arXiv 2406.08673), appendix H. Attributes that are not named weigh 0.
SCALAR_WEIGHTS: dict[str, dict[str, float]] = {
    "goodness": {"helpfulness": 0.65, "correctness": 0.8, "coherence": 0.45},
    "llama3_70b": {
        "helpfulness": 0.65, "correctness": 0.8, "coherence": 0.45, "complexity": 0.55, "verbosity": -0.4,
    },
    "nemotron4_340b": {
        "helpfulness": 0.3, "correctness": 0.74, "coherence": 0.46, "complexity": 0.47, "verbosity": -0.33,
    },
}  # fmt: skip


def parse_scalar(text: str, schema: Schema, flag: str = "--scalar") -> tuple[str, dict[str, float]]:
    """`goodness` or another preset, an attribute's name, or `NAME=W,...`: the score's name and the attributes' weights.

    Raises ConfigError: an attribute that the model has not, no number, or no weight but 0.
    """
    name, weights = text, SCALAR_WEIGHTS.get(text)
    try:
        if text in schema.names:
            weights = {text: 1.0}
        if weights is None:
            pairs = [entry.partition("=") for entry in text.split(",")]
            name, weights = "score", {name.strip(): float(value) for name, _, value in pairs}
            if len(weights) < len(pairs):
                raise ValueError("an attribute stands twice")
        for attribute in weights:
            schema[attribute]  # raises where there is none
        if not any(weights.values()) or not all(map(math.isfinite, weights.values())):
            raise ValueError("no weight but 0, or one that is not finite")
    except (ValueError, DataError) as error:
        cure = f"{', '.join(SCALAR_WEIGHTS)}, or NAME=W,... of {', '.join(schema.names)}"
        raise ConfigError(f"{flag} {text}: {error}\n  cure: {cure}") from None
    return name, weights


def check_rating(value: object, attribute: Attribute) -> float:
    """`value` as a float. Raises DataError, which names the attribute: no number, not finite, or out of range."""
    low, high = attribute.low, attribute.high
    if isinstance(value, bool) or not isinstance(value, int | float):
        wrong = f"{value!r:.80} is not a number"
    elif not abs(value) < 1e300:  # an integer may be beyond any float
        wrong = f"{value!r:.20} is not finite"
    elif not low <= value <= high:
        wrong = f"{value:g} is outside {low:g}..{high:g}"
    else:
        return float(value)
    cure = f"a number from {low:g} to {high:g} (rescale), or leave a missing rating out"
    raise DataError(f"rating {wrong}", field=attribute.name, cure=cure)


def round_rating(value: float, attribute: Attribute) -> int:
    """A rating as a label: clipped to the attribute's range, then rounded half to even (the reference's rule).

    Raises DataError for NaN, which the reference turns into 0.
    """
    if math.isnan(value):
        raise DataError(
            "rating is NaN", field=attribute.name, cure="leave it out, or check the model that predicted it"
        )
    nearest = round(min(attribute.high, max(attribute.low, float(value))))
    return min(attribute.labels[-1], max(attribute.labels[0], nearest))


def parse_label(label: str, schema: Schema) -> dict[str, float]:
    """The ratings of `helpfulness:4,correctness:3`; any order of names is read.

    Raises DataError: an entry that is not `name:number`, a name outside the schema or twice, a rating out of range.
    """
    ratings: dict[str, float] = {}
    for entry in label.split(",") if label.strip() else ():
        name, colon, value = (part.strip() for part in entry.partition(":"))
        if not colon:
            raise DataError(f"'{entry}' is not name:number", field=name, cure="write e.g. helpfulness:4,correctness:3")
        attribute = schema[name]
        if name in ratings:
            raise DataError(f"'{name}' stands twice in '{label}'", field=name, cure="keep one")
        with contextlib.suppress(ValueError):  # what is no number is refused as one
            value = float(value)
        ratings[name] = check_rating(value, attribute)
    return ratings


def scalarize(ratings: Mapping[str, float], weights: Mapping[str, float]) -> float:
    """The weighted sum of ratings (HelpSteer2, appendix H). Raises DataError: a weighted attribute has no rating."""
    if missing := [name for name in weights if name not in ratings]:
        raise DataError(f"no rating for {', '.join(missing)}", field=missing[0], cure="use weights of rated attributes")
    return sum(weight * ratings[name] for name, weight in weights.items())
