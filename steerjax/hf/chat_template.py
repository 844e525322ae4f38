"""The chat template of an exported model: the renderer (`steerjax/chat/render.py`) as Jinja text for stock servers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from steerjax.chat import render
from steerjax.chat.labels import label_words
from steerjax.chat.templates import Template
from steerjax.chat.tokenizer import WORD_JOINER, broken
from steerjax.schema import Schema, check_rating

_SKELETON = Path(render.__file__).with_name("chat_template.jinja")


def chat_template(
    template: Template,
    schema: Schema | None,
    *,
    kind: str,
    default_ratings: Mapping[str, float] | None = None,
    system_prompt: str | None = None,
    special_strings: frozenset[str] = frozenset(),
) -> str:
    """Jinja text that writes a conversation as `Renderer.render` (kind "chat") or `reward_tokens` ("reward") does.

    A server takes special tokens from rendered text, so U+2060 breaks control strings and `special_strings` in every
    message. Jinja does not see what a tokenizer makes of other texts; `look_alikes.sealed` does.

    Args:
        schema: the attributes that are taken, None for none.
        default_ratings: of the answer to be generated, where `attributes` does not name them.
        system_prompt: of conversations without a system message; None means the template's own default.

    Raises DataError: a default rating of an unknown attribute or outside its range.
    """
    schema, form = schema or Schema(()), asdict(template)
    default_system = form.pop("default_system")
    settings = {
        "reward": kind == "reward",
        "one_score": kind == "reward" and len(schema) == 1,
        "form": form,
        "default_system": default_system if system_prompt is None else system_prompt,
        "broken": {string: broken(string) for string in sorted(template.control_strings | special_strings)},
        "ranges": {a.name: [_number(a.low), _number(a.high), a.labels[0], a.labels[-1]] for a in schema.attributes},
        "words": {a.name: label_words(a) for a in schema.attributes if template.labels == "words"},
        "default_ratings": {
            name: _number(check_rating(value, schema[name])) for name, value in (default_ratings or {}).items()
        },
    }
    lines = [f"{{#- steerjax chat template '{template.name}', {kind} model -#}}"]
    for name, value in settings.items():
        # Jinja reads strings as Python does, which has all of JSON's escapes but surrogate pairs.
        text = "none" if value is None else json.dumps(value, ensure_ascii=False)
        lines.append(f"{{%- set {name} = {text} -%}}".replace(WORD_JOINER, "\\u2060"))  # which no reader would see
    return "\n".join([*lines, _SKELETON.read_text(encoding="utf-8")])


def _number(value: float) -> float:
    return int(value) if float(value).is_integer() else value
