"""Pairs of responses to one prompt, and which of the two people prefer.

Sources: HelpSteer2-Preference (arXiv 2410.01257), HelpSteer3-Preference (arXiv 2505.11475), HH-RLHF (arXiv 2204.05862).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from steerjax.data.checks import Row, present, system_of, text_of
from steerjax.data.conversation import Turn
from steerjax.data.formats import message_turns, prompt_turns
from steerjax.data.readers import iter_rows
from steerjax.errors import ConfigError, DataError

STRONGEST = 3
_NO_VALID_RESPONSE = -100  # HelpSteer2: the raters call neither response valid
_HH_TURN = re.compile(r"\n\n(Human|Assistant):")
_HH_ROLES = {"Human": "user", "Assistant": "assistant"}


@dataclass(frozen=True)
class Preference:
    """A prompt and two responses.

    Attributes:
        turns: of the prompt; they alternate, and the first and the last are the user's.
        responses: the first and the second.
        preference: -3..3; negative means that the first is better, positive the second, 0 neither.
        system, id, file, line: as in `Conversation`.
    """

    turns: tuple[Turn, ...]
    responses: tuple[str, str]
    preference: int
    system: str | None = None
    id: str = ""
    file: str = ""
    line: int = 0

    def content(self) -> list:
        """What a duplicate has in common with it."""
        return [self.system, [(turn.role, turn.content) for turn in self.turns], self.responses, self.preference]

    def to_json(self) -> dict:
        """The preference format of the documentation (docs/formats.md), one object a line."""
        return {
            "system": self.system,
            "turns": [{"role": turn.role, "content": turn.content} for turn in self.turns],
            "responses": list(self.responses),
            "preference": self.preference,
            "id": self.id,
        }


def read_preferences(
    source: str, format: str = "preference", *, split: str | None = None, dropped: Counter[str] | None = None
) -> Iterator[tuple[int, Preference | DataError]]:
    """(line, preference) of a source; a row that cannot be used is a DataError with its file and line.

    Args:
        format: a key of `PREFERENCE_FORMATS`.
        split: only rows whose column `split` has this value.
        dropped: counts the rows that are left out: of another split, or neither response is valid.

    Raises:
        DataError: the source cannot be read at all. ConfigError: unknown format.
    """
    if format not in PREFERENCE_FORMATS:
        raise ConfigError(f"unknown format '{format}'; use one of: {', '.join(PREFERENCE_FORMATS)}")
    left_out = Counter() if dropped is None else dropped
    for line, row in iter_rows(source):
        try:
            if isinstance(row, DataError):
                raise row
            if split is not None and text_of(row, "split") != split:
                left_out[f"rows of another split than {split}"] += 1
                continue
            pair = preference_from_row(row, format)
        except DataError as error:
            yield line, error.at(source, line)
            continue
        if pair is not None:
            yield line, replace(pair, file=source, line=line, id=pair.id or f"{source}:{line}")
        else:
            left_out["pairs without a valid response"] += 1


def preference_from_row(row: Row, format: str = "preference") -> Preference | None:
    """One row as a preference; None where the raters call neither response valid (-100).

    Raises:
        DataError: the row cannot be used; names the field.
    """
    pair = PREFERENCE_FORMATS[format](row)
    if pair.turns[-1].role != "user":
        raise DataError("the prompt does not end with the user", cure="the responses answer the user; remove the row")
    return None if pair.preference == _NO_VALID_RESPONSE else pair


def _from_preference(row: Row) -> Preference:
    system, turns = message_turns(row, "turns")
    responses = present(row, "responses")
    if not isinstance(responses, list) or len(responses) != 2:
        raise DataError("expected a list of two texts", field="responses", cure="write two responses")
    first, second = (text_of({"responses": response}, "responses") for response in responses)
    name = text_of(row, "id") if row.get("id") else ""
    return Preference(turns, (first, second), _strength(row, "preference"), system, name)


def _from_helpsteer2(row: Row) -> Preference:
    responses = text_of(row, "response_1"), text_of(row, "response_2")
    return Preference(prompt_turns(row), responses, _strength(row, "preference_strength"), system_of(row))


def _from_helpsteer3(row: Row) -> Preference:
    if isinstance(present(row, "context"), str):
        system, turns = system_of(row), (Turn("user", text_of(row, "context")),)
    else:
        system, turns = message_turns(row, "context")
    responses = text_of(row, "response1"), text_of(row, "response2")
    return Preference(turns, responses, _strength(row, "overall_preference"), system)


def _from_hh(row: Row) -> Preference:
    """HH-RLHF tells which response was chosen, not how much better it is: -1, the chosen one first."""
    (*prompt, chosen), (*other, rejected) = _hh_turns(row, "chosen"), _hh_turns(row, "rejected")
    if prompt != other:
        raise DataError("chosen and rejected differ before the last turn", field="rejected", cure="remove the row")
    return Preference(tuple(prompt), (chosen.content, rejected.content), -1)


def _hh_turns(row: Row, key: str) -> list[Turn]:
    """The turns of "\\n\\nHuman: ...\\n\\nAssistant: ..." without white space around them; the last is the response."""
    head, *pieces = _HH_TURN.split(text_of(row, key))
    names, contents = pieces[::2], pieces[1::2]
    if head.strip() or len(names) < 2 or names != ["Human", "Assistant"] * (len(names) // 2):
        cure = "write \\n\\nHuman: ...\\n\\nAssistant: ... in turn, or remove the row"
        raise DataError("Human and Assistant do not alternate up to a response", field=key, cure=cure)
    return [
        Turn(_HH_ROLES[name], text_of({key: content.strip()}, key))
        for name, content in zip(names, contents, strict=True)
    ]


PREFERENCE_FORMATS: dict[str, Callable[[Row], Preference]] = {
    "preference": _from_preference,
    "helpsteer2-preference": _from_helpsteer2,
    "helpsteer3": _from_helpsteer3,
    "hh": _from_hh,
}


def _strength(row: Row, key: str) -> int:
    value = present(row, key)
    known = (*range(-STRONGEST, STRONGEST + 1), _NO_VALID_RESPONSE)
    if isinstance(value, bool) or not isinstance(value, int | float) or value not in known:
        cure = "negative where the first response is better; -100 where neither is valid"
        raise DataError(f"{value!r} is no whole number from -{STRONGEST} to {STRONGEST}", field=key, cure=cure)
    return int(value)
