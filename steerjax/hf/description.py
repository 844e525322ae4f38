"""What is known of a model besides its arrays, in memory and in an export's `steerjax.json`."""

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pydantic

from steerjax import __version__
from steerjax.chat.templates import Template, named
from steerjax.chat.tokenizer import Tokenizer
from steerjax.errors import DataError, ModelError
from steerjax.models.config import LlamaConfig
from steerjax.schema import Attributes, Schema, check_rating
from steerjax.typed import STRICT, read_json


@dataclass(frozen=True)
class Description:
    """A model that can be opened. No arrays, and no jax to make one."""

    path: Path  # a Hugging Face folder, or `checkpoints/STEP` of a run
    kind: str  # "reward", or "chat" (any causal language model)
    model: LlamaConfig
    tokenizer: Tokenizer
    template: Template
    schema: Schema | None  # None for a model that says nothing about its attributes
    system_prompt: str | None  # of conversations without one; None is the template's own
    readout: str  # where a reward is read, "last" or "mean"
    default_ratings: Mapping[str, float] | None  # what a chat model is asked for where a request names nothing
    provenance: Mapping[str, Any]  # what is known about its making; empty for a model that is not ours

    @property
    def writes_ratings(self) -> bool:
        """A chat model that has learnt label lines behind responses, and so rates as a reward model does."""
        return self.kind == "chat" and bool(self.provenance.get("rated_attributes"))

    def expect(self, kind: str) -> None:
        """Raises ModelError: a model of the other kind. One that writes ratings is of both."""
        if self.kind != kind and not (kind == "reward" and self.writes_ratings):
            raise ModelError(f"'{self.path}' is a {self.kind} model\n  cure: give a {kind} model")

    def to_json(self) -> dict[str, Any]:
        """What `read_about` reads."""
        kept = ("kind", "system_prompt", "readout", "default_ratings")
        attributes = self.schema.to_json() if self.schema else None
        template = named(self.template)
        template = template if isinstance(template, str) else dataclasses.asdict(template)
        said = {"template": template, "attributes": attributes, "steerjax": __version__, "checksums": True}
        return {name: getattr(self, name) for name in kept} | {"provenance": _without_folders(self.provenance)} | said


def _without_folders(value: Any) -> Any:
    """Plain data in which an absolute path is its last name, of a checkpoint the last three: others do not have it."""
    if isinstance(value, Mapping):
        return {_without_folders(key): _without_folders(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_folders(item) for item in value]
    if not isinstance(value, str) or not re.fullmatch(r"(/|~/)[^\n]*/[^\n]*", value):
        return value
    parts = Path(value).parts
    return "/".join(parts[-3:] if parts[-2] == "checkpoints" else parts[-1:])


@pydantic.dataclasses.dataclass(frozen=True, config=STRICT)
class About:
    """`steerjax.json`. The first two are enough, so that one can be written by hand for somebody else's folder."""

    kind: Literal["reward", "chat"]
    template: Template | str  # "source": that of the folder's tokenizer
    attributes: Attributes | None = None
    system_prompt: str | None = None
    readout: Literal["last", "mean"] = "last"
    default_ratings: dict[str, float] | None = None
    provenance: dict[str, Any] = dataclasses.field(default_factory=dict)
    steerjax: str = ""
    checksums: bool = False  # the folder has a list of them

    @property
    def schema(self) -> Schema | None:
        return Schema(self.attributes) if self.attributes else None


def read_about(folder: Path) -> About | None:
    """An export's `steerjax.json`; None where there is none. Raises ModelError, which names the file and the key."""
    file = folder / "steerjax.json"
    if not file.is_file():
        return None
    about = read_json(About, file, ModelError, "export again")
    try:
        for name, value in (about.default_ratings or {}).items():
            check_rating(value, (about.schema or Schema(()))[name])
    except DataError as error:
        raise ModelError(f"'{file}': default_ratings: {error}") from None
    return about
