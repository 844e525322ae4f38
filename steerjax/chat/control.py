"""Text from a user is text: control strings in it are found, refused or made harmless (design decision 11)."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable

# Zero-width, breaks no line, and NFKC keeps it.
WORD_JOINER = "\u2060"


def _fold(text: str) -> tuple[str, list[int]]:
    """The NFKC form of each character in turn, and for each character of the result where it comes from.

    Character by character, because the place must be known; as control strings begin and end with ASCII characters,
    which NFKC composes with nothing before them, every occurrence under NFKC of the whole text is one here too.
    """
    parts = [unicodedata.normalize("NFKC", character) for character in text]
    origin = [index for index, part in enumerate(parts) for _ in part]
    return "".join(parts), origin


def _places(text: str, strings: Iterable[str]) -> list[tuple[int, int, str]]:
    """(start, end, string) of the first occurrence of each string, in `text` or its NFKC form; indices into `text`."""
    found = [(text.index(s), text.index(s) + len(s), s) for s in strings if s in text]
    if found or text.isascii() or unicodedata.is_normalized("NFKC", text):
        return found
    folded, origin = _fold(text)
    hits = ((folded.index(s), s) for s in strings if s in folded)
    return [(origin[at], origin[at + len(s) - 1] + 1, s) for at, s in hits]


def find_control_string(text: str, strings: Iterable[str]) -> str | None:
    """The first control string in `text` or in its NFKC form (full-width look-alikes), None if there is none."""
    places = _places(text, strings)
    return min(places, key=lambda place: (place[0], -len(place[2])))[2] if places else None


def escape(text: str, strings: Iterable[str]) -> str:
    """`text` with U+2060 after the first character of every occurrence of a control string, seen as above.

    An occurrence of one single character cannot be broken and stays: look with `find_control_string` again.
    """
    while places := [place for place in _places(text, strings) if place[1] - place[0] > 1]:
        start = min(places)[0]
        text = text[: start + 1] + WORD_JOINER + text[start + 1 :]
    return text
