"""A model's own chat template, Jinja text, as one of ours: its pieces, if they write all that it writes.

It runs in Jinja's sandbox, set up as transformers does, but without `strftime_now`: a model trained on one day's date
is read on another, and templates that ask for the function first (Llama 3.2) have a fixed date without it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from steerjax.chat.render import Renderer
from steerjax.chat.templates import CHATML, TEMPLATES, Template
from steerjax.chat.tokenizer import Tokenizer
from steerjax.data.conversation import ROLES, Conversation, Turn
from steerjax.errors import DataError, ModelError
from steerjax.schema import Schema

Write = Callable[..., str]  # conversation, generation_prompt=False -> text

SYSTEM, ASK, ANSWER = "Mark one.", "Mark two?", "Mark three."
_TEXTS = (ASK, ANSWER, "Mark four?", "Mark five.", 'What\'s "{{ 2 }}"?\n\n- <b>é</b> 😀', "1. Four.\n2. `4`", "", "")


class _Uncut(Exception):
    """Why a template is none of ours."""


def source_template(folder: Path, tokenizer: Tokenizer) -> Template:
    """That of chat_template.jinja in a Hugging Face folder, else of tokenizer_config.json.

    Raises ModelError: there is none, it raises, or no `Template` writes what it writes; says what differed.
    """
    try:
        text, tokens = _read(folder)
        if not isinstance(text, str):
            raise _Uncut("there is none")
        theirs = _compiled(text, tokens)
        template = _cut(theirs)
        ours = Renderer(tokenizer, template, Schema(()))
        for conversation in _conversations(bool(template.system)):
            if problem := _difference(theirs, ours, conversation):
                raise _Uncut(problem)
    except _Uncut as error:
        cure = f"one of steerjax's templates in place of 'source': {', '.join(TEMPLATES)}"
        raise ModelError(f"'{folder}': its own chat template cannot be used: {error}\n  cure: {cure}") from None
    orders = (("user", *ROLES), (*ROLES, "assistant"), ("assistant", *ROLES))
    others = [Conversation(tuple(map(Turn, order, _TEXTS))) for order in orders]
    return replace(template, alternates=template.system_in_user or not all(_agree(theirs, ours, c) for c in others))


def _read(folder: Path) -> tuple[Any, dict[str, str]]:
    """Jinja text, and the special tokens that it may name. `load_tokenizer` has read these files before."""
    said: dict[str, Any] = {}
    for file in (folder / "special_tokens_map.json", folder / "tokenizer_config.json"):
        said |= json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    tokens = {key: value for key, value in said.items() if key.endswith("_token") and value}
    tokens = {key: value["content"] if isinstance(value, dict) else value for key, value in tokens.items()}
    if (file := folder / "chat_template.jinja").is_file():
        try:
            return file.read_text(encoding="utf-8"), tokens
        except ValueError as error:
            raise _Uncut(f"{file.name} is no UTF-8 ({error})") from None
    text = said.get("chat_template")
    if isinstance(text, list):  # several, by name
        named = [entry for entry in text if isinstance(entry, dict) and entry.get("name") == "default"]
        text = named[-1].get("template") if named else None
    return text, tokens


def _compiled(text: str, tokens: dict[str, str]) -> Write:
    import jinja2.ext
    import jinja2.sandbox

    class Generation(jinja2.ext.Extension):
        """Transformers' marks around responses, which write nothing."""

        tags = frozenset({"generation"})

        def parse(self, parser):
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def refuse(message: str):
        raise jinja2.TemplateError(message)

    sandbox = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    sandbox.filters["tojson"] = lambda value, **options: json.dumps(value, **{"ensure_ascii": False} | options)
    sandbox.globals["raise_exception"] = refuse
    try:
        template = sandbox.from_string(text)
    except Exception as error:  # whatever somebody's text makes of Jinja
        raise _Uncut(f"{type(error).__name__}: {error}") from None

    def write(conversation: Conversation, generation_prompt: bool = False) -> str:
        turns = [{"role": turn.role, "content": turn.content} for turn in conversation.turns]
        if conversation.system is not None:
            turns = [{"role": "system", "content": conversation.system}, *turns]
        try:
            return template.render(
                messages=turns, add_generation_prompt=generation_prompt, tools=None, documents=None, **tokens
            )
        except Exception as error:
            raise _Uncut(f"{type(error).__name__}: {error}") from None

    return write


def _cut(write: Write) -> Template:
    """The pieces: what one conversation's text has more than another's."""
    plain, tail = _around(write, _TEXTS[:1])
    asked = _around(write, _TEXTS[:1], generation_prompt=True)[1]
    _, last, end = _around(write, _TEXTS[:2])
    _, inner, turn, *_ = _around(write, _TEXTS[:4])
    user, header, gap = _rest(turn, end), _rest(asked, tail), _rest(inner, asked)
    if not header and gap.strip():  # it knows no generation prompt
        header, gap = gap, ""
    begin = plain.removesuffix(user)
    if not end.strip() or plain != begin + user:
        raise _Uncut("nothing ends a response" if not end.strip() else "the first user turn begins in another way")
    template = Template(
        name="source",
        begin=begin,
        system=(),
        user=(user, tail),
        assistant=header,
        label=(gap + CHATML.label[0], CHATML.label[1]),
        unlabelled_gap=gap,
        last_gap=_rest(last, tail + header + gap),
        end=end.rstrip(),
        after_end=end[len(end.rstrip()) :],
        reward_end=end,  # transformers reads a reward at the last token of all
    )
    try:
        before, after, *_ = _around(write, _TEXTS[:2], SYSTEM)
    except _Uncut:  # refused, left out, or elsewhere
        pass
    else:
        if not user or not after.endswith(user):
            template = replace(template, system=(_rest(before, plain), after), system_in_user=True)
        elif plain.startswith(before) and plain.endswith(after) and len(plain) >= len(before + after):
            default = plain[len(before) : len(plain) - len(after)]
            system = before, after.removesuffix(user)
            template = replace(template, begin="", system=system, default_system=default)
        else:
            template = replace(template, system=(_rest(before, begin), after.removesuffix(user)))
    spaced = {"system": f"\n {SYSTEM} \n"} if template.system else {}
    spaced |= {"user": f"\n {ASK} \n", "assistant": f"\n {ANSWER} \n"}
    text = write(_talk([spaced["user"], spaced["assistant"], *_TEXTS[2:4]], spaced.get("system")))
    return replace(template, strip=tuple(role for role, content in spaced.items() if content not in text))


def _around(write: Write, texts: Sequence[str], system: str | None = None, **options: bool) -> list[str]:
    """What stands before, between and after the texts of a conversation."""
    conversation, parts = _talk(texts, system), []
    rest = write(conversation, **options)
    for text in texts if system is None else (system, *texts):
        head, found, rest = rest.partition(text)
        if not found or text in rest:
            raise _Uncut(f"it does not write every text once, in order ({_order(conversation)})")
        parts.append(head)
    return [*parts, rest]


def _rest(text: str, start: str) -> str:
    if not text.startswith(start):
        raise _Uncut(f"a piece is {start!r:.80} in one place and {text!r:.80} in another")
    return text[len(start) :]


def _talk(texts: Sequence[str], system: str | None = None) -> Conversation:
    return Conversation(tuple(Turn(ROLES[i % 2], text) for i, text in enumerate(texts)), system)


def _order(conversation: Conversation) -> str:
    return ", ".join(["system"] * (conversation.system is not None) + [turn.role for turn in conversation.turns])


def _conversations(systems: bool) -> Iterator[Conversation]:
    """Of one turn and more, with and without system text and white space."""
    for system in (None, SYSTEM, "", f" \n{SYSTEM}\n ") if systems else (None,):
        for texts in (_TEXTS, [f"\n {text} \n" for text in _TEXTS], [f" {text}\n\n" for text in _TEXTS[4:]]):
            yield from (_talk(texts[: count + 1], system) for count in range(len(texts)))


def _difference(theirs: Write, ours: Renderer, conversation: Conversation) -> str:
    """Where the renderer writes something else, in words."""
    text, last = theirs(conversation), len(conversation.turns) - 1
    pairs = [(text, ours.render(conversation))]
    if conversation.turns[last].role == "assistant":
        pairs.append((text, ours.render(conversation, rated=last)))
    elif (asked := theirs(conversation, True)) != text:
        pairs.append((asked, ours.render(conversation, generation_prompt=True)))
    for text, rendered in pairs:
        if text != rendered.text:
            same = next((i for i, (a, b) in enumerate(zip(text, rendered.text, strict=False)) if a != b), 0)
            place = max(0, same - 20)
            said = f"{text[place:]!r:.80}, and its pieces {rendered.text[place:]!r:.80}"
            return f"it writes ({_order(conversation)}) {said}"
    return ""


def _agree(theirs: Write, ours: Renderer, conversation: Conversation) -> bool:
    try:
        return not _difference(theirs, ours, conversation)
    except (_Uncut, DataError):
        return False
