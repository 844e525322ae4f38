"""The one renderer: conversation (with ratings) -> text -> token ids and what each token is.

Tokens are made segment by segment (through a header, a label line, the end of a response), so a prompt's tokens never
depend on the response, and a generation starts from the tokens that training saw. The whole text in one go has the same
tokens but where a tokenizer joins characters across a boundary: white space before a response that keeps it, as with
`extra_id`, to the header's newline, the two spaces of an empty response of `llama2`, the last `>` of a marker that is
ordinary text to it.

A person's or a model's text never becomes a control token, whatever it spells: where the tokenizer can be told, its
tokens are those of ordinary text (`HIDE`); where not, U+2060 breaks the control string, or where the tokenizer drops
that, another mark.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import IntEnum
from functools import cached_property, lru_cache
from typing import Literal, NamedTuple

import numpy as np
import pydantic.dataclasses

from steerjax.chat.labels import check_labels, label_line, label_parts, label_tokens
from steerjax.chat.templates import TEMPLATES, Template
from steerjax.chat.tokenizer import (
    HIDE,
    WORD_JOINER,
    Tokenizer,
    any_of,
    broken,
    load_tokenizer,
    with_special_tokens,
)
from steerjax.data.conversation import ROLES, Conversation, Turn
from steerjax.errors import DataError
from steerjax.schema import Schema, round_rating
from steerjax.typed import STRICT, Name

Label = Mapping[str, float]

_MARKS = (WORD_JOINER, " ", "_", "")  # in turn, as a tokenizer may drop one; the last replaces the string
_RECENT = 256  # texts whose tokens are kept: the rows of a prompt mostly stand together


@pydantic.dataclasses.dataclass(frozen=True, config=STRICT)
class ChatConfig:
    """How a conversation becomes tokens."""

    # A folder or file; "auto" is that of config.model.source, or for a random model the one in the package.
    tokenizer: Name = "auto"
    # "source" is what config.model.source was trained with, or its tokenizer's own (docs/formats.md).
    template: Literal["extra_id", "chatml", "llama3", "llama2", "source"] = "extra_id"
    system_prompt: str = "default"  # for conversations without one; "default" is the template's own
    # How label lines spell ratings (docs/formats.md); "auto" is as the source, else in numbers.
    labels: Literal["auto", "numbers", "words", "tokens"] = "auto"


class TokenRole(IntEnum):
    """What a token is. SFT trains RESPONSE and END."""

    PROMPT = 0
    LABEL = 1
    RESPONSE = 2
    END = 3


@dataclass(frozen=True)
class ResponseSpan:
    """The response of assistant turn `turn`: tokens [start, end), and its end: tokens [end, stop)."""

    turn: int
    start: int
    end: int
    stop: int


@dataclass(frozen=True, eq=False)
class Rendered:
    """A conversation as the model sees it.

    `root` counts the tokens through the header of the first assistant turn that follows a user turn, which
    conversations share that agree so far; all tokens where there is no such turn.
    """

    text: str  # what the tokens spell
    tokens: np.ndarray  # int32 [T]
    roles: np.ndarray  # `TokenRole`, int8 [T]
    responses: tuple[ResponseSpan, ...]  # one for each assistant turn, in order
    root: int


class RatingPart(NamedTuple):
    """Of one attribute in a label line behind a response: tokens before its value, and of each label's value."""

    before: tuple[int, ...]
    values: dict[int, tuple[int, ...]]


@dataclass(frozen=True)
class _Segment:
    """Text that is encoded in one go, with its end where it is a response; `asks`: a user speaks in it."""

    role: TokenRole
    text: str
    end: str = ""
    turn: int = -1
    asks: bool = False


@dataclass(frozen=True)
class Renderer:
    """Turns conversations into tokens; label lines have the names and the order of `schema`."""

    tokenizer: Tokenizer
    template: Template
    schema: Schema
    system_prompt: str | None = None  # where `Conversation.system` is None; None: the template's default, "": empty

    def render(
        self,
        conversation: Conversation,
        labels: Sequence[Label | None] | None = None,
        *,
        generation_prompt: bool = False,
        generation_label: Label | None = None,
        rated: int | None = None,
        rating: Label | None = None,
    ) -> Rendered:
        """The whole conversation, and for a `generation_prompt` the header and label line of an assistant turn.

        `labels` are one for each turn: the ratings to write before a response; None or an empty mapping writes none.
        With `rated`, an assistant turn, the text ends where its reward is read; with its `rating` too, after a label
        line, or where that begins if the mapping is empty.

        Raises DataError: half a surrogate in a text, an unknown role, turns that the template cannot write in this
        order, a label with an unknown attribute.
        """
        if generation_label is not None and not generation_prompt:
            raise ValueError("generation_label needs generation_prompt=True")
        generation = (generation_label or {}) if generation_prompt else None
        text, tokens, counts, responses, root = "", [], [], [], None
        try:
            for segment in self._segments(conversation, labels, generation, rated, rating):
                ids, own = self._encode_segment(segment, text)
                if segment.role == TokenRole.RESPONSE:
                    start = len(tokens)
                    responses.append(ResponseSpan(segment.turn, start, start + own, start + len(ids)))
                tokens += ids
                counts += (segment.role, own), (TokenRole.END, len(ids) - own)
                text += segment.text + segment.end
                root = len(tokens) if root is None and segment.asks else root
        except DataError as error:
            raise error.at(conversation.file, conversation.line) from None
        kinds, sizes = np.array(counts).T
        ids, kinds = np.array(tokens, np.int32), np.repeat(kinds.astype(np.int8), sizes)
        return Rendered(text.replace(HIDE, ""), ids, kinds, tuple(responses), len(ids) if root is None else root)

    def reward_tokens(self, conversation: Conversation, turn_index: int) -> tuple[np.ndarray, int]:
        """Tokens (int32 [T]) whose last one carries the reward of assistant turn `turn_index`, and `Rendered.root`.

        No label is written. Raises DataError as `render`, and where the turn is not an assistant's.
        """
        rendered = self.render(conversation, rated=turn_index)
        return rendered.tokens, rendered.root

    def response_tokens(self, prompt: Conversation, response: str, label: Label | None) -> tuple[np.ndarray, int, int]:
        """A response to a prompt, which ends with the user's turn, after a label line of `label`, where there is one.

        Returns tokens (int32 [T]) through the response's end, `Rendered.root`, and where the response begins. Raises
        DataError as `render`.
        """
        whole = replace(prompt, turns=(*prompt.turns, Turn("assistant", response)), samples=())
        rendered = self.render(whole, [*(None for _ in prompt.turns), label])
        span = rendered.responses[-1]
        return rendered.tokens[: span.stop], rendered.root, span.start

    def rating_tokens(
        self, conversation: Conversation, turn_index: int, ratings: Label
    ) -> tuple[np.ndarray, int, np.ndarray]:
        """Assistant turn `turn_index` with a label line of its ratings behind it (NeMo-Aligner's TEXT_TO_VALUE).

        Returns tokens (int32 [T]), `Rendered.root`, and where the label line's tokens stand, its end among them (int
        [n]). Without ratings the text ends where the line begins, which is where decoding starts; `rating_parts` are
        what follows. No other label is written. Raises DataError as `reward_tokens`, or as `schema.round_rating`.
        """
        rendered = self.render(conversation, rated=turn_index, rating=ratings)
        return rendered.tokens, rendered.root, np.flatnonzero(rendered.roles == TokenRole.LABEL)

    def rating_parts(self, names: Collection[str]) -> tuple[list[RatingPart], tuple[int, ...]]:
        """Of each named attribute, in the schema's order, the tokens that `rating_tokens` writes; and the end's."""
        before, parts = self._rating_opening or self.template.reward_end, []
        for text, values in label_parts(self.schema, names, self.template.labels):
            own = {label: self._encode(value, text or before) for label, value in values.items()}
            parts.append(RatingPart(self._encode(text, before), own))
            before = next(iter(values.values()))
        return parts, self._encode(self.template.label[1], before)

    def broken(self, conversation: Conversation) -> int:
        """How many texts of the conversation are written with U+2060 inside, as they spell a control string."""
        other = (turn for turn in conversation.rejected if turn not in conversation.turns)
        said = (*conversation.turns, *other, *conversation.samples)
        texts = [self._system_text(conversation) or "", *(each.content for each in said)]
        return sum(self._as_text(text).replace(HIDE, "") != text for text in texts)

    def _segments(
        self,
        conversation: Conversation,
        labels: Sequence[Label | None] | None,
        generation: Label | None,
        rated: int | None,
        rating: Label | None,
    ) -> Iterator[_Segment]:
        """Of `render`; `generation`: the label of the answer that is asked for, None where none is."""
        template, turns = self.template, conversation.turns
        if rated is not None and (not 0 <= rated < len(turns) or turns[rated].role != "assistant"):
            raise DataError("no response to rate here", field=f"turns[{rated}]", cure="name an assistant turn")
        labels = [None] * len(turns) if labels is None else labels
        system = self._system_text(conversation)
        if system is not None and not template.system:
            cure = "leave it out (with config.chat.system_prompt, too), or choose chatml, llama3 or extra_id"
            raise DataError(f"the template {template.name} cannot write a system text", field="system", cure=cure)
        system = "" if system is None else self._content(system, "system", "system").join(template.system)
        prompt, asks = template.begin + ("" if template.system_in_user else system), False
        for index, (turn, label) in enumerate(zip(turns, labels, strict=True)):
            prompt += self._header(turns, index)
            content = self._content(turn.content, turn.role, f"turns[{index}].content")
            if turn.role == "user":
                prompt += (system if template.system_in_user and index == 0 else "") + content + template.user[1]
                asks = True
                continue
            line = self._label(label, f"turns[{index}].ratings")
            yield _Segment(TokenRole.PROMPT, prompt, asks=asks)
            yield _Segment(TokenRole.LABEL, line)
            if template.last_gap and index == (len(turns) - 1 if rated is None else rated):
                content = template.last_gap + content.lstrip("\n")
            response = content if line else template.unlabelled_gap + content
            yield _Segment(TokenRole.RESPONSE, response, template.reward_end if index == rated else template.end, index)
            if index == rated:
                if rating is not None:
                    yield from self._rating(rating, f"turns[{index}].ratings")
                return
            prompt, asks = template.after_end, False
        if generation is not None:  # in one segment with what stands before it, as in training
            prompt += self._header(turns, len(turns))
        yield _Segment(TokenRole.PROMPT, prompt, asks=asks)
        yield _Segment(TokenRole.LABEL, self._label(generation, "generation_label"))

    def _rating(self, ratings: Label, field: str) -> Iterator[_Segment]:
        """What follows `reward_end`: tokens of an attribute's name, and of its value, are made apart."""
        yield _Segment(TokenRole.PROMPT, self._rating_opening)
        try:
            labels = {name: round_rating(value, self.schema[name]) for name, value in ratings.items()}
        except DataError as error:
            raise error.but(field=f"{field}.{error.field}") from None
        names = [name for name in self.schema.names if name in labels]
        for name, (text, values) in zip(names, label_parts(self.schema, names, self.template.labels), strict=True):
            yield _Segment(TokenRole.LABEL, text)
            yield _Segment(TokenRole.LABEL, values[labels[name]])
        if names:
            yield _Segment(TokenRole.LABEL, self.template.label[1])

    @property
    def _rating_opening(self) -> str:
        """What opens a label line behind `reward_end`, less what that has written."""
        opening = self.template.label[0]
        return "" if self.template.reward_end.endswith(opening) else opening

    def _header(self, turns: Sequence[Turn], index: int) -> str:
        """What opens turn `index` or the answer after all, less what the end of the response before it has written."""
        template, field = self.template, f"turns[{index}].role"
        role = turns[index].role if index < len(turns) else "assistant"
        if role not in ROLES:
            cure = f"use one of: {', '.join(ROLES)} (a system text has its own field)"
            raise DataError(f"unknown role '{role}'", field=field, cure=cure)
        if template.alternates and role != ROLES[index % 2]:
            message = f"'{role}' where the template {template.name} can only write '{ROLES[index % 2]}'"
            cure = "let turns go user, assistant, user, ..., or choose chatml, llama3 or extra_id"
            raise DataError(message, field=field, cure=cure)
        after_response = index > 0 and turns[index - 1].role == "assistant"
        header = template.user[0] if role == "user" else template.assistant
        return header.removeprefix(template.end_opens) if after_response else header

    def _system_text(self, conversation: Conversation) -> str | None:
        choices = (conversation.system, self.system_prompt, self.template.default_system)
        return next((choice for choice in choices if choice is not None), None)

    def _label(self, label: Label | None, field: str) -> str:
        try:
            return label_line(label, self.schema, self.template.labels).join(self.template.label) if label else ""
        except DataError as error:
            raise error.but(field=f"{field}.{error.field}") from None

    def _content(self, text: str, role: str, field: str) -> str:
        """A person's or a model's text, as `_as_text` leaves it."""
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            message, cure = f"not a text: a lone surrogate at character {error.start}", "repair the file's encoding"
            raise DataError(message, field=field, cure=cure) from None
        try:
            return self._as_text(self.template.stripped(text, role))
        except DataError as error:
            raise error.but(field=field) from None

    @cached_property
    def _as_text(self) -> Callable[[str], str]:
        return lru_cache(_RECENT)(self._hidden)

    def _hidden(self, text: str) -> str:
        """`text` with `HIDE` or a mark inside whatever would become a control token or spell one: in time that grows
        as its length.

        The tokens decide, as no search of a text finds what a tokenizer makes of it. Where a hidden text is one
        still, what its tokens spell is written in its place, where a search finds all.
        """
        spelt, told = any_of(self._controls), self.tokenizer.told
        if self.tokenizer.transparent and not spelt.search(text) and not spelt.search(self.tokenizer.normalized(text)):
            return text
        text = spelt.sub(lambda found: broken(found[0], HIDE if found[0] in told else WORD_JOINER), text)
        for mark in _MARKS:
            said = self._control_said(text)
            if said is None:
                return text
            text = self._watched.sub(lambda found, mark=mark: broken(found[0], mark), said)
        if self._control_said(text) is None:
            return text
        cure = "remove the row, or use a tokenizer that does not make control tokens of other text"
        raise DataError("holds a control string that no mark breaks", cure=cure)

    def _control_said(self, text: str) -> str | None:
        """What the tokens of a text spell, if they are or spell a control string; else None."""
        ids = self._text_ids(text)
        said = self.tokenizer.decode(ids, continuation=True)
        if self._control_ids.isdisjoint(ids) and not (self._untold and self._untold.search(said)):
            return None
        return said.replace(self.tokenizer.unknown, "\ufffd") if self.tokenizer.unknown else said

    def _text_ids(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, continuation=True, controls=self.template.control_strings)

    @cached_property
    def _control_ids(self) -> frozenset[int]:
        return frozenset(map(self.tokenizer.token_id, self._controls - {self.tokenizer.unknown})) - {None}

    @cached_property
    def _untold(self) -> re.Pattern[str] | None:
        """What the tokens of control strings spell that the tokenizer cannot be told of."""
        untold = self._controls - self.tokenizer.told - {self.tokenizer.unknown}
        return any_of(untold | self._spelt(untold)) if untold else None

    @cached_property
    def _watched(self) -> re.Pattern[str]:
        watched = self._controls - {self.tokenizer.unknown}
        return any_of(watched | self._spelt(watched))

    def _spelt(self, strings: frozenset[str]) -> frozenset[str]:
        """As their tokens spell them, e.g. with spaces between."""
        said = (self.tokenizer.decode(self._text_ids(broken(s, HIDE)), continuation=True).strip() for s in strings)
        return frozenset(said) - {"", self.tokenizer.unknown}

    @cached_property
    def _controls(self) -> frozenset[str]:
        return self.template.control_strings | self.tokenizer.special_strings

    def _encode(self, text: str, before: str) -> tuple[int, ...]:
        return self._encoded(text, not before or before.endswith(tuple(self.tokenizer.restarts & self._controls)))

    @cached_property
    def _encoded(self) -> Callable[[str, bool], tuple[int, ...]]:
        """(text, whether it is a fresh one) -> token ids."""

        def encode(text: str, fresh: bool) -> tuple[int, ...]:
            return tuple(self.tokenizer.encode(text, continuation=not fresh, controls=self.template.control_strings))

        return lru_cache(_RECENT)(encode)

    def _encode_segment(self, segment: _Segment, before: str) -> tuple[tuple[int, ...], int]:
        """Tokens of text and end, and the number of those before the end's, whose is a token that spans both."""
        ids = self._encode(segment.text + segment.end, before)
        end = self._encode(segment.end, segment.text or before)
        if ids[len(ids) - len(end) :] == end:
            return ids, len(ids) - len(end)
        return ids, len(os.path.commonprefix([ids, self._encode(segment.text, before)]))  # noqa: RUF071 - tokens


def make_renderer(config: ChatConfig, schema: Schema, template: Template | None = None, kind: str = "chat") -> Renderer:
    """The renderer of an experiment whose tokenizer is known (not "auto"), with the `template` of its model source.

    That of a reward model (`kind`) writes no label. Raises ModelError, as `load_tokenizer` and `with_special_tokens`.
    ConfigError: an attribute that the form of the label line cannot write.
    """
    system_prompt = None if config.system_prompt == "default" else config.system_prompt
    template = template or TEMPLATES[config.template]
    template = template if config.labels == "auto" else replace(template, labels=config.labels)
    tokenizer = load_tokenizer(config.tokenizer)
    if kind == "chat":
        check_labels(schema, template.labels)
        tokenizer = with_special_tokens(tokenizer, label_tokens(schema, template.labels))
    return Renderer(tokenizer, template, schema, system_prompt)
