import os

import numpy as np
import pytest
from chat_helpers import TOKENIZERS, renderer, sentencepiece_of, small_llama_spm, talk

from steerjax.chat.render import Renderer, TokenRole
from steerjax.chat.templates import STEERLM_SYSTEM_PROMPT, TEMPLATES, get_template
from steerjax.chat.tokenizer import load_tokenizer
from steerjax.data.conversation import Conversation, Turn
from steerjax.errors import DataError, ModelError
from steerjax.schema import HELPSTEER
from tests.refusals import refused

SFT = talk("Hi", "Yo", "More", "OK", system="SYS")
LABELS = [None, {"quality": 4}, None, {"quality": 2}]
GOLDEN = {
    # the reference: NeMo gpt_sft_chat_dataset.py
    "extra_id": "<extra_id_0>System\nSYS\n<extra_id_1>User\nHi\n<extra_id_1>Assistant\n<extra_id_2>quality:4\nYo\n"
    "<extra_id_1>User\nMore\n<extra_id_1>Assistant\n<extra_id_2>quality:2\nOK\n<extra_id_1>",
    "chatml": "<|im_start|>system\nSYS<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
    "<|im_start|>assistant\n<|attributes|>quality:4\nYo<|im_end|>\n<|im_start|>user\nMore<|im_end|>\n"
    "<|im_start|>assistant\n<|attributes|>quality:2\nOK<|im_end|>\n",
    "llama3": "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nSYS<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n<|attributes|>quality:4\nYo<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nMore<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n<|attributes|>quality:2\nOK<|eot_id|>",
    "llama2": "<s>[INST] <<SYS>>\nSYS\n<</SYS>>\n\nHi [/INST] <|attributes|>quality:4\nYo </s>"
    "<s>[INST] More [/INST] <|attributes|>quality:2\nOK </s>",
}
TRAINED = {
    "extra_id": ["Yo\n<extra_id_1>", "OK\n<extra_id_1>"],
    "chatml": ["Yo<|im_end|>", "OK<|im_end|>"],
    "llama3": ["Yo<|eot_id|>", "OK<|eot_id|>"],
    "llama2": ["Yo </s>", "OK </s>"],
}
REWARD_END = {"extra_id": "\n<extra_id_2>", "chatml": "<|im_end|>", "llama3": "<|eot_id|>", "llama2": " </s>"}
ALL = [(tokenizer, template) for tokenizer in TOKENIZERS for template in TEMPLATES]


def decode(tokenizer, ids):
    return tokenizer.decode(ids, continuation=True)


def runs(rendered, tokenizer, *roles):
    """Texts of the maximal runs of tokens with these roles."""
    wanted = np.isin(rendered.roles, roles).astype(int)
    edges = np.flatnonzero(np.diff(np.concatenate([[0], wanted, [0]])))
    return [decode(tokenizer, rendered.tokens[a:b]) for a, b in edges.reshape(-1, 2)]


@pytest.mark.parametrize(("name", "template"), ALL)
def test_golden(tokenizers, name, template):
    tokenizer = tokenizers[name]
    rendered = renderer(tokenizer, template).render(SFT, LABELS)
    assert rendered.text == GOLDEN[template]
    assert tokenizer.decode(rendered.tokens) == GOLDEN[template]
    assert (rendered.tokens.dtype, rendered.roles.dtype) == (np.int32, np.int8)
    assert rendered.tokens.shape == rendered.roles.shape
    assert runs(rendered, tokenizer, TokenRole.RESPONSE, TokenRole.END) == TRAINED[template]
    assert runs(rendered, tokenizer, TokenRole.END) == [TEMPLATES[template].end] * 2
    assert runs(rendered, tokenizer, TokenRole.RESPONSE) == ["Yo", "OK"]
    before, after = TEMPLATES[template].label
    assert runs(rendered, tokenizer, TokenRole.LABEL) == [f"{before}quality:{q}{after}" for q in (4, 2)]
    for span, turn in zip(rendered.responses, (1, 3), strict=True):
        assert span.turn == turn
        assert set(rendered.roles[span.start : span.end]) == {TokenRole.RESPONSE}
        assert set(rendered.roles[span.end : span.stop]) == {TokenRole.END}


@pytest.mark.parametrize(("name", "template"), ALL)
def test_one_template_token_is_one_id_where_the_tokenizer_has_it(tokenizers, name, template):
    tokenizer = tokenizers[name]
    tokens = renderer(tokenizer, template).render(SFT, LABELS).tokens
    for string in TEMPLATES[template].control_strings & tokenizer.special_strings:
        assert np.count_nonzero(tokens == tokenizer.token_id(string)) == GOLDEN[template].count(string)


def test_llama2_bos_and_eos_are_control_pieces(llama_spm):
    rendered = renderer(llama_spm, "llama2").render(SFT)
    assert rendered.tokens[0] == llama_spm.bos_id
    assert [rendered.tokens[span.stop - 1] for span in rendered.responses] == [llama_spm.eos_id] * 2
    assert np.count_nonzero(rendered.tokens == llama_spm.bos_id) == 2


def test_llama2_as_metas_code_tokenises_it(llama_spm):
    """Each exchange encoded on its own as BOS + text + EOS, as the reference code of Llama 2 does."""
    tokens = renderer(llama_spm, "llama2").render(SFT).tokens.tolist()
    encode = sentencepiece_of(llama_spm).encode
    one = encode("[INST] <<SYS>>\nSYS\n<</SYS>>\n\nHi [/INST] Yo ")
    two = encode("[INST] More [/INST] OK ")
    bos, eos = llama_spm.bos_id, llama_spm.eos_id
    assert tokens == [bos, *one, eos, bos, *two, eos]


@pytest.mark.parametrize("template", TEMPLATES)
def test_without_labels_and_system(embedded, template):
    text = renderer(embedded, template).render(talk("Hi", "Yo")).text
    assert (
        text
        == {
            "extra_id": f"<extra_id_0>System\n{STEERLM_SYSTEM_PROMPT}\n"
            "<extra_id_1>User\nHi\n<extra_id_1>Assistant\nYo\n<extra_id_1>",
            "chatml": "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nYo<|im_end|>\n",
            "llama3": "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\nYo<|eot_id|>",
            "llama2": "<s>[INST] Hi [/INST] Yo </s>",
        }[template]
    )
    assert STEERLM_SYSTEM_PROMPT == (
        "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
        "detailed, and polite answers to the user's questions."
    )


def test_system_text(embedded):
    override = renderer(embedded, "chatml", system_prompt="Mine")
    assert override.render(talk("Hi")).text.startswith("<|im_start|>system\nMine<|im_end|>\n<|im_start|>user")
    assert override.render(talk("Hi", system="Row")).text.startswith("<|im_start|>system\nRow<|im_end|>")
    assert override.render(talk("Hi", system="")).text.startswith("<|im_start|>system\n<|im_end|>")
    empty = renderer(embedded, "extra_id").render(talk("Hi", system=""))
    assert empty.text == "<extra_id_0>System\n\n<extra_id_1>User\nHi\n"


def test_whitespace(embedded):
    conversation = talk("  a \n", "\n b ", system=" s ")
    assert "User\n  a \n\n<extra_id_1>Assistant\n\n b \n<extra_id_1>" in (
        renderer(embedded, "extra_id").render(conversation).text
    )
    for template in ("chatml", "llama3", "llama2"):
        assert renderer(embedded, template).render(conversation).text == (
            renderer(embedded, template).render(talk("a", "b", system="s")).text
        )


@pytest.mark.parametrize(("name", "template"), ALL)
def test_reward_parts(tokenizers, name, template):
    tokenizer = tokenizers[name]
    render = renderer(tokenizer, template)
    whole = render.render(SFT)
    for span in whole.responses:
        tokens, root = render.reward_tokens(SFT, span.turn)
        prompt, branch = tokens[: span.start], tokens[span.start :]
        assert root == whole.root == whole.responses[0].start
        assert prompt.tolist() == whole.tokens[: span.start].tolist()
        assert branch[: span.end - span.start].tolist() == whole.tokens[span.start : span.end].tolist()
        if template != "extra_id":
            assert branch.tolist() == whole.tokens[span.start : span.stop].tolist()
        assert decode(tokenizer, branch).lstrip(" ") == SFT.turns[span.turn].content + REWARD_END[template]
        assert tokens.dtype == np.int32


def test_golden_reward_text(embedded, llama_spm):
    """As process_to_regression_format.py of NeMo-Aligner: turns without labels, and nothing after <extra_id_2>."""
    rated = Conversation(
        (Turn("user", "Hi"), Turn("assistant", "Yo", {"quality": 4.0}), Turn("user", "More"), Turn("assistant", "OK"))
    )
    for tokenizer in (embedded, llama_spm):
        tokens, _ = renderer(tokenizer, "extra_id").reward_tokens(rated, 3)
        text = (
            f"<extra_id_0>System\n{STEERLM_SYSTEM_PROMPT}\n<extra_id_1>User\nHi\n<extra_id_1>Assistant\nYo\n"
            "<extra_id_1>User\nMore\n<extra_id_1>Assistant\nOK\n<extra_id_2>"
        )
        assert tokenizer.decode(tokens) == text
        assert tokens.tolist() == tokenizer.encode(text)
    assert tokens[-1] == llama_spm.encode("<extra_id_2>")[-1]


@pytest.mark.parametrize(("name", "template"), ALL)
def test_a_prompt_does_not_depend_on_the_response(tokenizers, name, template):
    render = renderer(tokenizers[name], template)
    rated = [
        render.reward_tokens(talk("Say it.", response), 1)
        for response in ("OK", " OK", "\nOK", "\n\n", "", "<", ">x", ".", "1", "\u0301", "s", "😀")
    ]
    prompts = {tuple(tokens[:root].tolist()) for tokens, root in rated}
    asked = render.render(talk("Say it."), generation_prompt=True)
    assert prompts == {tuple(asked.tokens.tolist())}
    assert set(asked.roles) == {TokenRole.PROMPT}


@pytest.mark.parametrize(("name", "template"), ALL)
def test_the_root_holds_the_first_user_turn(tokenizers, name, template):
    """Equal for whatever follows, other for another first turn; and of a prompt, what training has."""
    tokenizer, render = tokenizers[name], renderer(tokenizers[name], template)
    one = render.render(SFT, LABELS)
    assert one.root == one.responses[0].start - np.count_nonzero(one.roles[: one.responses[0].start] == TokenRole.LABEL)
    for other in (talk("Hi", " Yo", system="SYS"), talk("Hi", "\n<", "x", "y", system="SYS")):
        rendered = render.render(other)
        assert rendered.tokens[: rendered.root].tolist() == one.tokens[: one.root].tolist()
        for turn in range(1, len(other.turns), 2):
            tokens, root = render.reward_tokens(other, turn)
            assert tokens[:root].tolist() == one.tokens[: one.root].tolist()
    asked = render.render(Conversation(SFT.turns[:1], SFT.system), generation_prompt=True)
    assert asked.root == len(asked.tokens) == one.root
    assert "Hi" in tokenizer.decode(one.tokens[: one.root])


def test_the_root_of_a_conversation_that_the_assistant_opens(embedded):
    conversation = Conversation(tuple(Turn(r, t) for r, t in (("assistant", "A"), ("user", "B"), ("assistant", "C"))))
    for template in ("extra_id", "chatml", "llama3"):
        render = renderer(embedded, template)
        rendered = render.render(conversation)
        assert rendered.root == rendered.responses[1].start
        tokens, root = render.reward_tokens(conversation, 0)
        assert root == len(tokens)  # no user has spoken: it is joined with nothing
        assert render.reward_tokens(conversation, 2)[1] == rendered.root


@pytest.mark.parametrize(("name", "template"), ALL)
def test_a_generation_prompt_is_the_prefix_of_training(tokenizers, name, template):
    render = renderer(tokenizers[name], template)
    trained = render.render(SFT, LABELS)
    first_turns = Conversation(SFT.turns[:3], SFT.system)
    asked = render.render(first_turns, LABELS[:3], generation_prompt=True, generation_label={"quality": 2})
    start = trained.responses[1].start
    assert asked.tokens.tolist() == trained.tokens[:start].tolist()
    assert asked.roles.tolist() == trained.roles[:start].tolist()
    assert trained.text.startswith(asked.text)
    assert len(asked.responses) == 1


def test_generation_prompt_after_an_assistant_turn(embedded):
    rendered = renderer(embedded, "extra_id").render(talk("Hi", "Yo"), generation_prompt=True)
    assert rendered.text.endswith("Assistant\nYo\n<extra_id_1>Assistant\n")


def one_go(tokenizer, template, rendered):
    return tokenizer.encode(rendered.text, controls=TEMPLATES[template].control_strings)


@pytest.mark.parametrize(
    ("name", "template"),
    # Where a template's control strings are ordinary text, the tokenizer may join the end of one to what follows.
    [pair for pair in ALL if pair not in {("embedded", "llama3"), ("spm", "llama3"), ("llama3", "chatml")}],
)
def test_segments_equal_tokenising_in_one_go(tokenizers, sample_rows, name, template):
    """Real rows, as two turns each; only responses of extra_id that begin with whitespace may differ."""
    tokenizer, label = tokenizers[name], {"helpfulness": 3, "verbosity": 2}
    render = renderer(tokenizer, template)
    compared = 0
    for row in sample_rows[::3]:
        conversation = talk(row["prompt"], row["response"], row["prompt"], row["response"])
        if template == "extra_id" and row["response"] != row["response"].lstrip():
            continue
        for labels in (None, [None, label, None, label]):
            rendered = render.render(conversation, labels)
            assert rendered.tokens.tolist() == one_go(tokenizer, template, rendered)
            assert tokenizer.decode(rendered.tokens) == rendered.text
        compared += 1
    assert compared > 100


def test_a_token_across_response_and_end_is_the_ends(llama3_like):
    """Llama 3's splitting joins a full stop to the newline after it; the text is still tokenised in one go."""
    rendered = renderer(llama3_like, "extra_id").render(talk("Hi", "Yes, of course."))
    (span,) = rendered.responses
    assert llama3_like.decode(rendered.tokens[span.start : span.end]) == "Yes, of course"
    assert llama3_like.decode(rendered.tokens[span.end : span.stop]) == ".\n<extra_id_1>"
    assert rendered.tokens.tolist() == llama3_like.encode(rendered.text)


def test_a_join_that_changes_the_number_of_tokens(train_tokenizer, texts, tmp_path):
    """The response keeps what it has without its end, however many tokens the end has by itself."""
    path = tmp_path / "joins.model"
    path.write_bytes(train_tokenizer.train(texts, 1000, user_defined_symbols=["\n", ".\n<"], pad_id=-1))
    tokenizer = load_tokenizer(path)
    rendered = renderer(tokenizer, "extra_id").render(talk("Hi", "Yes."))
    (span,) = rendered.responses
    assert tokenizer.decode(rendered.tokens[span.start : span.end]) == "Yes"
    assert tokenizer.decode(rendered.tokens[span.end : span.stop]) == ".\n<extra_id_1>"


@pytest.mark.parametrize("template", ["chatml", "llama3", "llama2"])
def test_a_prefix_after_every_special_token(llama_hf, sample_rows, template):
    """What follows the end of a response is encoded as one go has it: with a dummy prefix after a special token."""
    assert "<|im_end|>" in llama_hf.restarts
    assert llama_hf.encode("the", continuation=True) != llama_hf.encode("the")
    render = renderer(llama_hf, template)
    for row in sample_rows[::7]:
        rendered = render.render(talk(row["prompt"], row["response"], row["prompt"], row["response"]))
        assert rendered.tokens.tolist() == llama_hf.encode(rendered.text)


def test_smollm2_chatml_equals_one_go(smollm2, sample_rows):
    render = renderer(smollm2, "chatml")
    for row in sample_rows:
        rendered = render.render(talk(row["prompt"], row["response"], system="Be kind."), [None, {"helpfulness": 4}])
        assert rendered.tokens.tolist() == smollm2.encode(rendered.text)


def test_llama_sentencepiece_token_for_token(llama_spm, train_tokenizer, texts, sample_rows, tmp_path_factory):
    """extra_id with a dummy prefix: the text in one go, which is how the reference tokenises rewards (2.6)."""
    for tokenizer in (llama_spm, small_llama_spm(train_tokenizer, texts, tmp_path_factory)):
        render, oracle = renderer(tokenizer, "extra_id"), sentencepiece_of(tokenizer)
        for row in sample_rows:
            conversation = talk(row["prompt"], row["response"])
            tokens = render.reward_tokens(conversation, 1)[0].tolist()
            text = render.render(conversation).text.removesuffix("<extra_id_1>") + "<extra_id_2>"
            assert tokens == oracle.encode(text)


@pytest.mark.parity
@pytest.mark.smollm2
def test_chatml_is_smollm2s_template(sample_rows):
    transformers = pytest.importorskip("transformers")
    folder = os.environ.get("STEERJAX_SMOLLM2")
    if not folder:
        pytest.skip("STEERJAX_SMOLLM2 names no folder (shared/tools/get_smollm2.py makes one)")
    oracle = transformers.AutoTokenizer.from_pretrained(folder)
    render = renderer(load_tokenizer(folder), "chatml")
    for row in sample_rows[::4]:
        user, assistant = row["prompt"].strip(), row["response"].strip()
        messages = [
            {"role": "system", "content": "Be kind."},
            {"role": "user", "content": user},
            {"role": "assistant", "content": assistant},
            {"role": "user", "content": user},
        ]
        conversation = talk(user, assistant, user, system="Be kind.")
        for prompt in (False, True):
            expected = oracle.apply_chat_template(messages, add_generation_prompt=prompt, return_dict=False)
            assert render.render(conversation, generation_prompt=prompt).tokens.tolist() == expected


def test_label_order_and_rounding(embedded):
    labels = [None, {"verbosity": 1.5, "quality": 9.0, "helpfulness": 2.5}]
    text = renderer(embedded, "extra_id").render(talk("Hi", "Yo"), labels).text
    assert "<extra_id_2>quality:4,helpfulness:2,verbosity:2\nYo" in text
    assert renderer(embedded, "extra_id").render(talk("Hi", "Yo"), [None, {}]).text == (
        renderer(embedded, "extra_id").render(talk("Hi", "Yo")).text
    )


PLACE = {"file": "rows.jsonl", "line": 7}


@pytest.mark.parametrize(
    ("call", "facts"),
    [
        (lambda r: r.render(Conversation((Turn("system", "x"),), **PLACE)), ("turns[0].role", "system")),
        (lambda r: r.render(talk("a", "b", **PLACE), [None, {"charm": 1}]), ("turns[1].ratings.charm",)),
        (
            lambda r: r.render(talk("a", "b", **PLACE), [None, {"quality": float("nan")}]),
            ("turns[1].ratings.quality", "NaN"),
        ),
        (
            lambda r: r.render(talk("a", **PLACE), generation_prompt=True, generation_label={"charm": 1}),
            ("generation_label.charm",),
        ),
        (lambda r: r.reward_tokens(talk("a", "b", **PLACE), 0), ("turns[0]", "response")),
        (lambda r: r.reward_tokens(talk("a", "b", **PLACE), 2), ("turns[2]", "response")),
        (lambda r: r.reward_tokens(talk("a", "b", **PLACE), -1), ("turns[-1]", "response")),
        (lambda r: r.render(talk("a\ud800", **PLACE)), ("turns[0].content", "character 1")),
    ],
)
@pytest.mark.parametrize("template", TEMPLATES)
def test_errors_name_the_place(embedded, template, call, facts):
    with refused(DataError, "rows.jsonl:7", *facts):
        call(renderer(embedded, template))


def test_llama2_wants_turns_to_alternate(embedded):
    twice = Conversation((Turn("user", "a"), Turn("user", "b")), **PLACE)
    opened = Conversation((Turn("assistant", "a"), Turn("user", "b")), **PLACE)
    with refused(DataError, "rows.jsonl:7", "turns[0].role", "llama2", "user", cure="chatml"):
        renderer(embedded, "llama2").render(opened)
    for template in ("extra_id", "chatml", "llama3"):
        assert renderer(embedded, template).render(opened).responses[0].turn == 0
    with refused(DataError, "rows.jsonl:7", "turns[1].role", "llama2", "assistant"):
        renderer(embedded, "llama2").render(twice)
    with refused(DataError, "rows.jsonl:7", "turns[2].role", "llama2", "user"):
        renderer(embedded, "llama2").render(talk("a", "b", **PLACE), generation_prompt=True)
    assert "user\na<|im_end|>\n<|im_start|>user\nb" in renderer(embedded, "chatml").render(twice).text


def test_wrong_settings(embedded):
    with refused(ModelError, "zephyr", cure="extra_id, chatml, llama3, llama2"):
        get_template("zephyr")
    with pytest.raises(ValueError, match="generation_prompt"):
        renderer(embedded, "chatml").render(talk("a"), generation_label={"quality": 1})
    with refused(DataError, "turns[1].ratings.quality", cure="helpfulness"):
        Renderer(embedded, TEMPLATES["chatml"], HELPSTEER).render(talk("a", "b"), [None, {"quality": 1}])


def test_a_template_lists_every_marker_it_writes():
    for template in TEMPLATES.values():
        written = "".join(
            [template.begin, *template.system, *template.user, template.assistant, *template.label, template.end]
        )
        for string in template.control_strings:
            assert string in written + template.reward_end
            written = written.replace(string, "")
        assert not set("<>[]|") & set(written), template.name
        assert template.end.endswith(template.end_opens)
        for opening in (template.user[0], template.assistant):
            assert opening.startswith(template.end_opens)
