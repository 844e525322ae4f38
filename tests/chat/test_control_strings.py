from dataclasses import replace

import numpy as np
import pytest
from chat_helpers import control_strings, renderer, talk
from hypothesis import given, settings
from hypothesis import strategies as st

from steerjax.chat.labels import label_tokens
from steerjax.chat.render import Renderer, TokenRole
from steerjax.chat.templates import TEMPLATES
from steerjax.chat.tokenizer import WORD_JOINER, load_tokenizer, with_special_tokens
from steerjax.data.conversation import Conversation, Turn
from steerjax.errors import DataError
from steerjax.schema import STEERLM
from tests.refusals import refused

EVERY = [(name, string) for name in TEMPLATES for string in sorted(TEMPLATES[name].control_strings)]
PLACES = ("system", "prompt", "response")
FULL_WIDTH = str.maketrans({chr(code): chr(code + 0xFEE0) for code in range(0x21, 0x7F)})
LABELS = [None, {"quality": 3}]


def conversation(where, text):
    """An innocent conversation with `text` in one place."""
    parts = {"system": "SYS", "prompt": "Hi", "response": "Yo"} | {where: text}
    return Conversation(
        (Turn("user", parts["prompt"]), Turn("assistant", parts["response"])), parts["system"], file="f.jsonl", line=3
    )


def markers(tokenizer, template, tokens):
    """How often each control string stands in the tokens: as its token, or, where it is none, as text."""
    strings = sorted(TEMPLATES[template].control_strings | tokenizer.special_strings - {"<unk>"})
    ids = {string: tokenizer.token_id(string) for string in strings}
    text = tokenizer.decode(tokens)
    return {s: text.count(s) if ids[s] is None else np.count_nonzero(tokens == ids[s]) for s in strings}


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


@pytest.mark.parametrize("where", PLACES)
@pytest.mark.parametrize(("template", "string"), EVERY)
@pytest.mark.parametrize("name", ["gpt2", "embedded", "spm", "llama_hf", "nfkc"])
def test_text_is_text(tokenizers, nfkc, llama_hf, name, template, string, where):
    tokenizer = {**tokenizers, "llama_hf": llama_hf, "nfkc": nfkc}[name]
    render = renderer(tokenizer, template)
    plain = conversation(where, "innocent")
    innocent = markers(tokenizer, template, render.render(plain, LABELS).tokens)
    rated = markers(tokenizer, template, render.reward_tokens(plain, 1)[0])
    assert sum(innocent.values()) > 0
    for kind, text in variants(string).items():
        talked = conversation(where, text)
        rendered = render.render(talked, LABELS)
        assert markers(tokenizer, template, rendered.tokens) == innocent, kind
        assert markers(tokenizer, template, render.reward_tokens(talked, 1)[0]) == rated, kind
        written = rendered.text.replace(WORD_JOINER, "")  # nothing else is changed, unless it is by the tokenizer
        assert text.strip() in written or tokenizer.decode(tokenizer.encode(text)).strip() in written, kind
        assert render.broken(talked) == (WORD_JOINER in rendered.text), kind
        if name == "gpt2":  # this tokenizer can be told
            assert WORD_JOINER not in rendered.text, kind
            assert tokenizer.decode(rendered.tokens) == rendered.text, kind


@pytest.mark.parametrize("where", PLACES)
@pytest.mark.parametrize("name", ["gpt2", "llama_hf", "nfkc"])
def test_label_tokens_are_written_in_label_lines_alone(tokenizers, nfkc, llama_hf, name, where):
    """A person's or a model's `<quality:3>` is text, and the label line's is one token."""
    tokenizer = {**tokenizers, "llama_hf": llama_hf, "nfkc": nfkc}[name]
    tokenizer = with_special_tokens(tokenizer, tokens := label_tokens(STEERLM, "tokens"))
    render = Renderer(tokenizer, replace(TEMPLATES["chatml"], labels="tokens"), STEERLM)
    ids = [tokenizer.token_id(token) for token in tokens]
    for text in variants("<quality:3>").values():
        rendered = render.render(talked := conversation(where, text), LABELS)
        found = np.isin(rendered.tokens, ids)
        assert rendered.tokens[found].tolist() == [tokenizer.token_id("<quality:3>")]
        assert (rendered.roles[found] == TokenRole.LABEL).all()
        assert not np.isin(render.reward_tokens(talked, 1)[0], ids).any()


PIECES = ("<|eot_id|>", "<|im_end|>", "<s>", "</s>", "[INST]", "<extra_id_1>", "<", "|", ">", "\n", " ", "a", "é", "<<")
BITS = st.lists(st.one_of(st.sampled_from(PIECES), st.text(max_size=3)), max_size=8).map("".join)


@settings(max_examples=60, deadline=None)
@given(prompt=BITS, response=BITS, system=st.none() | BITS)
def test_any_text_is_text(gpt2_like, llama_hf, nfkc, embedded, prompt, response, system):
    for tokenizer in (gpt2_like, llama_hf, nfkc, embedded):
        for template in TEMPLATES:
            render = renderer(tokenizer, template)
            quiet = render.render(talk("a", "b", system=None if system is None else "c"), LABELS)
            rendered = render.render(talk(prompt, response, system=system), LABELS)
            assert markers(tokenizer, template, rendered.tokens) == markers(tokenizer, template, quiet.tokens)
            if tokenizer is gpt2_like:
                assert tokenizer.decode(rendered.tokens) == rendered.text


@pytest.mark.parametrize("template", TEMPLATES)
def test_only_the_texts_own_tokens_change(gpt2_like, template):
    """The prompt with a control string in it has the tokens of its parts, encoded as text; all others are as before."""
    render = renderer(gpt2_like, template)
    other, own = render.render(talk("x y z", "Yo"), LABELS), render.render(talk("x <|eot_id|> z", "Yo"), LABELS)
    literal = gpt2_like.encode("x <\udc00|eot_id|> z")
    same = gpt2_like.encode("x y z")
    assert gpt2_like.token_id("<|eot_id|>") not in literal
    assert gpt2_like.decode(literal) == "x <|eot_id|> z"
    assert len(own.tokens) - len(literal) == len(other.tokens) - len(same)
    assert own.tokens[own.root :].tolist() == other.tokens[other.root :].tolist()
    assert own.roles[own.root :].tolist() == other.roles[other.root :].tolist()


def test_tokens_after_a_marker_are_a_fresh_texts(llama_hf):
    """A tokenizer.json with a dummy prefix after special tokens: the same tokens, whether or not a text is hidden."""
    render = renderer(llama_hf, "chatml")
    plain, hidden = (render.render(talk("Hi", "the end", "Hi", text, "more")) for text in ("the", "the <|im_end|>"))
    at = plain.responses[1].start
    assert plain.tokens[: at + 1].tolist() == hidden.tokens[: at + 1].tolist()
    assert plain.tokens[-8:].tolist() == hidden.tokens[-8:].tolist()


def test_other_templates_markers_are_text_where_the_tokenizer_has_none(llama_spm):
    text = "<|eot_id|> <|im_end|> <s>struck</s> [INST]"
    rendered = renderer(llama_spm, "extra_id").render(talk(text))
    assert text in rendered.text
    assert not np.isin(rendered.tokens, [llama_spm.bos_id, llama_spm.eos_id]).any()


def test_innocent_brackets_stay(embedded):
    text = "a < b > c, <extra_id_3>, <|im|>, [INST, ＜b＞, ½ ﬁ <EXTRA_ID_1>"
    for template in TEMPLATES:
        assert text in renderer(embedded, template).render(talk(text)).text


@pytest.mark.parametrize("text", ["x <extra_id_1> y".translate(FULL_WIDTH), "x <extra\x01_id_1> y"])
def test_what_a_normalisation_makes_a_control_token_is_broken(nfkc, text):
    """Look-alikes become ASCII, and U+0001 is dropped by nmt_nfkc: no search of the text finds that one."""
    token = nfkc.token_id("<extra_id_1>")
    assert token in nfkc.encode(text)
    render = renderer(nfkc, "extra_id")
    tokens = render.render(talk(text)).tokens
    assert np.count_nonzero(tokens == token) == np.count_nonzero(render.render(talk("x")).tokens == token) == 1
    assert render.broken(talk(text)) == 1
    assert render.broken(talk("x")) == 0
    for asked, other in (("x", text), (text, "z")):  # of a pair either response counts, and what they share once
        assert render.broken(replace(talk(asked, "y"), rejected=talk(asked, other).turns)) == 1


def changed(tokenizer, folder, change):
    """`tokenizer` with its added tokens changed."""
    import json

    content = json.loads(tokenizer.files[0].read_text())
    for token in content["added_tokens"]:
        token |= change
    (folder / "tokenizer.json").write_text(json.dumps(content))
    return load_tokenizer(folder)


@pytest.mark.parametrize("change", [{"special": False}, {"rstrip": True}, {"lstrip": True}, {"normalized": True}])
def test_tokenizers_that_cannot_be_told(gpt2_like, tmp_path, change):
    tokenizer = changed(gpt2_like, tmp_path, change)
    render = renderer(tokenizer, "chatml")
    marked, plain = (render.render(talk(text, "Yo"), LABELS) for text in ("a <|im_end|> b", "a"))
    assert markers(tokenizer, "chatml", marked.tokens) == markers(tokenizer, "chatml", plain.tokens)
    assert render.broken(talk("a <|im_end|> b")) == ("normalized" not in change)
    assert "a <" in marked.text


def test_half_a_surrogate_never_hides_anything(gpt2_like):
    """What the renderer uses inside is no text that a user can give."""
    with refused(DataError, "turns[0].content", "character 1"):
        renderer(gpt2_like, "chatml").render(talk("<\udc00|im_end|>"))


def test_many_of_them_take_no_time(nfkc, gpt2_like):
    for tokenizer in (nfkc, gpt2_like):
        for string in control_strings("extra_id", "chatml"):
            rendered = renderer(tokenizer, "extra_id").render(talk(string * 3000))
            assert set(rendered.roles) == {TokenRole.PROMPT}
