"""What `steerjax iterate` is asked for, beside its recipe. No jax."""

from typing import Annotated, Literal

import pydantic.dataclasses
from pydantic import Field

from steerjax.typed import STRICT, Name


@pydantic.dataclasses.dataclass(frozen=True, config=STRICT)
class Options:
    """Flags of the command, which says what they mean. Iterations, samples and how they are drawn are the paper's."""

    prompts: Name
    reward_model: Name
    iterations: Annotated[int, Field(ge=1, le=1000)] = 2
    samples: Annotated[int, Field(ge=2, le=1000)] = 10
    temperature: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 0.7
    top_p: Annotated[float, Field(gt=0, le=1)] = 0.9
    max_new_tokens: Annotated[int, Field(ge=1)] = 512
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    batch_size: Annotated[int, Field(ge=1)] = 8
    attributes: str = ""
    combinations: Name = ""
    quality: str = ""
    prior: Name = ""
    edges: Literal["middle", "equal"] = "middle"
    format: str = "auto"
    on_bad_row: Literal["error", "skip"] = "error"
