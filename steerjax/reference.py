"""Every key of the config with its type, default and meaning, from where each is declared.

`python -m steerjax.reference` writes the text that --help shows, which so needs neither JAX nor the config.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import io
import re
import textwrap
import tokenize
import typing
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from steerjax.config import default_config
from steerjax.flags import REFERENCE
from steerjax.objectives import OBJECTIVES, find_objective
from steerjax.training.config import GROUPS


class Key(NamedTuple):
    """A key: `batch.rows`, what it takes, its default, and what is said of it."""

    name: str
    kind: str
    default: Any
    meaning: str


def groups() -> Iterator[tuple[str, str, list[Key]]]:
    """Each group's name, what it is about, and its keys; objectives' groups come last."""
    values = default_config().to_dict()
    for name, cls in (GROUPS | {name: find_objective(name).Config for name in OBJECTIVES}).items():
        about = inspect.cleandoc(cls.__doc__).split("Attributes:")[0].strip()
        yield name, about, list(_keys(name, cls, values[name]))


def reference_text(width: int = 110) -> str:
    """The groups as plain text."""
    lines = ["config.objectives: what is learnt; one of these or several: " + ", ".join(OBJECTIVES)]
    for name, about, keys in groups():
        lines += ["", *textwrap.wrap(f"config.{name}: {' '.join(about.split())}", width)]
        for key in keys:
            lines.append(f"  --config.{key.name}={key.default!r}  ({key.kind})")
            lines += textwrap.wrap(key.meaning, width, initial_indent=" " * 6, subsequent_indent=" " * 6)
    return "\n".join(lines) + "\n"


def _keys(prefix: str, cls: type, defaults: Mapping[str, Any]) -> Iterator[Key]:
    hints, said = typing.get_type_hints(cls, include_extras=True), _meanings(cls)
    for field in dataclasses.fields(cls):
        name, hint, value = f"{prefix}.{field.name}", hints[field.name], defaults[field.name]
        if dataclasses.is_dataclass(hint):
            yield from _keys(name, hint, value)
        else:
            yield Key(name, _words(hint), value, said.get(field.name, ""))


def _words(hint: Any) -> str:
    """What a key takes, in a user's words."""
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Annotated:
        limits = [limit for part in parts[1:] for limit in getattr(part, "metadata", ())]
        most = [f"at most {limit.le:,}" for limit in limits if hasattr(limit, "le")]
        most += [f"less than {limit.lt:,}" for limit in limits if hasattr(limit, "lt")]
        return ", ".join([_words(parts[0]), *most])
    if origin is typing.Literal:
        return " | ".join(map(str, parts))
    if origin is tuple:
        return f"list of {_words(parts[0])}"
    if parts and str(origin).endswith("Mapping'>"):
        return f"{_words(parts[0])} to {_words(parts[1])}"
    if parts:
        return " | ".join(_words(part) for part in parts)
    return {str: "text", int: "whole number", float: "number", bool: "True | False"}.get(hint, str(hint))


def _meanings(cls: type) -> dict[str, str]:
    """Field -> what the docstring's Attributes or the comments beside it say."""
    found: dict[str, str] = {}
    for owner in reversed([c for c in cls.__mro__ if c is not object]):
        doc = inspect.cleandoc(owner.__doc__ or "")
        for names, text in re.findall(r"^    ([\w, ]+): (.*(?:\n {8,}.*)*)", doc.partition("Attributes:")[2], re.M):
            found |= dict.fromkeys(re.split(r",\s*", names), " ".join(text.split()))
        found |= _comments(textwrap.dedent(inspect.getsource(owner)))
    return found


def _comments(source: str) -> dict[str, str]:
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    comments = {token.start: token.string.lstrip("# ") for token in tokens if token.type == tokenize.COMMENT}
    lines, found = source.splitlines(), {}
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.AnnAssign):
            continue
        first = node.lineno
        while lines[first - 2].lstrip().startswith("#"):
            first -= 1
        said = [text for (line, _), text in sorted(comments.items()) if first <= line <= node.end_lineno]
        if said and not said[0].startswith("noqa"):
            found[node.target.id] = " ".join(said)
    return found


if __name__ == "__main__":
    REFERENCE.write_text(reference_text())
