"""Who answers: a chat model of our own, or a server's; and what may be asked of it. No jax before a model is opened."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from steerjax.chat.templates import get_template
from steerjax.command import describe_model, open_model
from steerjax.errors import ConfigError, ModelError
from steerjax.inference.steering import Setting, parse_attributes
from steerjax.schema import SCHEMAS, Schema

if TYPE_CHECKING:
    from steerjax.bundle import Bundle
    from steerjax.hf.description import Description
    from steerjax.inference.engine import Engine
    from steerjax.inference.server import Server


@dataclass(frozen=True)
class Answerer:
    """A chat model that answers.

    Attributes:
        backend: `backend.drawing(sampling, batch_size)` answers; `backend.model` is its name.
        schema: what may be asked for; where nobody says (not `known`), the attributes of the papers.
        defaults: the ratings of its label lines without a setting; None where there are none, or nobody says.
        room: tokens of its context, None for a server's.
    """

    backend: Engine | Server
    schema: Schema
    known: bool = True
    defaults: Mapping[str, float] | None = None
    room: int | None = None

    def setting(self, text: str) -> Setting:
        """What --attributes asks for. Raises ConfigError as `parse_attributes`."""
        return parse_attributes(text, self.schema) if text else {}


def of_bundle(bundle: Bundle, schema: str | None = None) -> Answerer:
    """`schema`: the preset of a model that names none. Raises ModelError: a reward model."""
    from steerjax.inference.engine import Engine

    about = bundle.description
    known, found = _schema(about, schema)
    room = about.model.max_position_embeddings
    return Answerer(Engine(bundle, found, labelled=known), found, known, about.default_ratings, room)


def of_server(
    url: str, model: str | None = None, about: Description | None = None, *, schema: str | None = None,
    template: str | None = None, attempts: int = 8,
) -> Answerer:  # fmt: skip
    """`about`: of the folder that the server has, where that is known; `schema` and `template` where it is not.

    Raises SteerjaxError: no server there, or it serves several models; a folder of a reward model.
    """
    from steerjax.inference.server import Server

    if about is not None:
        about.expect("chat")
    known, found = _schema(about, schema)
    spoken = about.template if about else get_template(template) if template else None
    server = Server(url, model, found, template=spoken, attempts=attempts)
    return Answerer(server, found, known, about.default_ratings if about else None)


def open_answerer(options: argparse.Namespace, about: Description | None = None) -> Answerer:
    """What --server or else --model, which `about` describes, answers with.

    Raises ModelError: no model of ours says which attributes it takes, and some are asked for.
    """
    o = options
    about = about or (describe_model(o.model, o) if o.model else None)
    if o.server:
        return of_server(o.server, o.server_model, about, schema=o.schema, template=o.template)
    if about.schema is None and not o.schema and any(vars(o).get(k) for k in ("attributes", "sweep", "combinations")):
        raise ModelError(f"'{o.model}' does not say which attributes it takes\n  cure: --schema")
    return of_bundle(open_model(about, o), o.schema)


def _schema(about: Description | None, preset: str | None) -> tuple[bool, Schema]:
    """Whether it is known, and the schema: the model's own, else the preset, else that of the papers."""
    if preset and preset not in SCHEMAS:
        raise ConfigError(f"no schema '{preset}'; cure: one of {', '.join(SCHEMAS)}")
    own = about.schema if about else None
    return bool(own or preset), own or SCHEMAS[preset or "steerlm"]
