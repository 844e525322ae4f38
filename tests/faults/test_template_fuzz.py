"""The exported chat template and tokenizer in transformers: no text of a conversation becomes a control token."""

import itertools
import json
from collections import Counter
from random import Random

import jinja2
import pytest
import transformers

from steerjax.chat.tokenizer import load_tokenizer
from steerjax.errors import ModelError
from steerjax.hf.chat_template import chat_template
from steerjax.hf.tokenizer_files import special_strings, write_tokenizer
from steerjax.schema import STEERLM
from tests.faults.mutate import mutated_text
from tests.faults.test_text_stays_text import EVERY, KINDS, look_alikes, opened
from tests.hf.serving import as_messages, talk, tokenizer_of


def served(folder, tokenizer, template, kind="chat"):
    """What transformers opens; None where the export is refused."""
    text = chat_template(template, STEERLM, kind=kind, special_strings=special_strings(tokenizer, template))
    folder.mkdir(exist_ok=True)
    try:
        write_tokenizer(folder, tokenizer, template, text)
    except ModelError as error:
        assert "cure: " in str(error)
        return None
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    return transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)


def conversation(template, text):
    """The text in each place."""
    return as_messages(talk(text, text, "a", "a", system=text if template.system else None))


def controls(backend, strings, ids):
    """How often each control string stands there, as its token, or where it is none, as what its pieces spell."""
    text, found = backend.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False), {}
    for string in strings:
        index = backend.convert_tokens_to_ids(string)
        found[string] = ids.count(index) if string in backend.get_vocab() else text.count(string)
    return found


def run(folder, kinds, texts, tried):
    """`texts(template)` in conversations, for each kind of tokenizer and each template that it is exported with."""
    outcomes = Counter()
    for kind, (name, template) in itertools.product(kinds, EVERY.items()):
        tokenizer = kind if isinstance(kind, str) else opened(folder, *kind)
        if tokenizer is None:
            outcomes["tokenizer refused"] += 1
            continue
        tokenizer = load_tokenizer(tokenizer) if isinstance(kind, str) else tokenizer
        backend = served(folder / "out", tokenizer, template)
        if backend is None:
            outcomes["export refused"] += 1
            continue
        strings = template.control_strings | special_strings(tokenizer, template) - {tokenizer.unknown}
        given = [text.replace("\ud800", "") for text in texts(template)]  # which no request can hold
        talks = [conversation(template, text) for text in ("a", *given)]
        written = backend.apply_chat_template(talks, tokenize=False)
        plain, *found = (controls(backend, strings, ids) for ids in backend(written)["input_ids"])
        most = {string: written[0].count(string) for string in strings}
        for text, whole, counts in zip(given, written[1:], found, strict=True):
            # As in test_text_stays_text.py: a token that wants to be a word by itself depends on what stands beside.
            single = kind[2] == "single word" and all(counts[string] <= most[string] for string in strings)
            assert counts == plain or single, (kind, name, text, whole)
        outcomes["kept"] += len(given)
    for outcome, count in outcomes.items():
        tried("template call", outcome, count)
    print(f"\n{dict(outcomes)}")
    return outcomes


def of_one(template):
    return [text for string in sorted(template.control_strings)[:2] for text in look_alikes(string)]


def test_a_few_of_each_kind(tmp_path, tried):
    outcomes = run(tmp_path, Random(7).sample(KINDS, 24), of_one, tried)
    assert min(outcomes["kept"], outcomes["export refused"]) > 0


@pytest.mark.faults
def test_mutated_calls(tmp_path, tried):
    """25,000 of them."""
    random = Random(16)

    def texts(template):
        strings = sorted(template.control_strings)
        return [mutated_text(random.choice(look_alikes(random.choice(strings))), random, strings) for _ in range(12)]

    assert run(tmp_path, KINDS, texts, tried)["kept"] > 20_000
