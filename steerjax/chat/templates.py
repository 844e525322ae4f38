"""The chat templates as data: the strings around system text, turns and labels. `render.py` puts them together."""

import re
from functools import cached_property
from typing import Literal

import pydantic.dataclasses

from steerjax.chat.labels import LabelForm
from steerjax.errors import ModelError
from steerjax.typed import STRICT

# Its sentence is part of every prompt of the reference's models (NeMo-Aligner, examples/nlp/data/steerlm/common.py).
STEERLM_SYSTEM_PROMPT = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)


@pydantic.dataclasses.dataclass(frozen=True, config=STRICT)
class Template:
    """What stands around a conversation's texts. Pairs are (before, after)."""

    name: str
    system: tuple[str, str] | tuple[()]  # () cannot write a system text
    user: tuple[str, str]
    assistant: str  # the header of an assistant turn, where a generation starts
    label: tuple[str, str]  # right after the header
    end: str  # after a response, and trained in SFT: what tells the server to stop
    reward_end: str  # after a response whose reward is read at its last token
    begin: str = ""
    unlabelled_gap: str = ""  # between header and response where there is no label; belongs to the response
    last_gap: str = ""  # before a response that is the last turn; takes its leading newlines away
    end_opens: str = ""  # the tail of `end` that is already the head of the next turn
    after_end: str = ""  # between `end` and the next turn
    default_system: str | None = None  # None leaves the system part out
    system_in_user: bool = False  # the system part stands inside the first user turn, before the text
    strip: tuple[Literal["system", "user", "assistant"], ...] = ("system", "user", "assistant")  # see `stripped`
    alternates: bool = False  # turns go user, assistant, user, ...; other orders cannot be written
    labels: LabelForm = "numbers"  # how the label line spells ratings

    @cached_property
    def control_strings(self) -> frozenset[str]:
        """The markers that the template writes: what a person's text must not become."""
        parts = (self.begin, *self.system, *self.user, self.assistant, *self.label, self.end, self.reward_end)
        return frozenset(re.findall(r"<+[^<>]+>+|\[[^]]+\]", "".join(parts)))

    def stripped(self, text: str, role: str) -> str:
        """`text` without leading and trailing white space, where a text of this role loses it."""
        return text.strip() if role in self.strip else text

    def answer(self, text: str) -> str:
        """A response as a row has it, of what a model has written before `end`."""
        return self.stripped(text.removeprefix(self.last_gap), "assistant")


# NeMo-Aligner, examples/nlp/data/steerlm/. Texts stand as they are, and there is no BOS.
EXTRA_ID = Template(
    name="extra_id",
    system=("<extra_id_0>System\n", "\n"),
    user=("<extra_id_1>User\n", "\n"),
    assistant="<extra_id_1>Assistant\n",
    label=("<extra_id_2>", "\n"),
    end="\n<extra_id_1>",
    end_opens="<extra_id_1>",
    reward_end="\n<extra_id_2>",
    default_system=STEERLM_SYSTEM_PROMPT,
    strip=(),
)

CHATML = Template(
    name="chatml",
    system=("<|im_start|>system\n", "<|im_end|>\n"),
    user=("<|im_start|>user\n", "<|im_end|>\n"),
    assistant="<|im_start|>assistant\n",
    label=("<|attributes|>", "\n"),
    end="<|im_end|>",
    after_end="\n",
    reward_end="<|im_end|>",
)

# Llama 3's prompt format without the lines of dates that its own template adds to the system text.
LLAMA3 = Template(
    name="llama3",
    begin="<|begin_of_text|>",
    system=("<|start_header_id|>system<|end_header_id|>\n\n", "<|eot_id|>"),
    user=("<|start_header_id|>user<|end_header_id|>\n\n", "<|eot_id|>"),
    assistant="<|start_header_id|>assistant<|end_header_id|>\n\n",
    label=("<|attributes|>", "\n"),
    end="<|eot_id|>",
    reward_end="<|eot_id|>",
)

LLAMA2 = Template(
    name="llama2",
    system=("<<SYS>>\n", "\n<</SYS>>\n\n"),
    user=("<s>[INST] ", " [/INST]"),
    assistant="",
    label=(" <|attributes|>", "\n"),
    unlabelled_gap=" ",
    end=" </s>",
    reward_end=" </s>",
    system_in_user=True,
    alternates=True,
)

TEMPLATES = {template.name: template for template in (EXTRA_ID, CHATML, LLAMA3, LLAMA2)}


def named(template: Template) -> str | Template:
    """What is stored of a template: the name of one of ours, else all of it. `get_template` reads both."""
    return template.name if TEMPLATES.get(template.name) == template else template


def get_template(name: str | Template) -> Template:
    """The template called `name`, or `name` itself. Raises ModelError for any other name."""
    if isinstance(name, Template):
        return name
    if name not in TEMPLATES:
        raise ModelError(f"unknown chat template '{name}'\n  cure: use one of: {', '.join(TEMPLATES)}")
    return TEMPLATES[name]
