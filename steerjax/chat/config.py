"""How a conversation becomes tokens, as an experiment says it."""

from typing import Literal

from pydantic.dataclasses import dataclass

from steerjax.chat.render import Renderer
from steerjax.chat.templates import TEMPLATES
from steerjax.chat.tokenizer import load_tokenizer
from steerjax.schema import Schema
from steerjax.typed import STRICT


@dataclass(frozen=True, config=STRICT)
class ChatConfig:
    """The group `config.chat`.

    Attributes:
        tokenizer: as `load_tokenizer`; `auto` is the model source's own, and the embedded one for a random model.
        system_prompt: for conversations without one; "default" is the template's own.
    """

    tokenizer: str = "auto"
    template: Literal["extra_id", "chatml", "llama3", "llama2"] = "extra_id"
    system_prompt: str = "default"


def make_renderer(config: ChatConfig, schema: Schema) -> Renderer:
    """The renderer of an experiment whose tokenizer is known (not "auto"). Raises ModelError, as `load_tokenizer`."""
    system_prompt = None if config.system_prompt == "default" else config.system_prompt
    return Renderer(load_tokenizer(config.tokenizer), TEMPLATES[config.template], schema, system_prompt)
