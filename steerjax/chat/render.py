"""The one renderer: conversation (with ratings) -> text -> token ids and what each token is.

Tokens are made segment by segment. A segment ends after the header of an assistant turn, after its label line, and
after the end of the response, so a prompt's tokens never depend on the response, and a generation starts from the
very tokens that training saw. Within a segment the text is encoded in one go; a response is encoded with its end.

Tokenising the whole text at once gives the same tokens, except where a tokenizer joins characters across a boundary:

* `extra_id`, whose texts are not stripped: a response that begins with whitespace, joined to the header's newline.
* `llama2`: an empty response, whose two spaces may be joined.
* a template whose control strings are ordinary text to the tokenizer: the last `>` after a response, joined to what
  follows (Llama 3 may join it to a letter or a newline, Llama 2 to a `<`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import cached_property

import numpy as np

from steerjax.chat.control import escape, find_control_string
from steerjax.chat.templates import Template
from steerjax.chat.tokenizer import Tokenizer, split_at
from steerjax.data.conversation import ROLES, Conversation
from steerjax.errors import ConfigError, DataError
from steerjax.schema import Schema, format_label

CONTROL_STRING_MODES = ("refuse", "escape")
_ESCAPE_CURE = 'remove it, or set control_strings="escape", which makes it harmless with a zero-width U+2060'

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
    """

    text: str
    tokens: np.ndarray
    roles: np.ndarray
    responses: tuple[ResponseSpan, ...]


@dataclass(frozen=True)
class _Segment:
    """Text that is encoded in one go; `end` and `turn` belong to responses."""

    role: TokenRole
    text: str
    end: str = ""
    turn: int = -1


@dataclass(frozen=True)
class Renderer:
    """Turns conversations into tokens.

    Attributes:
        tokenizer: see `load_tokenizer`.
        template: one of `TEMPLATES`.
        schema: names and order of the attributes in label lines.
        system_prompt: the system text of conversations that have none (`system` is None); None means the template's
            default. An empty text ("") is written as an empty system part.
        control_strings: what to do with a text that contains a control string of the template or a special token of
            the tokenizer: "refuse" it (DataError), or "escape" it with a zero-width character.

    Raises:
        ConfigError: another value of `control_strings`.
    """

    tokenizer: Tokenizer
    template: Template
    schema: Schema
    system_prompt: str | None = None
    control_strings: str = "refuse"

    def __post_init__(self) -> None:
        if self.control_strings not in CONTROL_STRING_MODES:
            raise ConfigError(
                f"control_strings is {self.control_strings!r}\n  cure: use one of: {', '.join(CONTROL_STRING_MODES)}"
            )

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
            DataError: a text with a control string (mode "refuse"), an unknown role, turns that the template cannot
                write in this order, a label of a user turn or with an unknown attribute.
        """
        if generation_label is not None and not generation_prompt:
            raise ValueError("generation_label needs generation_prompt=True")
        turns = conversation.turns
        segments = self._segments(conversation, labels, len(turns))
        if generation_prompt:
            self._check_order(conversation, len(turns), "assistant")
            after_response = bool(turns) and turns[-1].role == "assistant"
            # One segment with what stands before it, as in training.
            prompt = segments.pop().text + self._opening(self.template.assistant, after_response)
            label = self._label(conversation, generation_label, "generation_label")
            segments += [_Segment(TokenRole.PROMPT, prompt), _Segment(TokenRole.LABEL, label)]
        return self._assemble(conversation, segments)

    def reward_text_parts(self, conversation: Conversation, turn_index: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens of the text whose last token carries the reward of assistant turn `turn_index`, int32 each.

        Returns:
            prompt: everything through the header of the turn, without labels; the same for every response.
            branch: the response and its end, through the token where the reward is read.

        Raises:
            DataError: as `render`, or the turn is not an assistant's.
        """
        turns = conversation.turns
        if not 0 <= turn_index < len(turns) or turns[turn_index].role != "assistant":
            raise self._error(
                conversation, "no response to rate here", f"turns[{turn_index}]", "name an assistant turn"
            )
        segments = self._segments(conversation, None, turn_index + 1)
        # Drop what follows the response, and read the reward where the template says.
        last = max(index for index, segment in enumerate(segments) if segment.role == TokenRole.RESPONSE)
        response = _Segment(TokenRole.RESPONSE, segments[last].text, self.template.reward_end, turn_index)
        rendered = self._assemble(conversation, [*segments[:last], response])
        start = rendered.responses[-1].start
        return rendered.tokens[:start], rendered.tokens[start:]

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
                continue
            segments.append(_Segment(TokenRole.PROMPT, prompt + self._opening(template.assistant, after_response)))
            line = self._label(conversation, label, f"turns[{index}].ratings")
            segments.append(_Segment(TokenRole.LABEL, line))
            response = content if line else template.unlabelled_gap + content
            segments.append(_Segment(TokenRole.RESPONSE, response, template.end, index))
            prompt = template.after_end
        return [*segments, _Segment(TokenRole.PROMPT, prompt)]

    def _opening(self, text: str, after_response: bool) -> str:
        """`text` that opens a turn, less what the end of the response before it has written already."""
        return text.removeprefix(self.template.end_opens) if after_response else text

    def _system(self, conversation: Conversation) -> str:
        choices = (conversation.system, self.system_prompt, self.template.default_system)
        text = next((choice for choice in choices if choice is not None), None)
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
            cure = "let turns go user, assistant, user, ..., or choose another template"
            raise self._error(conversation, message, f"turns[{index}].role", cure)

    def _content(self, conversation: Conversation, text: str, field: str) -> str:
        """A person's or a model's text, without control strings."""
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            message = f"not a text: a lone surrogate at character {error.start}"
            raise self._error(conversation, message, field, "repair the file's encoding") from None
        if self.template.strip:
            text = text.strip()
        if self.control_strings == "escape":
            text = escape(text, self._forbidden)
        found = find_control_string(text, self._forbidden)
        if found is not None:
            raise self._error(conversation, f"the text contains the control string '{found}'", field, _ESCAPE_CURE)
        return text

    def _error(self, conversation: Conversation, message: str, field: str, cure: str) -> DataError:
        return DataError(message, file=conversation.file, line=conversation.line, field=field, cure=cure)

    @cached_property
    def _forbidden(self) -> frozenset[str]:
        return self.template.control_strings | self.tokenizer.special_strings

    @cached_property
    def _restarting(self) -> tuple[str, ...]:
        return tuple(string for string in self._forbidden if self.tokenizer.restarts_after(string))

    @cached_property
    def _special(self) -> tuple[frozenset[str], np.ndarray]:
        """Strings of the rendered text that become special tokens, and those tokens."""
        strings = self.tokenizer.special_strings | frozenset(self._restarting)
        ids = [self.tokenizer.token_id(string) for string in strings]
        return strings, np.array([index for index in ids if index is not None], np.int32)

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

    def _assemble(self, conversation: Conversation, segments: Sequence[_Segment]) -> Rendered:
        text, tokens, roles, responses = "", [], [], []
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
        rendered = Rendered(text, np.array(tokens, np.int32), np.array(roles, np.int8), tuple(responses))
        self._check_special_tokens(conversation, rendered)
        return rendered

    def _check_special_tokens(self, conversation: Conversation, rendered: Rendered) -> None:
        """The last line of defence: a tokenizer that normalises text may see a control string that we do not."""
        strings, ids = self._special
        if np.isin(rendered.tokens, ids).sum() != len(split_at(rendered.text, strings)) // 2:
            message = "the tokenizer makes a control token of a text (its normalisation drops or replaces characters)"
            raise self._error(conversation, message, "turns", "remove what looks like a control string from the texts")
