"""The exported tokenizer makes control tokens of control strings alone, or there is no export."""

import json

import pytest
from tokenizers import Tokenizer

from steerjax.chat.render import Renderer
from steerjax.chat.templates import TEMPLATES
from steerjax.chat.tokenizer import load_tokenizer
from steerjax.errors import ModelError
from steerjax.hf.look_alikes import look_alikes
from steerjax.hf.tokenizer_files import write_tokenizer
from steerjax.schema import HELPSTEER
from tests.faults.adversarial_tokenizers import adversarial
from tests.hf.serving import talk
from tests.refusals import refused

CHATML = TEMPLATES["chatml"]


def written(folder, tokenizer):
    folder.mkdir()
    write_tokenizer(folder, tokenizer, CHATML, "")
    return Tokenizer.from_file(str(folder / "tokenizer.json"))


@pytest.mark.parametrize("normalizer", ["nfkc", "lower", "bert", "replaced", "nfkd, accents stripped"])
@pytest.mark.parametrize("added", ["normalized", "not special"])
def test_control_tokens_are_matched_before_text_is_normalised(tmp_path, normalizer, added):
    path = adversarial(tmp_path, "byte level", normalizer, added, False)
    tokenizer, content, source = load_tokenizer(path), json.loads(path.read_text()), Tokenizer.from_file(str(path))
    backend = written(tmp_path / "out", tokenizer)
    ids = {source.token_to_id(string) for string in CHATML.control_strings}
    texts = [f"a {text} b" for string in CHATML.control_strings for text in look_alikes(string, content)]
    innocent = [text for text in texts if not any(string in text for string in CHATML.control_strings)]
    assert any(ids & {*source.encode(text).ids} for text in innocent)
    assert not any(ids & {*backend.encode(text).ids} for text in innocent)
    rendered = Renderer(tokenizer, CHATML, HELPSTEER).render(talk("Hi, you.", " No.\n", "é", system="Be kind."))
    assert backend.encode(rendered.text).ids == rendered.tokens.tolist()


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        (("byte level", "nfkc", "special", True), "</ſ>"),  # the model's own pieces make it
        (("byte level", "nfkc", "none", False), "<|ªttributes|>"),  # and these spell it
        (("byte level", "prepended", "normalized", False), "</ſ>"),  # matched first, it would part texts with a prefix
        (("dropping", "none", "none", False), "<⁠|attributes|>"),
        (("word piece", "none", "none", False), "< |attributes|>"),
    ],
)
def test_what_would_be_taken_from_a_text_is_refused(tmp_path, kind, text):
    tokenizer = load_tokenizer(adversarial(tmp_path, *kind))
    with refused(ModelError, repr(text), cure="normalized=false"):
        written(tmp_path / "out", tokenizer)
    tokenizer = load_tokenizer(adversarial(tmp_path, *kind[:2], "special", False))  # the cure
    assert written(tmp_path / "cured", tokenizer)


def test_ordinary_tokens_go_first(tmp_path):
    """Where a prefix of each text would differ, and no text becomes a control token, all stays as it is."""
    path = adversarial(tmp_path, "byte level", "none", "normalized", False)
    content = json.loads(path.read_text())
    content["normalizer"] = {"type": "Prepend", "prepend": "_"}
    path.write_text(json.dumps(content))
    written(tmp_path / "out", load_tokenizer(path))
    assert json.loads((tmp_path / "out" / "tokenizer.json").read_text()) == content


def test_parts_that_a_file_leaves_out(tmp_path):
    path = adversarial(tmp_path, "byte level", "none", "none", False)
    content = json.loads(path.read_text())
    path.write_text(json.dumps({key: content[key] for key in ("pre_tokenizer", "decoder", "model")}))
    assert written(tmp_path / "out", load_tokenizer(path))


def test_a_text_that_has_no_tokens(tmp_path):
    """Each look-alike with a character that has none is refused by the tokenizer itself."""
    path = adversarial(tmp_path, "word level", "none", "special", False)
    content = json.loads(path.read_text())
    content["model"]["unk_token"] = "none"
    path.write_text(json.dumps(content))
    assert written(tmp_path / "out", load_tokenizer(path))


def test_a_string_that_a_normalizer_replaces(tmp_path):
    path = adversarial(tmp_path, "byte level", "none", "none", False)
    content = json.loads(path.read_text())
    content["normalizer"] = {"type": "Replace", "pattern": {"String": '"lt"'}, "content": "<"}
    path.write_text(json.dumps(content))
    with refused(ModelError, '"lt"|attributes|>', cure="added_tokens"):
        written(tmp_path / "out", load_tokenizer(path))
