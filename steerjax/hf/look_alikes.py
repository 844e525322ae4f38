"""Whether a stock server could take a control token from a text that does not spell it.

The chat template breaks control strings as they are spelt; Jinja sees nothing of what a tokenizer makes of other texts.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import Any

from steerjax.chat.templates import Template
from steerjax.chat.tokenizer import Tokenizer, any_of, broken
from steerjax.errors import ModelError

_CODES = 0x20000  # the planes that have letters
_LETTER = "q"  # that no mark is composed with
_PUT_IN = (" ", "\x07", "\u00ad", "\u0301", "\u2060", "\u20ff", "\U0001f600")


def sealed(content: dict[str, Any], tokenizer: Tokenizer, template: Template, strings: frozenset[str]) -> dict:
    """`content` of a tokenizer.json in which each of `strings` is matched before text is normalised.

    Where that would change the tokens of ordinary text it stays as it is. Raises ModelError: some text that has none of
    `strings` still becomes one.
    """
    raw = [
        token | {"normalized": token["normalized"] and token["content"] not in strings}
        for token in content.get("added_tokens", ())
    ]
    strict, backend = content | {"added_tokens": raw}, _backend(content)
    if strict != content:
        before, ordinary = backend, _ordinary(template)
        backend = _backend(strict)
        if _ids(before, ordinary) == _ids(backend, ordinary):
            content = strict
        else:
            backend = before
    if found := _forged(content, backend, strings - {tokenizer.unknown}):
        raise ModelError(
            f"a stock server would take the control string '{found[0]}' from the text {found[1]!r}, as the tokenizer "
            "makes the same of both\n  cure: train with a tokenizer.json that has it among its added_tokens, with "
            "normalized=false, and not in its model's vocab; without an export, steerjax itself keeps the two apart"
        )
    return content


def _backend(content: Mapping[str, Any]):
    import tokenizers

    return tokenizers.Tokenizer.from_str(json.dumps(content))


def _ids(backend: Any, text: str) -> list[int]:
    """None at all where the tokenizer has no token for something in the text."""
    try:
        return backend.encode(text).ids
    except Exception:  # the library raises nothing narrower
        return []


def _ordinary(template: Template) -> str:
    """An ordinary conversation."""
    texts = zip(("Be kind.", "Hello there, you.", "a:1"), (template.system, template.user, template.label), strict=True)
    system, user, label = (text.join(pair) if pair else "" for text, pair in texts)
    turns = (f"{user}{template.assistant}{answer}{template.end}" for answer in (f"{label}Yes.", " No.\n"))
    return template.begin + system + template.after_end.join(turns)


def _forged(content: Mapping[str, Any], backend: Any, strings: frozenset[str]) -> tuple[str, str] | None:
    """One of `strings`, and a text that has none of them but becomes it."""
    vocab = content["model"]["vocab"]
    pieces = set(vocab if isinstance(vocab, dict) else (piece for piece, _ in vocab))
    added = content.get("added_tokens", ())
    apart = {token["content"] for token in added if not token["normalized"]} - pieces
    for string in sorted(strings - apart):  # those apart are no tokens of the model, which sees the rest
        ids = _ids(backend, f"\n{string}\n")
        index, spelt = backend.token_to_id(string), backend.decode(ids, skip_special_tokens=False).strip()
        for text in look_alikes(string, content):
            text = any_of(strings).sub(lambda found: broken(found[0]), text)  # as the chat template does
            made = _ids(backend, f"\n{text}\n")
            if index in made if index in ids else spelt and spelt in backend.decode(made, skip_special_tokens=False):
                return string, text
    return None


def look_alikes(string: str, content: Mapping[str, Any]) -> Iterator[str]:
    """Texts, `string` among them, of which the tokenizer of a tokenizer.json, `content`, may make it."""
    makes = _makes(json.dumps(content.get("normalizer")))
    yield from (string, string.upper(), string.lower(), string.title(), f"{string[0]}{string}{string[1:]}")
    for put in (*_PUT_IN, *filter(None, [makes.get("")])):
        yield from (string[:place] + put + string[place:] for place in (1, len(string) // 2, len(string) - 1))
    for sign in sorted({*string}):
        yield string.replace(sign, f"<0x{ord(sign):02X}>")  # a byte, as SentencePiece's tokens spell it
    for made, text in makes.items():
        if made and made in string:
            yield from (string.replace(made, text), string.replace(made, text, 1))


@lru_cache
def _makes(normalizer: str) -> dict[str, str]:
    """What a normalizer makes of a character, or of a string that it replaces ("" where it leaves it out), and the
    first of which it makes that."""
    if normalizer == "null":
        return {}
    model = {"type": "BPE", "vocab": {}, "merges": []}
    makes = _backend({"normalizer": json.loads(normalizer), "model": model}).normalizer.normalize_str
    replaced = re.findall(r'"String": ("(?:[^"\\]|\\.)*")', normalizer)
    texts, alone, found = [*map(json.loads, replaced)], makes(_LETTER), {}
    texts += (chr(code) for code in range(_CODES) if not 0xD800 <= code < 0xE000)
    for text in texts:
        made = makes(_LETTER + text).removeprefix(alone)
        if made != text:
            found.setdefault(made, text)
    return found
