"""The config groups `data` and `batch`."""

from typing import Annotated, Any, Literal

import pydantic.dataclasses
from pydantic import BeforeValidator, Field

from steerjax.data.formats import FORMATS, PAIRS
from steerjax.schema import SCHEMAS, Schema, make_schema
from steerjax.typed import STRICT, Name, Size, separated


def _entries(value: Any) -> Any:
    if not isinstance(value, list | tuple) or not all(isinstance(entry, list | tuple) for entry in value):
        raise ValueError("""no (name, low, high); cure: e.g. --config.data.attributes="(('clarity', 1, 5),)\"""")
    return tuple(map(tuple, value))  # strict checks take no list for a tuple


Entries = Annotated[tuple[tuple[str | float | int, ...], ...], BeforeValidator(_entries)]
Texts = Annotated[tuple[Name, ...], BeforeValidator(separated), Field(strict=False)]
Format = Literal["auto", *FORMATS, *PAIRS]


@pydantic.dataclasses.dataclass(frozen=True, config=STRICT)
class DataConfig:
    """What is read, and what happens to rows that cannot be used."""

    # Files (docs/formats.md), hub:OWNER/NAME[@CONFIG][:SPLIT] or embedded:helpsteer; a tuple, or one text with commas.
    train: Annotated[Texts, Field(min_length=1)] = ("embedded:helpsteer",)
    validation: Texts = ()  # as `train`; without any, a part of the training prompts is held out
    # the part of the prompts that is held out; of the rows, if all share one prompt
    validation_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.15
    format: Format = "auto"  # layout of the rows (docs/formats.md); auto tells it from their keys
    # preset attributes: HelpSteer's five, OpenAssistant's four, or all nine
    schema: Literal[*SCHEMAS] = "helpsteer"
    # your own, in place of the preset: a (name, lowest, highest[, meaning]) each
    attributes: Entries = ()
    on_bad_row: Literal["error", "skip"] = "error"  # error stops; skip counts them, and lists them in skipped.jsonl
    on_duplicate: Literal["keep", "skip"] = "keep"  # rows that equal an earlier one; HelpSteer has some by design
    # which prompts are held out; apart from `train.seed`, so that runs share them
    split_seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] = 0

    def make_schema(self) -> Schema:
        """The attributes that are rated, in the order of the reward head. Raises ConfigError: a bad entry."""
        return make_schema(self.schema, self.attributes)


MOST_TOKENS = 2**26  # of a step: a gigabyte of whole numbers in the host's memory


@pydantic.dataclasses.dataclass(frozen=True, config=STRICT)
class BatchConfig:
    """Packed rows: each holds several texts, up to its length."""

    rows: Annotated[int, Field(ge=1, le=2**17)] = 8  # packed rows of a step, over all devices
    row_length: Size = 2560  # tokens of a packed row
    micro_batches: Size = 1  # parts that a step is computed in, to save memory; same result
    # packed rows of a step of evaluation; 0 is rows / micro_batches
    evaluation_rows: Annotated[int, Field(ge=0, le=2**17)] = 0

    def __post_init__(self):
        if self.rows % self.micro_batches:
            raise ValueError(f"rows {self.rows} in {self.micro_batches} micro_batches; cure: a divisor of rows")
        if (tokens := max(self.rows, self.evaluated) * self.row_length) > MOST_TOKENS:
            raise ValueError(f"{tokens} tokens a step; cure: at most {MOST_TOKENS}, by fewer rows or a less row_length")

    @property
    def evaluated(self) -> int:
        """Rows a step of evaluation."""
        return self.evaluation_rows or self.rows // self.micro_batches
