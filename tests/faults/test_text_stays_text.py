"""No text becomes a control token, or what spells one, whatever the tokenizer makes of it."""

import collections
import itertools
import re
import time
from random import Random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from steerjax.chat.render import Renderer
from steerjax.chat.templates import TEMPLATES, Template
from steerjax.chat.tokenizer import load_tokenizer
from steerjax.data.conversation import Conversation, Turn
from steerjax.errors import DataError, ModelError
from steerjax.schema import STEERLM
from tests.faults.adversarial_tokenizers import ADDED, CONTROLS, MODELS, NORMALIZERS, adversarial
from tests.faults.mutate import mutated_text

SOURCE = Template(
    name="source", system=("<|sys|>", "<|end|>"), user=("[USER]", "<|end|>"), assistant="[BOT]",
    label=("<|attributes|>", "\n"), end="<|end|>", reward_end="<|end|>",
)  # fmt: skip
EVERY = {**TEMPLATES, "source": SOURCE}
FULL_WIDTH = str.maketrans({chr(code): chr(code + 0xFEE0) for code in range(0x21, 0x7F)})
KINDS = list(itertools.product(MODELS, NORMALIZERS, ADDED, (False, True)))


def look_alikes(string):
    return (
        string, string.upper(), string.translate(FULL_WIDTH), string[0] + "\u200d" + string[1:],
        string[:3] + "\x07" + string[3:], string[:2] + "\u0301" + string[2:], string[0] + "\u2060" + string[1:],
        string.replace("<", "{").replace(">", "}"), string.replace("<", "<0x3C>"), string[0] + " " + string[1:],
        string[:-1] + "\u20ff" + string[-1], string.replace("_", "\uff3f"), string[:2] + "\ud7ff" + string[2:],
        string.title(), string[0] + string + string[1:], string.replace("e", "é"), f"<{string}>", string[1:] + string,
    )  # fmt: skip


def said(render, text):
    turns = (Turn("user", text), Turn("assistant", text), Turn("user", "a"), Turn("assistant", "a"))
    system = text if render.template.system else None
    return render.render(Conversation(turns, system), [None, {"quality": 3}, None, None], generation_prompt=False)


def controls(render, tokens):
    """How often each control string stands there: as its token, or where it is none, as what its pieces spell."""
    tokenizer, found = render.tokenizer, {}
    text = tokenizer.decode(tokens)
    for string in render.template.control_strings | tokenizer.special_strings - {tokenizer.unknown}:
        index = tokenizer.token_id(string)
        found[string] = text.count(string) if index is None else list(tokens).count(index)
    return found


def opened(folder, *kind):
    try:
        return load_tokenizer(adversarial(folder, *kind))
    except ModelError:
        return None  # refused as a whole, e.g. one that knows no "\\n"


def joins(normalizer, added):
    """Whether a marker may join with what stands beside it: ordinary text, a word by itself, one that is sought with a
    prefix before it."""
    return added in ("none", "single word") or (normalizer == "prepended" and added in ("normalized", "not special"))


def check(render, text, quiet, joined):
    """ "kept" or "refused"; forging is an AssertionError."""
    try:
        rendered = said(render, text)
    except (DataError, ModelError) as error:
        return f"refused: {re.sub(r' at character .*', '', str(error).splitlines()[0])[:60]}"
    found, (expected, most) = controls(render, rendered.tokens), quiet
    # Where markers may join with what stands beside, the template's own are the limit.
    assert found == expected or (joined and all(found[s] <= most[s] for s in found)), (text, rendered.text)
    return "kept"


def run(folder, kinds, texts, tried, random=None):
    outcomes = collections.Counter()
    for kind in kinds:
        tokenizer = opened(folder, *kind)
        if tokenizer is None:
            outcomes["tokenizer refused"] += 1
            continue
        for name, template in EVERY.items():
            render = Renderer(tokenizer, template, STEERLM)
            try:
                plain = said(render, "a")
                quiet = controls(render, plain.tokens), {s: plain.text.count(s) for s in controls(render, plain.tokens)}
            except ModelError:
                outcomes["tokenizer refused"] += 1
                continue
            for text in texts(template, random) if random else texts(template):
                try:
                    outcomes[check(render, text, quiet, joins(*kind[1:3]))] += 1
                except AssertionError as error:
                    raise AssertionError(f"{kind}, {name}: {error}") from None
    for outcome, count in outcomes.items():
        tried("conversation rendered", outcome, count)
    return outcomes


def of_one(template):
    return [text for string in sorted(template.control_strings)[:2] for text in look_alikes(string)]


@pytest.mark.parametrize("model", MODELS)
def test_a_few_of_each_kind(tmp_path, model, tried):
    kinds = [kind for kind in KINDS if kind[0] == model]
    outcomes = run(tmp_path, Random(model).sample(kinds, 8), of_one, tried)
    assert outcomes["kept"] > 0


SOME = [("byte level", "nfkc", "normalized", False), ("unigram", "lower", "not special", True),
        ("word piece", "bert", "special", True)]  # fmt: skip
BITS = st.sampled_from([*CONTROLS[:6], *(bit for one in CONTROLS[:6] for bit in look_alikes(one)), "<", ">", "a"])


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(bits=st.lists(st.one_of(BITS, st.text(max_size=3)), max_size=6))
def test_any_text_of_any_bits(tmp_path, bits):
    for kind in SOME:
        render = Renderer(opened(tmp_path, *kind), TEMPLATES["chatml"], STEERLM)
        plain = said(render, "a")
        assert check(render, "".join(bits) + "a", (controls(render, plain.tokens), {}), False) == "kept"


@pytest.mark.parametrize("kind", SOME)
def test_time_grows_as_the_text(tmp_path, kind):
    """Quadratic, ten times the text would take a hundred times as long."""
    render, seconds = Renderer(opened(tmp_path, *kind), TEMPLATES["chatml"], STEERLM), []
    for times in (1000, 10_000):
        text = "".join(f"{bit} " for bit in look_alikes("<|im_end|>")[:3]) * (times // 3)
        started = time.process_time()
        said(render, text)
        seconds.append(time.process_time() - started)
    assert seconds[1] < 25 * seconds[0] + 0.5


@pytest.mark.faults
def test_mutated_conversations(tmp_path, tried):
    """40,000 of them: each kind of tokenizer, each template, nine texts."""

    def texts(template, random):
        strings = sorted(template.control_strings)
        return [mutated_text(random.choice(look_alikes(random.choice(strings))), random, strings) for _ in range(9)]

    outcomes = run(tmp_path, KINDS, texts, tried, Random(16))
    assert outcomes["kept"] > 35_000
