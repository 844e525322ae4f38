"""The exported chat template writes what the renderer writes, and refuses what it refuses."""

import gzip
import json
import random
from dataclasses import replace
from functools import lru_cache
from typing import get_args

import jinja2
import jinja2.sandbox
import pytest

from steerjax.chat import labels as chat_labels
from steerjax.chat.labels import LabelForm
from steerjax.chat.render import Renderer
from steerjax.chat.source_template import source_template
from steerjax.chat.templates import TEMPLATES
from steerjax.chat.tokenizer import load_tokenizer
from steerjax.data.conversation import Conversation, Turn
from steerjax.errors import DataError
from steerjax.hf.chat_template import chat_template
from steerjax.hf.tokenizer_files import special_strings
from steerjax.schema import HELPSTEER, Attribute, Schema, parse_label
from tests.hf.serving import as_messages, conversations, export, llama3_like, renderer, talk, tokenizer_of, with_labels
from tests.refusals import refused
from tests.source_templates import SOURCES

RATINGS = {"verbosity": 2.5, "helpfulness": 3.5, "correctness": 0, "coherence": 1.4}
DEFAULTS = {"helpfulness": 4, "verbosity": 2, "coherence": 4.0}
each_form = pytest.mark.parametrize("form", get_args(LabelForm))


class Refused(Exception):
    pass


def refuse(message):
    raise Refused(message)


@lru_cache
def compiled(text):
    sandbox = jinja2.sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    return [environment.from_string(text) for environment in (jinja2.Environment(), sandbox)]


def render(text, messages, **variables):
    """In the settings of transformers, SGLang and vLLM and in Jinja's own: they must agree."""
    plain, served = (
        template.render(messages=messages, raise_exception=refuse, **variables) for template in compiled(text)
    )
    assert plain == served
    return plain


@pytest.fixture(scope="module")
def rows(repository):
    with gzip.open(repository / "steerjax/data/samples/helpsteer.jsonl.gz", "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file][::13]


@pytest.fixture(scope="module")
def embedded():
    return load_tokenizer("embedded")


def chat(name, schema=HELPSTEER, labels="numbers", **options):
    return chat_template(replace(TEMPLATES[name], labels=labels), schema, kind="chat", **options)


def reward(name, **options):
    return chat_template(TEMPLATES[name], HELPSTEER, kind="reward", **options)


@pytest.mark.short
@each_form
@pytest.mark.parametrize("name", TEMPLATES)
def test_text_of_random_conversations(name, form, embedded):
    """Any order of turns that the template can write, texts of white space, ratings here and there."""
    choose = random.Random(0)
    pieces = ["", " ", "\n", "a", "Hi.", "é😀", "{{ x }}", "{% if %}", "\\n", '"', "'", "\t", "<", "\u2028"]
    chat_text, reward_text = chat(name, labels=form, default_ratings=DEFAULTS), reward(name)
    render_ours = renderer(embedded, name, form)
    for _ in range(80):
        count = choose.randint(1, 5)
        roles = [("user", "assistant")[i % 2] for i in range(count)]
        if not TEMPLATES[name].alternates and choose.random() < 0.5:
            roles = [choose.choice(("user", "assistant")) for _ in range(count)]
        turns = tuple(Turn(role, "".join(choose.choices(pieces, k=4))) for role in roles)
        system = choose.choice([None, "", " Be kind.\n"])
        conversation = Conversation(turns, system)
        labels = [RATINGS if turn.role == "assistant" and choose.random() < 0.5 else None for turn in turns]
        messages = as_messages(conversation, labels)
        expected = render_ours.render(conversation, labels).text
        assert render(chat_text, messages) == expected
        apart = {"messages": as_messages(conversation), "message_attributes": [None] * (system is not None) + labels}
        assert render(chat_text, **apart) == expected
        if roles[-1] == "user":
            expected = render_ours.render(
                conversation, labels, generation_prompt=True, generation_label=DEFAULTS | {"verbosity": 0}
            )
            asked = {"attributes": {"verbosity": 0}, "add_generation_prompt": True}
            assert render(chat_text, messages, **asked) == expected.text
        else:
            tokens, _ = render_ours.reward_tokens(conversation, count - 1)
            text = render(reward_text, messages)
            assert embedded.decode(tokens) == (text if embedded.decode(embedded.encode(text)) == text else None)


@pytest.mark.parametrize("name", SOURCES)
def test_text_of_a_models_own_template(name, embedded, tmp_path):
    """The one skeleton writes what the renderer writes with a derived template, to the token, labels included."""
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>"}))
    (tmp_path / "chat_template.jinja").write_text(SOURCES[name])
    template = source_template(tmp_path, embedded)
    ours = Renderer(embedded, template, HELPSTEER)
    chat_text, reward_text = (chat_template(template, HELPSTEER, kind=kind) for kind in ("chat", "reward"))
    for conversation in (
        talk(*texts[:count], system=system)
        for system in (None, "", " Be kind.\n")
        for texts in (("Hi", "Yo", "So?", "\n\nWell.", "And?"), (" a\n", "", "\n", " <think>b</think> "))
        for count in range(1, len(texts) + 1)
    ):
        messages = as_messages(conversation)
        if conversation.system is not None and not template.system:
            with refused(DataError, "system", cure="system_prompt"):
                ours.render(conversation)
            with pytest.raises(Refused, match="system"):
                render(chat_text, messages)
            continue
        asks = conversation.turns[-1].role == "user"
        for labels in (None, [RATINGS if turn.role == "assistant" else None for turn in conversation.turns]):
            expected = ours.render(conversation, labels, generation_prompt=asks)
            text = render(chat_text, as_messages(conversation, labels), add_generation_prompt=asks)
            assert text == expected.text
        if not asks:
            tokens, _ = ours.reward_tokens(conversation, len(conversation.turns) - 1)
            assert embedded.decode(tokens) == render(reward_text, messages)


@pytest.mark.parametrize("bad", [[None], "no", {"verbosity": 1}, 3, [{"verbosity": 1}, None, None]])
def test_message_attributes_are_one_for_each_message(bad):
    with pytest.raises(Refused, match="message_attributes: "):
        render(chat("chatml"), as_messages(talk("Hi", "Yo", system="")), message_attributes=bad)


@pytest.mark.parametrize("name", TEMPLATES)
def test_answer_after_an_answer(name, embedded):
    """A header right after a response: `end_opens` has written a part of it."""
    conversation = talk("Hi", "Yo")
    if TEMPLATES[name].alternates:
        with pytest.raises(Refused, match="user turn"):
            render(chat(name), as_messages(conversation), add_generation_prompt=True)
        return
    expected = renderer(embedded, name).render(conversation, generation_prompt=True).text
    assert render(chat(name), as_messages(conversation), add_generation_prompt=True) == expected


def label_line(schema=HELPSTEER, defaults=None, form="numbers", **variables):
    messages = [{"role": "user", "content": "Hi"}]
    template = chat("chatml", schema, labels=form, default_ratings=defaults)
    text = render(template, messages, add_generation_prompt=True, **variables)
    return text.partition("assistant\n")[2].removeprefix("<|attributes|>").removesuffix("\n")


@pytest.mark.parametrize(
    ("defaults", "attributes", "line"),
    [
        (None, None, ""),
        (None, {}, ""),
        (None, {"verbosity": 1}, "verbosity:1"),
        (DEFAULTS, None, "helpfulness:4,coherence:4,verbosity:2"),
        (DEFAULTS, {}, "helpfulness:4,coherence:4,verbosity:2"),
        (DEFAULTS, {"verbosity": 1, "correctness": 0}, "helpfulness:4,correctness:0,coherence:4,verbosity:1"),
        (DEFAULTS, {"verbosity": None}, "helpfulness:4,coherence:4"),
        (DEFAULTS, dict.fromkeys(DEFAULTS), ""),
        (None, {"verbosity": 0.5, "helpfulness": 1.5, "coherence": 2.5, "complexity": 3.5}, None),
    ],
)
@each_form
def test_label_line(defaults, attributes, line, form):
    if line is None:
        line = "helpfulness:2,coherence:2,complexity:4,verbosity:0"  # half to even
    if form != "numbers":
        line = chat_labels.label_line(parse_label(line, HELPSTEER), HELPSTEER, form)
    assert label_line(defaults=defaults, attributes=attributes, form=form) == line
    if attributes is None:
        assert label_line(defaults=defaults, form=form) == line


def test_order_and_range_are_the_schemas():
    schema = Schema((Attribute("clear", -1, 1), Attribute("kind", 0.5, 9.7), Attribute("long", 1, 5)))
    assert label_line(schema, attributes={"kind": 9.5, "clear": -0.3}) == "clear:0,kind:9"
    assert label_line(schema, attributes={"long": 4.5, "kind": 0.5}) == "kind:1,long:4"
    with pytest.raises(Refused, match=r"0\.4.*'kind'.* 0\.5\.\.9\.7"):
        label_line(schema, attributes={"kind": 0.4})


@each_form
@pytest.mark.parametrize(("low", "high"), [(0, 4), (1, 5), (1, 10), (0.5, 3.5), (-1.5, 0.2)])
def test_labels_are_the_schemas(low, high, form):
    schema = Schema((Attribute("x", low, min(high, low + 6) if form == "words" else high),))
    for step in range(21):
        rating = low + (schema["x"].high - low) * step / 20
        found = label_line(schema, attributes={"x": rating}, form=form)
        assert found == chat_labels.label_line({"x": rating}, schema, form)


@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        ({"humor": 1}, "attributes: .*'humor'.*helpfulness, correctness, coherence, complexity, verbosity"),
        ({"verbosity": 5}, r" 5 .*'verbosity'.* 0\.\.4"),
        ({"verbosity": -1}, r" -1 .*'verbosity'.* 0\.\.4"),
        ({"verbosity": float("nan")}, r"nan.*'verbosity'.* 0\.\.4"),
        ({"verbosity": float("inf")}, r"inf.*'verbosity'.* 0\.\.4"),
        ({"verbosity": "3"}, "'3'.*'verbosity'.*number"),
        ({"verbosity": True}, "True.*'verbosity'.*number"),
        ({"verbosity": [3]}, r"\[3\].*'verbosity'.*number"),
        ("verbosity:3", "attributes: .*mapping"),
        (["verbosity"], "attributes: .*mapping"),
        (3, "attributes: .*mapping"),
    ],
)
@each_form
def test_bad_ratings(attributes, message, form):
    with pytest.raises(Refused, match=message):
        label_line(attributes=attributes, form=form)
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo", "ratings": attributes}]
    with pytest.raises(Refused, match=r"messages\[1\].attributes: "):
        render(chat("chatml", labels=form), messages)


def test_a_plain_chat_model_takes_no_attributes():
    assert label_line(schema=None) == ""
    with pytest.raises(Refused, match=r"attributes: .*'verbosity'"):
        label_line(schema=None, attributes={"verbosity": 1})


USER, ASSISTANT = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}


@pytest.mark.parametrize(
    ("name", "messages", "message"),
    [
        ("chatml", [{"role": "tool", "content": "x"}], r"messages\[0\].*'tool'"),
        ("chatml", [USER, {"role": "system", "content": "x"}], r"messages\[1\].*'system'"),
        ("llama2", [ASSISTANT], r"messages\[0\].*user, assistant, user"),
        ("llama2", [{"role": "system", "content": "x"}, USER, USER], r"messages\[2\].*user, assistant, user"),
        ("chatml", [USER | {"ratings": {"verbosity": 1}}], r"messages\[0\].*ratings.*user"),
        ("chatml", [{"role": "user", "content": None}], r"messages\[0\].content: "),
        ("chatml", [{"role": "user"}], r"messages\[0\].content: "),
        ("chatml", [USER | {"content": {"type": "text", "text": "x"}}], r"messages\[0\].content: "),
        ("chatml", [USER | {"content": [{"type": "image_url"}]}], r"messages\[0\].content.*'image_url'"),
        ("chatml", [USER | {"content": [{"type": "text"}]}], r"messages\[0\].content.*'text'"),
    ],
)
@pytest.mark.parametrize("kind", ["chat", "reward"])
def test_refusals(name, messages, message, kind):
    if kind == "reward":
        messages = [*messages, ASSISTANT]
    with pytest.raises(Refused, match=message):
        render(chat_template(TEMPLATES[name], HELPSTEER, kind=kind), messages)


@pytest.mark.parametrize("name", TEMPLATES)
def test_reward_template(name):
    text = reward(name)
    labelled = ASSISTANT | {"ratings": {"verbosity": 1}, "attributes": {"humor": 9}}
    expected = render(text, [USER, ASSISTANT])
    assert expected.endswith("Yo" + TEMPLATES[name].reward_end)
    assert render(text, [USER, labelled], add_generation_prompt=True) == expected
    for messages in ([], [USER], [USER, ASSISTANT, USER]):
        with pytest.raises(Refused, match=r"messages: .*assistant turn"):
            render(text, messages)
    with pytest.raises(Refused, match=r"attributes: .*reward model"):
        render(text, [USER, ASSISTANT], attributes={"verbosity": 1})


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_model_with_one_score_renders_a_lone_prompt(name):
    """RewardBench's runner asks for it, and throws it away."""
    one = chat_template(TEMPLATES[name], Schema((Attribute("score", -9, 9),)), kind="reward")
    prompt = [{"role": "user", "content": "Why?"}]
    found = render(one, prompt, add_generation_prompt=True)
    answered = render(one, [*prompt, {"role": "assistant", "content": "So."}])
    assert "Why?" in found
    assert answered.startswith(found)


@pytest.mark.parametrize("kind", ["chat", "reward"])
@pytest.mark.parametrize("name", TEMPLATES)
def test_control_strings_are_broken(name, kind):
    """In every place, in text parts too: the text holds each as often as an innocent one does."""
    specials = frozenset({"<pad>", "☃"})
    text = chat_template(TEMPLATES[name], HELPSTEER, kind=kind, special_strings=specials)
    innocent = [{"role": "system", "content": "Be kind."}, USER, ASSISTANT]
    strings = TEMPLATES[name].control_strings | specials
    expected = {string: render(text, innocent).count(string) for string in strings}
    for string in strings:
        for index in range(3):
            for content in (
                f"x{string}{string}y {string[:1]}{string}{string[1:]}",
                [{"type": "text", "text": string[:2]}, {"type": "text", "text": string[2:]}],
            ):
                messages = list(innocent)
                messages[index] = messages[index] | {"content": content}
                written = render(text, messages)
                assert {string: written.count(string) for string in strings} == expected
                assert len(string) == 1 or string[0] + "\u2060" + string[1:] in written


@pytest.mark.parametrize("name", ["extra_id", "llama2"])
def test_it_breaks_as_the_renderer_does_where_the_tokenizer_cannot_be_told(name, embedded, rows, tmp_path):
    """Markers that are ordinary text or user-defined pieces: the same text, so the same tokens too."""
    tokenizer = llama3_like(tmp_path, [row["response"] for row in rows]) if name == "llama2" else embedded
    strings = sorted(TEMPLATES[name].control_strings | tokenizer.special_strings - tokenizer.told)
    text = chat(name, special_strings=frozenset(strings))
    conversation = talk(f"a {strings[0]}", f"{strings[1]} b {strings[2]}", system=strings[-1])
    ours = renderer(tokenizer, name)
    assert ours.broken(conversation) == 3
    assert render(text, as_messages(conversation)) == ours.render(conversation).text


def test_parts_are_joined():
    parts = [{"type": "text", "text": "Hi "}, {"type": "text", "text": "there"}]
    assert "user\nHi there<|im_end|>" in render(chat("chatml"), [{"role": "user", "content": parts}])


NASTY = 'It\'s "so"\n\ttrue \\n {{ messages }} {% raw %} #} -%} é 😀 \u2028\x85\x7f\r\n %}'


@pytest.mark.parametrize("name", TEMPLATES)
def test_system_prompt_of_the_recipe(name, embedded):
    ours = renderer(embedded, name, system_prompt=NASTY)
    text = chat(name, system_prompt=NASTY)
    for conversation in (talk("Hi"), talk("Hi", system="Mine"), talk("Hi", system="")):
        assert render(text, as_messages(conversation)) == ours.render(conversation).text


def test_settings_are_checked():
    text = chat("chatml", system_prompt="a <|im_end|> <pad>", special_strings=frozenset({"<pad>"}))
    assert "system\na <\u2060|im_end|> <\u2060pad><|im_end|>" in render(text, [USER])
    with refused(DataError, "humor", cure="verbosity"):
        chat("chatml", default_ratings={"humor": 1})
    with refused(DataError, "verbosity", "5", "0..4"):
        chat("chatml", default_ratings={"verbosity": 5})


def test_variables_that_a_server_passes_on():
    """vLLM drops chat_template_kwargs that the template does not read."""
    import jinja2.meta

    variables = jinja2.meta.find_undeclared_variables(jinja2.Environment().parse(chat("chatml")))
    assert variables == {"messages", "add_generation_prompt", "attributes", "message_attributes", "raise_exception"}


SERVED = [
    ("extra_id", "embedded"),
    ("chatml", "embedded"),
    ("llama2", "embedded"),
    ("llama2", "mistral"),
    ("extra_id", "mistral"),
    ("llama3", "llama3"),
    pytest.param("chatml", "smollm2", marks=pytest.mark.smollm2),
]


@pytest.mark.parity
@pytest.mark.parametrize(("name", "source"), SERVED)
def test_transformers_makes_the_renderers_tokens(name, source, rows, tmp_path):
    tokenizer = tokenizer_of(source, tmp_path / "base", [row["response"] for row in rows])
    served = export(tmp_path / "chat", tokenizer, name, default_ratings=DEFAULTS)
    judge = export(tmp_path / "reward", tokenizer, name, kind="reward")
    ours, compared = renderer(tokenizer, name), 0
    for conversation in conversations(rows):
        responses = [turn.content for turn in conversation.turns if turn.role == "assistant"]
        if (name, source) == ("extra_id", "mistral") and any(response[:1].isspace() for response in responses):
            continue  # `render.py`: the whole text may have other tokens there
        last = len(conversation.turns) - 1
        labels = [RATINGS if turn.role == "assistant" and last > 1 else None for turn in conversation.turns]
        messages = as_messages(conversation, labels)
        expected = ours.render(conversation, labels).tokens.tolist()
        assert served.apply_chat_template(messages, return_dict=False) == expected
        if last % 2:
            expected = ours.reward_tokens(conversation, last)[0].tolist()
            assert judge.apply_chat_template(messages, return_dict=False) == expected
            text = judge.apply_chat_template(messages, tokenize=False)
            assert judge(text)["input_ids"] == expected  # adds no BOS, no EOS
            assert judge.pad_token_id not in expected  # transformers reads the reward before the first one
        else:
            for asked in (None, {"verbosity": 1, "complexity": 3.5}, dict.fromkeys(DEFAULTS)):
                label = {key: value for key, value in (DEFAULTS | (asked or {})).items() if value is not None}
                expected = ours.render(conversation, labels, generation_prompt=True, generation_label=label)
                got = served.apply_chat_template(
                    messages, add_generation_prompt=True, attributes=asked, return_dict=False
                )
                assert got == expected.tokens.tolist()
        compared += 1
    assert compared >= 25
    with pytest.raises(jinja2.TemplateError, match=r"attributes: .*'humor'"):
        served.apply_chat_template(messages, attributes={"humor": 1})


@pytest.mark.parity
@pytest.mark.parametrize(("name", "source"), SERVED[:6])
def test_a_served_text_is_text(name, source, rows, tmp_path):
    """What a server makes of messages that spell control strings has the control tokens of innocent messages."""
    tokenizer = tokenizer_of(source, tmp_path / "base", [row["response"] for row in rows])
    served, template = export(tmp_path / "chat", tokenizer, name), TEMPLATES[name]
    strings = sorted(special_strings(tokenizer, template) | template.control_strings)
    ids = [served.convert_tokens_to_ids(string) for string in strings if string in served.get_vocab()]

    def count(*texts):
        tokens = served.apply_chat_template(as_messages(talk(*texts, system=texts[0])), return_dict=False)
        return [tokens.count(index) for index in ids], [served.decode(tokens).count(string) for string in strings]

    for string in strings:
        assert count(f"a {string}", f"{string} b", f"{string}{string}") == count("a", "b", "c"), string


@pytest.mark.parity
@pytest.mark.parametrize("form", ["words", "tokens"])
@pytest.mark.parametrize(
    ("name", "source"),
    [*((name, "llama3") for name in TEMPLATES), pytest.param("chatml", "smollm2", marks=pytest.mark.smollm2)],
)
def test_other_forms_of_label_lines_served(name, source, form, rows, tmp_path):
    """The renderer's tokens, whatever messages spell: a label token stands only where the label line is."""
    tokenizer = with_labels(tokenizer_of(source, tmp_path / "base", [row["response"] for row in rows]), form)
    served = export(tmp_path / "chat", tokenizer, name, labels=form, default_ratings=DEFAULTS)
    ours = renderer(tokenizer, name, form)
    spelt = chat_labels.label_line(RATINGS, HELPSTEER, form)
    tokens = chat_labels.label_tokens(HELPSTEER, form)
    special = [index for index in map(tokenizer.token_id, tokens) if index is not None]
    assert served.convert_tokens_to_ids([*tokens]) == special
    for texts in ((rows[0]["prompt"], rows[0]["response"], "So?"), (f"a {spelt}", f"{spelt} b", spelt)):
        conversation, labels = talk(*texts), [None, RATINGS, None]
        answer = DEFAULTS | {"verbosity": 0, "complexity": 3}
        expected = ours.render(conversation, labels, generation_prompt=True, generation_label=answer).tokens.tolist()
        found = served.apply_chat_template(
            as_messages(conversation, labels), add_generation_prompt=True, return_dict=False,
            attributes={"verbosity": 0, "complexity": 3},
        )  # fmt: skip
        count = len(RATINGS) + len(answer) if form == "tokens" else 0
        assert sum(index in special for index in expected) == sum(index in special for index in found) == count
        if spelt not in texts:
            assert found == expected
        assert served.decode(found).replace("\u2060", "") == tokenizer.decode(expected)
