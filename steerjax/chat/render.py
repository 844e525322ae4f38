"""The one renderer: conversation (with ratings) -> text -> token ids and what each token is.

Tokens are made segment by segment. A segment ends after the header of an assistant turn, after its label line, and
after the end of the response, so a prompt's tokens never depend on the response, and a generation starts from the
very tokens that training saw. Within a segment the text is encoded in one go; a response is encoded with its end.

Tokenising the whole text at once gives the same tokens, except where a tokenizer joins characters across a boundary:

* `extra_id`, whose texts are not stripped: a response that begins with whitespace, joined to the header's newline.
* `llama2`: an empty response, whose two spaces may be joined.
* a template whose control strings are ordinary text to the tokenizer: the last `>` after a response, joined to what
  follows (Llama 3 may join it to a letter or a newline, Llama 2 to a `<`).

A person's or a model's text never becomes a control token, whatever it spells (design, decision 11): where the
tokenizer can be told, its tokens are those of ordinary text (`HIDE`); where not, U+2060 breaks the control string, and
`Renderer.broken` counts it.
"""

from __future__ import annotations

from bisect import bisect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import IntEnum
from functools import cached_property

import numpy as np

from steerjax.chat.templates import Template
from steerjax.chat.tokenizer import HIDE, WORD_JOINER, Tokenizer, any_of, broken, missing_markers
from steerjax.data.conversation import ROLES, Conversation
from steerjax.errors import DataError
from steerjax.schema import Schema, format_label

Label = Mapping[str, float]


class TokenRole(IntEnum):
    """What a token is. SFT trains RESPONSE and END."""

    PROMPT = 0
    LABEL = 1
    RESPONSE = 2
    END = 3


@dataclass(frozen=True)
class ResponseSpan:
    """Where an assistant turn's response stands, in tokens.

    Attributes:
        turn: index of the turn in the conversation.
        start: the first token of the response.
        end: one past its last token, the first token of its end.
        stop: one past the last token of its end.
    """

    turn: int
    start: int
    end: int
    stop: int


@dataclass(frozen=True, eq=False)
class Rendered:
    """A conversation as the model sees it.

    Attributes:
        text: what the tokens spell.
        tokens: int32 [T].
        roles: `TokenRole`, int8 [T].
        responses: one for each assistant turn, in order.
        root: tokens through the header of the first assistant turn that follows a user turn: what conversations share
            that agree so far. All tokens where there is no such turn.
    """

    text: str
    tokens: np.ndarray
    roles: np.ndarray
    responses: tuple[ResponseSpan, ...]
    root: int


@dataclass(frozen=True)
class _Segment:
    """Text that is encoded in one go; `end` and `turn` belong to responses, `asks` says that a user speaks in it."""

    role: TokenRole
    text: str
    end: str = ""
    turn: int = -1
    asks: bool = False


@dataclass(frozen=True)
class Renderer:
    """Turns conversations into tokens.

    Attributes:
        tokenizer: see `load_tokenizer`.
        template: one of `TEMPLATES`.
        schema: names and order of the attributes in label lines.
        system_prompt: the system text of conversations that have none (`system` is None); None means the template's
            default. An empty text ("") is written as an empty system part.
    """

    tokenizer: Tokenizer
    template: Template
    schema: Schema
    system_prompt: str | None = None

    def render(
        self,
        conversation: Conversation,
        labels: Sequence[Label | None] | None = None,
        *,
        generation_prompt: bool = False,
        generation_label: Label | None = None,
    ) -> Rendered:
        """The whole conversation.

        Args:
            labels: the ratings to write before the response of each turn, one entry a turn; None or an empty mapping
                writes no label line.
            generation_prompt: append the header of an assistant turn.
            generation_label: ratings of the turn that is to be generated.

        Raises:
            DataError: half a surrogate in a text, an unknown role, turns that the template cannot write in this order,
                a label of a user turn or with an unknown attribute.
        """
        if generation_label is not None and not generation_prompt:
            raise ValueError("generation_label needs generation_prompt=True")
        turns = conversation.turns
        segments = self._segments(conversation, labels, len(turns))
        if generation_prompt:
            self._check_order(conversation, len(turns), "assistant")
            after_response = bool(turns) and turns[-1].role == "assistant"
            # One segment with what stands before it, as in training.
            last = segments.pop()
            prompt = last.text + self._opening(self.template.assistant, after_response)
            label = self._label(conversation, generation_label, "generation_label")
            segments += [replace(last, text=prompt), _Segment(TokenRole.LABEL, label)]
        return self._assemble(segments)

    def reward_tokens(self, conversation: Conversation, turn_index: int) -> tuple[np.ndarray, int]:
        """The text whose last token carries the reward of assistant turn `turn_index`; no label is written.

        Returns:
            Its tokens, int32 [T], and `Rendered.root` of them.

        Raises:
            DataError: as `render`, or the turn is not an assistant's.
        """
        turns = conversation.turns
        if not 0 <= turn_index < len(turns) or turns[turn_index].role != "assistant":
            place, cure = f"turns[{turn_index}]", "name an assistant turn"
            raise self._error(conversation, "no response to rate here", place, cure)
        # Drop what follows the response, and read the reward where the template says.
        *segments, response, _ = self._segments(conversation, None, turn_index + 1)
        rendered = self._assemble([*segments, replace(response, end=self.template.reward_end)])
        return rendered.tokens, rendered.root

    def broken(self, conversation: Conversation) -> int:
        """How many texts of the conversation are written with U+2060 inside, as they spell a control string."""
        texts = [self._system_text(conversation) or "", *(turn.content for turn in conversation.turns)]
        return sum(self._as_text(text).replace(HIDE, "") != text for text in texts)

    def _segments(
        self, conversation: Conversation, labels: Sequence[Label | None] | None, count: int
    ) -> list[_Segment]:
        """The first `count` turns; the last segment is the prompt that follows them, often empty."""
        template, turns = self.template, conversation.turns[:count]
        if labels is not None and len(labels) != len(conversation.turns):
            message = f"{len(labels)} labels for {len(conversation.turns)} turns"
            raise self._error(conversation, message, "labels", "give one label or None a turn")
        system = self._system(conversation)
        prompt = template.begin + ("" if template.system_in_user else system)
        segments: list[_Segment] = []
        asks = False
        for index, turn in enumerate(turns):
            self._check_order(conversation, index, turn.role)
            content = self._content(conversation, turn.content, f"turns[{index}].content")
            after_response = index > 0 and turns[index - 1].role == "assistant"
            label = labels[index] if labels is not None else None
            if turn.role == "user":
                if label is not None:
                    cure = "give labels to assistant turns only"
                    raise self._error(conversation, "a label of a user turn", f"turns[{index}]", cure)
                inside = system if template.system_in_user and index == 0 else ""
                prompt += self._opening(template.user[0], after_response) + inside + content + template.user[1]
                asks = True
                continue
            prompt += self._opening(template.assistant, after_response)
            segments.append(_Segment(TokenRole.PROMPT, prompt, asks=asks))
            line = self._label(conversation, label, f"turns[{index}].ratings")
            segments.append(_Segment(TokenRole.LABEL, line))
            response = content if line else template.unlabelled_gap + content
            segments.append(_Segment(TokenRole.RESPONSE, response, template.end, index))
            prompt, asks = template.after_end, False
        return [*segments, _Segment(TokenRole.PROMPT, prompt, asks=asks)]

    def _opening(self, text: str, after_response: bool) -> str:
        """`text` that opens a turn, less what the end of the response before it has written already."""
        return text.removeprefix(self.template.end_opens) if after_response else text

    def _system_text(self, conversation: Conversation) -> str | None:
        choices = (conversation.system, self.system_prompt, self.template.default_system)
        return next((choice for choice in choices if choice is not None), None)

    def _system(self, conversation: Conversation) -> str:
        text = self._system_text(conversation)
        if text is None:
            return ""
        before, after = self.template.system
        return before + self._content(conversation, text, "system") + after

    def _label(self, conversation: Conversation, label: Label | None, field: str) -> str:
        if not label:
            return ""
        try:
            text = format_label(label, self.schema)
        except DataError as error:
            raise self._error(conversation, error.message, f"{field}.{error.field}", error.cure) from None
        before, after = self.template.label
        return before + text + after

    def _check_order(self, conversation: Conversation, index: int, role: str) -> None:
        if role not in ROLES:
            cure = f"use one of: {', '.join(ROLES)} (a system text has its own field)"
            raise self._error(conversation, f"unknown role '{role}'", f"turns[{index}].role", cure)
        expected = ROLES[index % 2]
        if self.template.alternates and role != expected:
            message = f"'{role}' where the template {self.template.name} can only write '{expected}'"
            cure = "let turns go user, assistant, user, ..., or choose chatml, llama3 or extra_id"
            raise self._error(conversation, message, f"turns[{index}].role", cure)

    def _content(self, conversation: Conversation, text: str, field: str) -> str:
        """A person's or a model's text, as `_as_text` leaves it."""
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            message = f"not a text: a lone surrogate at character {error.start}"
            raise self._error(conversation, message, field, "repair the file's encoding") from None
        return self._as_text(text.strip() if self.template.strip else text)

    def _as_text(self, text: str) -> str:
        """`text` with `HIDE` or U+2060 inside whatever would become a control token or spell one."""
        spelt = any_of(self._controls)
        if not spelt.search(text) and not spelt.search(self.tokenizer.normalized(text)):
            return text
        told = self.tokenizer.told
        text = spelt.sub(lambda found: broken(found[0], HIDE if found[0] in told else WORD_JOINER), text)
        settled = ""
        # What the tokenizer's normalisation makes of a text no search of it finds: the tokens decide.
        while self._is_control(text):
            end = bisect(range(1, len(text)), False, key=lambda n: self._is_control(text[:n])) + 1
            head, last = text[: end - 1], text[end - 1]
            mark = next((mark for mark in (WORD_JOINER, " ") if not self._is_control(head + mark + last)), None)
            settled += head + (mark or "\ufffd")
            text = text[end - 1 :] if mark else text[end:]
        return settled + text

    def _is_control(self, text: str) -> bool:
        """Whether the tokens of a text hold a special one, or spell a control string that is none."""
        ids = self.tokenizer.encode(text, continuation=True, controls=self.template.control_strings)
        spelt = self._spelt and any_of(self._spelt).search(self.tokenizer.decode(ids, continuation=True))
        return bool(spelt) or not self._special_ids.isdisjoint(ids)

    def _error(self, conversation: Conversation, message: str, field: str, cure: str) -> DataError:
        return DataError(message, file=conversation.file, line=conversation.line, field=field, cure=cure)

    @cached_property
    def _controls(self) -> frozenset[str]:
        return self.template.control_strings | self.tokenizer.special_strings

    @cached_property
    def _spelt(self) -> frozenset[str]:
        """Control strings that are ordinary text to the tokenizer."""
        return frozenset(missing_markers(self.tokenizer, self.template))

    @cached_property
    def _special_ids(self) -> frozenset[int | None]:
        unknown = self.tokenizer.encode("a\U0010fffd")  # a character that no tokenizer has: bytes, or <unk>
        return frozenset(self.tokenizer.token_id(string) for string in self._controls - self._spelt).difference(unknown)

    @cached_property
    def _restarting(self) -> tuple[str, ...]:
        return tuple(string for string in self._controls if self.tokenizer.restarts_after(string))

    def _encode(self, text: str, before: str) -> list[int]:
        fresh = not before or before.endswith(self._restarting)
        return self.tokenizer.encode(text, continuation=not fresh, controls=self.template.control_strings)

    def _encode_response(self, segment: _Segment, before: str) -> tuple[list[int], int]:
        """Tokens of response and end, and the number of those that are the response's.

        A token that spans both (Llama 3 joins "." and a newline) counts as the end's.
        """
        ids = self._encode(segment.text + segment.end, before)
        end = self._encode(segment.end, segment.text or before)
        if ids[len(ids) - len(end) :] == end:
            return ids, len(ids) - len(end)
        alone = self._encode(segment.text, before)
        shared = (index for index, pair in enumerate(zip(ids, alone, strict=False)) if pair[0] != pair[1])
        return ids, next(shared, min(len(ids), len(alone)))

    def _assemble(self, segments: Sequence[_Segment]) -> Rendered:
        text, tokens, roles, responses, root = "", [], [], [], None
        for segment in segments:
            start = len(tokens)
            if segment.role == TokenRole.RESPONSE:
                ids, own = self._encode_response(segment, text)
                responses.append(ResponseSpan(segment.turn, start, start + own, start + len(ids)))
            else:
                ids = self._encode(segment.text, text)
                own = len(ids)
            tokens += ids
            roles += [segment.role] * own + [TokenRole.END] * (len(ids) - own)
            text += segment.text + segment.end
            root = len(tokens) if root is None and segment.asks else root
        text, ids, kinds = text.replace(HIDE, ""), np.array(tokens, np.int32), np.array(roles, np.int8)
        return Rendered(text, ids, kinds, tuple(responses), len(tokens) if root is None else root)
