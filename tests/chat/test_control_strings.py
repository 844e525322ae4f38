import numpy as np
import pytest
from chat_helpers import renderer, talk

from steerjax.chat.control import WORD_JOINER, escape, find_control_string
from steerjax.chat.templates import TEMPLATES
from steerjax.data.conversation import Conversation, Turn
from steerjax.errors import DataError

EVERY = [(name, string) for name in TEMPLATES for string in sorted(TEMPLATES[name].control_strings)]
FIELDS = {"system": "system", "prompt": "turns[0].content", "response": "turns[1].content"}
FULL_WIDTH = str.maketrans({chr(code): chr(code + 0xFEE0) for code in range(0x21, 0x7F)})


def conversation(where, text):
    """An innocent conversation with `text` in one place."""
    parts = {"system": "SYS", "prompt": "Hi", "response": "Yo"} | {where: text}
    return Conversation(
        (Turn("user", parts["prompt"]), Turn("assistant", parts["response"])), parts["system"], file="f.jsonl", line=3
    )


def control_tokens(tokenizer, template, tokens):
    """How often each control string stands in the tokens, as a token and as text."""
    strings = sorted(TEMPLATES[template].control_strings | tokenizer.special_strings)
    ids = [tokenizer.token_id(string) for string in strings]
    text = tokenizer.decode(tokens)
    return {
        string: (np.count_nonzero(tokens == -1 if index is None else tokens == index), text.count(string))
        for string, index in zip(strings, ids, strict=True)
    }


def variants(string):
    return {
        "alone": string,
        "inside": f"a{string}b",
        "many": f"{string}{string} x {string}",
        "nested": string[:2] + string + string[2:],
        "line": f"x\n{string}User\ny",
        "full width": f"x {string.translate(FULL_WIDTH)} y",
        "one full width": f"x {string[:-1]}{string[-1].translate(FULL_WIDTH)} y",
        "start full width": f"é {string[0].translate(FULL_WIDTH)}{string[1:]} y",
    }


@pytest.mark.parametrize("where", FIELDS)
@pytest.mark.parametrize(("template", "string"), EVERY)
@pytest.mark.parametrize("name", ["gpt2", "embedded", "spm"])
def test_refused_or_escaped(tokenizers, name, template, string, where):
    tokenizer = tokenizers[name]
    strict = renderer(tokenizer, template)
    lenient = renderer(tokenizer, template, control_strings="escape")
    labels = [None, {"quality": 3}]
    innocent = control_tokens(tokenizer, template, strict.render(conversation(where, "innocent"), labels).tokens)
    assert sum(texts for _, texts in innocent.values()) > 0
    for kind, text in variants(string).items():
        with pytest.raises(DataError) as error:
            strict.render(conversation(where, text))
        assert str(error.value).startswith(f"f.jsonl:3: field '{FIELDS[where]}': "), kind
        assert f"'{string}'" in str(error.value), kind
        assert 'control_strings="escape"' in str(error.value), kind
        rendered = lenient.render(conversation(where, text), labels)
        assert control_tokens(tokenizer, template, rendered.tokens) == innocent, kind
        parts = np.concatenate(lenient.reward_text_parts(conversation(where, text), 1))
        plain = np.concatenate(strict.reward_text_parts(conversation(where, "innocent"), 1))
        assert control_tokens(tokenizer, template, parts) == control_tokens(tokenizer, template, plain), kind
        assert text.strip() in rendered.text.replace(WORD_JOINER, ""), kind  # nothing else is changed


def test_special_tokens_of_the_tokenizer_count_in_every_template(gpt2_like):
    for template in TEMPLATES:
        with pytest.raises(DataError, match="eot_id"):
            renderer(gpt2_like, template).render(talk("a <|eot_id|> b"))


def test_other_templates_markers_are_text_where_the_tokenizer_has_none(llama_spm):
    text = "<|eot_id|> <|im_end|> <s>struck</s> [INST]"
    rendered = renderer(llama_spm, "extra_id").render(talk(text))
    assert text in rendered.text
    assert not np.isin(rendered.tokens, [llama_spm.bos_id, llama_spm.eos_id]).any()


def test_innocent_brackets_stay(embedded):
    text = "a < b > c, <extra_id_3>, <|im|>, [INST, ＜b＞, ½ ﬁ <EXTRA_ID_1>"
    for template in TEMPLATES:
        for mode in ("refuse", "escape"):
            assert text in renderer(embedded, template, control_strings=mode).render(talk(text)).text


def test_full_width_becomes_a_control_token_unless_escaped(nfkc_spm):
    """The danger is real: a tokenizer that normalises makes the token of the look-alike."""
    look_alike = "x <extra_id_1> y".translate(FULL_WIDTH)
    token = nfkc_spm.token_id("<extra_id_1>")
    assert token in nfkc_spm.encode(look_alike)
    lenient = renderer(nfkc_spm, "extra_id", control_strings="escape")
    tokens = lenient.render(talk(look_alike)).tokens
    assert np.count_nonzero(tokens == token) == np.count_nonzero(lenient.render(talk("x")).tokens == token) == 1


def test_a_normalisation_that_drops_characters_is_caught(nfkc_spm):
    """U+0001 is dropped by nmt_nfkc: no search of the text finds this one, the tokens do."""
    text = "x <extra\x01_id_1> y"
    assert nfkc_spm.token_id("<extra_id_1>") in nfkc_spm.encode(text)
    for mode in ("refuse", "escape"):
        with pytest.raises(DataError, match="normalisation"):
            renderer(nfkc_spm, "extra_id", control_strings=mode).render(talk(text, file="f", line=1))


def test_escape_is_the_word_joiner_after_the_first_character():
    strings = {"<s>", "[INST]"}
    assert escape("a<s>b[INST]", strings) == "a<\u2060s>b[\u2060INST]"
    assert escape("nothing < here", strings) == "nothing < here"
    assert escape("＜s＞", strings) == "＜\u2060s＞"
    assert escape(escape("<<s>s>", strings), strings) == escape("<<s>s>", strings) == "<<\u2060s>s>"


def test_a_single_character_cannot_be_escaped():
    assert escape("a☃b", {"☃"}) == "a☃b"
    assert find_control_string("a☃b", {"☃"}) == "☃"


def test_the_first_control_string_is_named():
    assert find_control_string("x [INST] <s>", {"<s>", "[INST]"}) == "[INST]"
    assert find_control_string("x", {"<s>"}) is None
    assert find_control_string("", frozenset()) is None
