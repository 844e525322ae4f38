"""A model's own chat template as one of ours: the same text and tokens, or a refusal."""

import dataclasses
import json
import os

import pytest
from chat_helpers import talk

from steerjax.chat.render import Renderer, TokenRole
from steerjax.chat.source_template import source_template
from steerjax.chat.templates import LLAMA3, Template
from steerjax.chat.tokenizer import load_tokenizer
from steerjax.errors import DataError, ModelError
from steerjax.schema import STEERLM
from steerjax.typed import typed
from tests.refusals import refused
from tests.source_templates import BROKEN, SOURCES

TOKENS = {"bos_token": "<s>", "eos_token": {"content": "</s>", "special": True}, "pad_token": None}


def folder_of(folder, text, **tokens):
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer_config.json").write_text(json.dumps({**TOKENS, **tokens}))
    if text is not None:
        (folder / "chat_template.jinja").write_text(text)
    return folder


@pytest.fixture
def derived(embedded, tmp_path):
    return lambda name: source_template(folder_of(tmp_path / name, SOURCES[name]), embedded)


PIECES = {
    "qwen2": {"begin": "", "default_system": "You are Qwen.", "reward_end": "<|im_end|>\n", "strip": ()},
    "qwen3": {"last_gap": "<think>\n\n</think>\n\n", "default_system": None, "alternates": False},
    "mistral": {"begin": "<s>", "system": ("", "\n\n"), "system_in_user": True, "alternates": True, "end": "</s>"},
    "mistral_plain": {"system": (), "assistant": "", "unlabelled_gap": ""},
    "llama3": {
        "system": ("<s><|start_header_id|>system<|end_header_id|>\n\nToday Date: 26 Jul 2024\n\n", "<|eot_id|>"),
        "default_system": "", "strip": LLAMA3.strip, "user": LLAMA3.user, "assistant": LLAMA3.assistant,
    },
    "zephyr": {"user": ("<|user|>\n", "</s>\n"), "assistant": "<|assistant|>\n", "after_end": "\n"},
    "no_prompt": {"assistant": "<|im_start|>assistant\n", "unlabelled_gap": ""},
}  # fmt: skip


@pytest.mark.parametrize("name", SOURCES)
def test_pieces(name, derived):
    template = derived(name)
    found = dataclasses.asdict(template)
    assert {key: found[key] for key in PIECES[name]} == PIECES[name]
    assert typed(Template, found, "x", ModelError) == template  # as steerjax.json and provenance keep it


def messages_of(conversation):
    system = [] if conversation.system is None else [{"role": "system", "content": conversation.system}]
    return [*system, *({"role": turn.role, "content": turn.content} for turn in conversation.turns)]


CONVERSATIONS = [
    talk(*texts[:count], system=system)
    for system in (None, "", "Be kind.", " Two\n\nlines. ")
    for texts in (("Hi", "Hello!", "What is 2 + 2?", "Four."), ("\n a ", " b\n", "é 😀 {{ x }}", "\n\nc "))
    for count in (1, 2, 3, 4)
]


@pytest.mark.parity
@pytest.mark.parametrize("name", SOURCES)
def test_transformers_writes_the_same(name, tmp_path, smollm2, llama3_like):
    """Text and tokens of `apply_chat_template`; a date that is today's there is given.

    White space before a response is joined to the header there (`render.py`), so only the text is the same.
    """
    import tokenizers
    import transformers

    transformers.utils.logging.set_verbosity_error()
    base = llama3_like if name == "llama3" else smollm2  # one that splits two newlines from a text as Llama 3's does
    folder = folder_of(tmp_path, SOURCES[name], bos_token="<|im_start|>", eos_token="<|im_end|>")
    template = source_template(folder, base)
    backend = tokenizers.Tokenizer.from_file(str(base.files[0]))
    markers = sorted(template.control_strings - {"<|attributes|>"} | {"<|im_start|>", "<|im_end|>"})
    backend.add_special_tokens([tokenizers.AddedToken(marker, special=True, normalized=False) for marker in markers])
    backend.save(str(folder / "tokenizer.json"))
    (folder / "config.json").write_text('{"model_type": "llama"}')
    theirs = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    ours = Renderer(load_tokenizer(folder), template, STEERLM)
    compared = 0
    for conversation in CONVERSATIONS:
        if conversation.system is not None and not ours.template.system:
            with refused(DataError, "system", cure="chatml"):
                ours.render(conversation)
            continue
        last = len(conversation.turns) - 1
        answers = [template.stripped(turn.content, "assistant") for turn in conversation.turns[1::2]]
        joined = any(answer[:1].isspace() for answer in answers)
        options = [{}] if last % 2 or name == "no_prompt" else [{}, {"generation_prompt": True}]
        for option in options:
            asked = {"add_generation_prompt": bool(option), "date_string": "26 Jul 2024"}
            rendered = ours.render(conversation, **option)
            assert rendered.text == theirs.apply_chat_template(messages_of(conversation), tokenize=False, **asked)
            expected = theirs.apply_chat_template(messages_of(conversation), return_dict=False, **asked)
            assert joined or rendered.tokens.tolist() == expected
        if last % 2:
            assert joined or ours.reward_tokens(conversation, last)[0].tolist() == expected
        compared += not joined
    assert compared >= 5


def test_thoughts(derived, embedded):
    """Of the last answer they are empty and trained; those that a text has stay."""
    ours = Renderer(embedded, derived("qwen3"), STEERLM)
    rendered = ours.render(talk("a", "<think>\nx\n</think>\n\nb", "c", "\nd"), [None, None, None, {"quality": 4}])
    first, second = (rendered.tokens[span.start : span.end] for span in rendered.responses)
    assert embedded.decode(first, continuation=True) == "<think>\nx\n</think>\n\nb"
    assert embedded.decode(second, continuation=True) == "<think>\n\n</think>\n\nd"
    label = rendered.tokens[rendered.roles == TokenRole.LABEL]
    assert embedded.decode(label, continuation=True) == "<|attributes|>quality:4\n"
    assert ours.template.answer("<think>\n\n</think>\n\nd") == "d"
    assert ours.template.answer("<think>\nx\n</think>\n\nd") == "<think>\nx\n</think>\n\nd"
    assert "think" not in "".join(ours.template.control_strings)


@pytest.mark.parametrize("name", BROKEN)
def test_what_cannot_be_cut_is_refused(name, embedded, tmp_path):
    text, why = BROKEN[name]
    with refused(ModelError, str(tmp_path), why, cure="chatml"):
        source_template(folder_of(tmp_path, text), embedded)


def test_where_a_template_stands(embedded, tmp_path):
    """chat_template.jinja, else tokenizer_config.json, of several there the default."""
    two = [{"name": "tool", "template": "x"}, {"name": "default", "template": SOURCES["mistral"]}]
    for given, end in ((SOURCES["qwen2"], "<|im_end|>"), (two, "</s>"), (two[:1], None)):
        folder = folder_of(tmp_path, None, chat_template=given)
        if end is None:
            with refused(ModelError, "none", cure="chatml"):
                source_template(folder, embedded)
        else:
            assert source_template(folder, embedded).end == end
    assert source_template(folder_of(tmp_path, SOURCES["zephyr"]), embedded).user[0] == "<|user|>\n"


@pytest.mark.smollm2
def test_the_real_one(smollm2):
    if not os.environ.get("STEERJAX_SMOLLM2"):
        pytest.skip("STEERJAX_SMOLLM2 is not set")
    template = source_template(smollm2.files[0].parent, smollm2)
    assert (template.end, template.after_end, template.strip) == ("<|im_end|>", "\n", ())
    assert "SmolLM" in template.default_system
