"""The exported chat template and tokenizer in transformers: no text of a conversation becomes a control token."""

import json
from collections import Counter
from random import Random

import pytest

from steerjax.chat.tokenizer import load_tokenizer
from steerjax.errors import ModelError
from steerjax.hf.chat_template import chat_template
from steerjax.hf.tokenizer_files import special_strings, write_tokenizer
from steerjax.schema import STEERLM
from tests.faults.mutate import mutated_text
from tests.faults.test_text_stays_text import EVERY, KINDS, look_alikes, opened
from tests.hf.serving import as_messages, talk
from tests.refusals import says

pytestmark = pytest.mark.parity

EMBEDDED = ("embedded",)


def served(folder, tokenizer, template):
    """What transformers opens; None where the export is refused."""
    text = chat_template(template, STEERLM, kind="chat", special_strings=special_strings(tokenizer, template))
    folder.mkdir(exist_ok=True)
    try:
        write_tokenizer(folder, tokenizer, template, text)
    except ModelError as error:
        says(error, cure="normalized=false")
        return None
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder, local_files_only=True)


def conversation(template, text):
    """The text in each place."""
    return as_messages(talk(text, text, "a", "a", system=text if template.system else None))


def controls(backend, strings, ids):
    """How often each control string stands there, as its token, or where it is none, as what its pieces spell."""
    text, vocab = (
        backend.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False),
        backend.get_vocab(),
    )
    return {string: ids.count(vocab[string]) if string in vocab else text.count(string) for string in strings}


def run(folder, kinds, texts, tried):
    """`texts(template)` in conversations, for each kind of tokenizer and each template that it is exported with."""
    outcomes = Counter()
    for kind in kinds:
        tokenizer = load_tokenizer("embedded") if kind == EMBEDDED else opened(folder, *kind)
        if tokenizer is None:
            outcomes["tokenizer refused"] += 1
            continue
        for name, template in EVERY.items():
            backend = served(folder / "out", tokenizer, template)
            if backend is None:
                outcomes["export refused"] += 1
                continue
            strings = template.control_strings | special_strings(tokenizer, template) - {tokenizer.unknown}
            given = [text.replace("\ud800", "") for text in texts(template)]  # which no request can hold
            written = backend.apply_chat_template(
                [conversation(template, one) for one in ("a", *given)], tokenize=False
            )
            plain, *found = (controls(backend, strings, ids) for ids in backend(written)["input_ids"])
            most = {string: written[0].count(string) for string in strings}
            for text, counts in zip(given, found, strict=True):
                # As in test_text_stays_text.py: a token that wants to be a word depends on what stands beside.
                single = "single word" in kind and all(counts[string] <= most[string] for string in strings)
                assert counts == plain or single, (kind, name, text)
            outcomes["kept"] += len(given)
    for outcome, count in outcomes.items():
        tried("template call", outcome, count)
    return outcomes


def test_a_few_of_each_kind(tmp_path, tried):
    def texts(template):
        return [text for string in sorted(template.control_strings)[:2] for text in look_alikes(string)]

    outcomes = run(tmp_path, [EMBEDDED, *Random(7).sample(KINDS, 10)], texts, tried)
    assert min(outcomes["kept"], outcomes["export refused"]) > 0


@pytest.mark.faults
def test_mutated_calls(tmp_path, tried):
    """25,000 of them."""
    random = Random(16)

    def texts(template):
        strings = sorted(template.control_strings)
        return [mutated_text(random.choice(look_alikes(random.choice(strings))), random, strings) for _ in range(10)]

    assert run(tmp_path, [EMBEDDED, *KINDS], texts, tried)["kept"] > 25_000
