"""Values from outside (configs, config.json, provenance, settings) as the types that declare them, errors in our form.

Ranges, enumerations and types stand in the declarations (pydantic); this module only words what they refuse.
"""

import dataclasses
import difflib
import functools
import json
import os
import re
import typing
from pathlib import Path
from typing import Annotated, Any, TypeVar

import pydantic
import pydantic.dataclasses
from pydantic import AfterValidator, Field

from steerjax.errors import SteerjaxError

T = TypeVar("T")

# For `pydantic.dataclasses.dataclass`: an unknown key is an error, and a bool is no number.
STRICT = pydantic.ConfigDict(extra="forbid", strict=True)

# Declares the rows of a file as a class, of whose keys only those that are read are checked.
row_type = pydantic.dataclasses.dataclass(frozen=True, config=pydantic.ConfigDict(strict=True, allow_inf_nan=False))

# Numbers from outside. Whole ones fit an int32 and others a float32, as on devices; a size is of an array's dimension.
Count = Annotated[int, Field(ge=0, le=2**31 - 1)]
Positive = Annotated[int, Field(ge=1, le=2**31 - 1)]
Size = Annotated[int, Field(ge=1, le=2**24)]
SizeOrNone = Annotated[int, Field(ge=0, le=2**24)]  # 0 is what follows from the others
Number = Annotated[int, Field(ge=1, le=10_000)]  # of what is made one by one
NotNegative = Annotated[float, Field(ge=0, le=1e30)]
PositiveFloat = Annotated[float, Field(gt=0, le=1e30)]


@AfterValidator
def _name(text: str) -> str:
    if "\0" in text:
        raise ValueError("a NUL character, which no name of a file has; cure: remove it")
    return text


Name = Annotated[str, _name]  # of a file or folder

_adapter = functools.cache(pydantic.TypeAdapter)


def typed(kind: type[T], value: Any, where: str, error: type[SteerjaxError]) -> T:
    """`value` as a `kind`, a pydantic dataclass or any type that pydantic knows.

    Raises:
        error: names the first key that is wrong (after `where`: `config`, a file), its value, what is expected, a cure.
    """
    try:  # by way of JSON, whose strict rules take a list for a tuple and a whole number for a float, and no more
        return _adapter(kind).validate_json(_json(value))
    except pydantic.ValidationError as found:
        if found.errors()[0]["type"] == "json_invalid":
            raise error(f"{where} is nested too deeply; cure: lists and mappings of a few levels") from None
        raise error(_message(found.errors(include_url=False)[0], kind, where)) from None
    except (TypeError, ValueError, RecursionError) as problem:
        where, problem = _not_plain(value, where, problem)
        raise error(f"{where} is no plain data: {problem}; cure: numbers, texts, lists and mappings") from None


def _not_plain(value: Any, where: str, problem: Exception) -> tuple[str, Exception]:
    """The first key that JSON has no form for, with the reason."""
    parts = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list | tuple) else ()
    for key, part in parts if where.count(".") < 20 else ():
        try:
            _json(part)
        except (TypeError, ValueError, RecursionError) as found:
            return _not_plain(part, f"{where}.{key}", found)
    return where, problem


def _json(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False).encode()  # half a surrogate, which no text has, ends here


def separated(value: Any) -> Any:
    """`a.jsonl,b.jsonl` as a list. A flag on the command line puts it into a list of one.

    A comma in the braces of a regular expression parts nothing.
    """
    text = value[0] if isinstance(value, (list, tuple)) and len(value) == 1 else value
    if not isinstance(text, str):
        return value
    return [part.strip() for part in re.split(r",(?![^{}]*})", text) if part.strip()]


def read_json(kind: type[T], path: str | os.PathLike, error: type[SteerjaxError], cure: str) -> T:
    """The JSON file at `path` as a `kind`. Raises `error`: it cannot be read, is no JSON, or `typed` refuses it."""
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as problem:
        raise error(f"'{path}' cannot be read: {problem}\n  cure: {cure}") from None
    return typed(kind, value, str(path), error)


def _message(problem: dict, kind: Any, where: str) -> str:
    """`config.batch.rows is 0: ...; cure: ...`."""
    place = [str(part) for part in problem["loc"] if not str(part).startswith("function-")]
    key = ".".join([where, *place])
    if problem["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        return f"unknown key {key}; cure: {_near(kind, problem['loc'])}"
    if problem["type"] in ("missing", "missing_argument"):
        return f"{key} is missing; cure: add it"
    said = problem["msg"].removeprefix("Value error, ")
    said = said[0].lower() + said[1:] if said[:1].isupper() and not said[:2].isupper() else said
    return f"{key} is {problem['input']!r:.80}: {said}" + ("" if "cure:" in said else f"; cure: {_cure(problem)}")


def _cure(problem: dict) -> str:
    context = problem.get("ctx", {})
    if "expected" in context:
        return f"one of {context['expected']}"
    limits = {"ge": "at least", "gt": "more than", "le": "at most", "lt": "less than"}
    wanted = [f"{words} {context[name]}" for name, words in limits.items() if name in context]
    if "min_length" in context:
        wanted.append(f"at least {context['min_length']} of them")
    kind = problem["type"].removesuffix("_type").removesuffix("_parsing").replace("_", " ")
    kind = {"dataclass": "a mapping of keys", "finite number": "a finite number"}.get(kind, f"a value of type {kind}")
    return " and ".join(wanted) or kind


def _near(kind: Any, place: tuple) -> str:
    """The key that might have been meant, among those of the class that refused this one."""
    for name in place[:-1]:
        kind = typing.get_type_hints(kind).get(name) if dataclasses.is_dataclass(kind) else None
    known = [field.name for field in dataclasses.fields(kind)] if dataclasses.is_dataclass(kind) else []
    close = difflib.get_close_matches(str(place[-1]), known, n=1)
    return f"did you mean {close[0]}?" if close else f"the keys are {', '.join(known)}" if known else "remove it"
