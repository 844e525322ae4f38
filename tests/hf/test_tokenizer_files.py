"""The exported tokenizer: ids equal to ours, nothing added, and a padding token that no reward is read at."""

import gzip
import json
import random

import pytest

from steerjax.chat.templates import TEMPLATES
from steerjax.chat.tokenizer import load_tokenizer
from steerjax.errors import ModelError
from steerjax.hf.tokenizer_files import special_strings, special_tokens, stop_tokens, write_tokenizer
from tests.hf.serving import export, tokenizer_of
from tests.refusals import refused

SOURCES = ["embedded", "mistral", "llama3", pytest.param("smollm2", marks=pytest.mark.smollm2)]
NATURAL = {"embedded": "extra_id", "mistral": "llama2", "llama3": "llama3", "smollm2": "chatml"}
BOS = {"bos_token": "<|begin_of_text|>"}
FULL_WIDTH = str.maketrans({chr(code): chr(code + 0xFEE0) for code in range(0x21, 0x7F)})


@pytest.fixture(scope="module")
def texts(repository):
    with gzip.open(repository / "steerjax/data/samples/helpsteer.jsonl.gz", "rt", encoding="utf-8") as file:
        return [text for row in map(json.loads, file) for text in (row["prompt"], row["response"])]


@pytest.fixture(scope="module")
def tokenizers(texts, tmp_path_factory):
    cache = {}

    def get(name):
        if name not in cache:
            cache[name] = tokenizer_of(name, tmp_path_factory.mktemp(name), texts[:200])
        return cache[name]

    return get


def awkward(texts):
    """Runs of spaces and signs, every character of the sample, bytes that are no piece."""
    choose = random.Random(0)
    alphabet = sorted(set("".join(texts)))
    yield from ("".join(choose.choices(" \n\taab\u2581\0é😀<>|", k=choose.randint(0, 40))) for _ in range(500))
    yield from ("".join(choose.choices(alphabet, k=choose.randint(1, 60))) for _ in range(500))
    yield from (" " * i + "x" + " " * j for i in range(40) for j in range(5))
    yield from ("=" * i for i in range(100))


def written(folder, tokenizer, template):
    from tokenizers import Tokenizer

    folder.mkdir(exist_ok=True)
    write_tokenizer(folder, tokenizer, TEMPLATES[template], "{{ messages }}")
    return Tokenizer.from_file(str(folder / "tokenizer.json"))


@pytest.mark.short
@pytest.mark.parametrize("source", SOURCES)
def test_ids_and_texts_are_equal(tokenizers, source, texts, tmp_path):
    tokenizer, template = tokenizers(source), TEMPLATES[NATURAL[source]]
    backend = written(tmp_path, tokenizer, template.name)
    marks = sorted(special_strings(tokenizer, template) & tokenizer.special_strings | template.control_strings)
    for text in (*texts, *awkward(texts)):
        ids = tokenizer.encode(text)
        assert backend.encode(text).ids == ids, text
        assert backend.decode(ids, skip_special_tokens=False) == tokenizer.decode(ids), text
    for index, mark in enumerate(marks):
        for text in (mark, f" {mark}\n{mark} ", f"{mark}{mark}\n\n{mark}", mark.join(texts[index : index + 4]) + mark):
            assert backend.encode(text).ids == tokenizer.encode(text, controls=template.control_strings), text
    assert backend.get_vocab_size() == tokenizer.vocab_size


@pytest.mark.parametrize(
    ("source", "template", "expected"),
    [
        ("embedded", "extra_id", {"eos_token": "<extra_id_1>", "pad_token": "<pad>"}),
        ("embedded", "chatml", {"eos_token": "<|im_end|>", "pad_token": "<pad>"}),
        ("embedded", "llama2", {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}),
        ("mistral", "llama2", {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<unk>"}),
        ("mistral", "extra_id", {"eos_token": "</s>", "pad_token": "</s>"}),
        ("llama3", "llama3", BOS | {"eos_token": "<|eot_id|>", "pad_token": "<|end_of_text|>"}),
        ("llama3", "chatml", BOS | {"eos_token": "<|eot_id|>", "pad_token": "<|eot_id|>"}),
    ],
)
def test_special_tokens(tokenizers, source, template, expected, tmp_path):
    tokenizer = tokenizers(source)
    assert special_tokens(tokenizer, TEMPLATES[template]) == expected
    written(tmp_path, tokenizer, template)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert config | expected == config
    assert json.loads((tmp_path / "special_tokens_map.json").read_text()) == expected
    assert {tokenizer.token_id(string) for string in expected.values()} < set(range(tokenizer.vocab_size))


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("source", SOURCES)
def test_a_server_stops_where_our_decoder_does(tokenizers, source, template):
    from steerjax.inference.stopping import Stops

    tokenizer = tokenizers(source)
    assert stop_tokens(tokenizer, TEMPLATES[template]) == Stops(tokenizer, TEMPLATES[template]).tokens


@pytest.mark.smollm2
def test_smollm2_is_not_padded_where_its_reward_is_read(tokenizers):
    """Its own pad_token, <|im_end|>, is the reward's place: transformers would read the token before."""
    tokens = special_tokens(tokenizers("smollm2"), TEMPLATES["chatml"])
    assert tokens == {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}


def test_only_named_control_pieces_are_reachable(tokenizers, tmp_path):
    """`<s>` in a text is text, unless the template writes it."""
    tokenizer = tokenizers("embedded")
    backend = written(tmp_path, tokenizer, "chatml")
    assert backend.encode("<s>x</s><unk>").ids == tokenizer.encode("<s>x</s><unk>")
    assert tokenizer.pad_id in backend.encode("<pad>").ids
    assert "<pad>" in special_strings(tokenizer, TEMPLATES["chatml"])


@pytest.mark.parametrize("source", SOURCES)
def test_look_alikes_stay_text(tokenizers, source, tmp_path):
    """The template does not see full-width look-alikes; these tokenizers make no control token of them."""
    tokenizer = tokenizers(source)
    forbidden = special_strings(tokenizer, TEMPLATES[NATURAL[source]])
    backend = written(tmp_path, tokenizer, NATURAL[source])
    ids = {tokenizer.token_id(string) for string in forbidden}
    for string in forbidden:
        assert not ids & set(backend.encode(f"x {string.translate(FULL_WIDTH)} y").ids)


def test_what_the_folder_says(tokenizers, tmp_path):
    base = tokenizers("llama3")
    written(tmp_path, base, "llama3")
    before = json.loads(base.files[0].read_text())
    after = json.loads((tmp_path / "tokenizer.json").read_text())
    (kept,) = after.pop("post_processor")["processors"]
    assert kept == before.pop("post_processor")["processors"][0]
    assert after == before
    assert json.loads((tmp_path / "tokenizer_config.json").read_text()) == {
        "model_max_length": 512,
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_input_names": ["input_ids", "attention_mask"],
        "clean_up_tokenization_spaces": False,
        "add_bos_token": False,
        "add_eos_token": False,
        **special_tokens(base, TEMPLATES["llama3"]),
    }
    assert (tmp_path / "chat_template.jinja").read_text() == "{{ messages }}"


def test_files_without_a_bos_are_copied_as_they_are(tokenizers, tmp_path):
    base = tokenizers("embedded")
    written(tmp_path / "first", base, "chatml")
    assert (tmp_path / "first/tokenizer.model").read_bytes() == base.files[0].read_bytes()
    again = load_tokenizer(tmp_path / "first")
    written(tmp_path / "second", again, "chatml")
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes()


@pytest.mark.parity
@pytest.mark.parametrize("source", SOURCES)
def test_transformers_adds_nothing(tokenizers, source, texts, tmp_path):
    tokenizer, template = tokenizers(source), TEMPLATES[NATURAL[source]]
    served = export(tmp_path, tokenizer, template.name)
    for text in (*texts[:100], *sorted(template.control_strings)):
        encoded = served(text)
        assert encoded["input_ids"] == tokenizer.encode(text, controls=template.control_strings)
        assert served.decode(encoded["input_ids"]) == text
    assert set(encoded) == {"input_ids", "attention_mask"}
    assert len(served) == tokenizer.vocab_size
    ids = served("x " + served.eos_token)["input_ids"]
    assert served.decode(ids, skip_special_tokens=True) == "x "


def train(path, texts, **options):
    import io

    import sentencepiece

    model = io.BytesIO()
    as_llama = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False, "byte_fallback": True}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_writer=model,
        vocab_size=400,
        minloglevel=2,
        **{"model_type": "bpe"} | as_llama | options,
    )
    path.write_bytes(model.getvalue())
    return load_tokenizer(path)


@pytest.mark.parametrize("prefix", [True, False])
def test_characters_that_are_no_piece(texts, tmp_path, prefix):
    """Without bytes to fall back on, a run of them is one `<unk>`."""
    options = {"byte_fallback": False, "add_dummy_prefix": prefix, "character_coverage": 1.0}
    tokenizer = train(tmp_path / "m.model", [*texts[:40], "".join(TEMPLATES["llama2"].control_strings)], **options)
    backend = written(tmp_path / "out", tokenizer, "llama2")
    for text in ("a 日本語 b", "日", "x日本 語y\n", "😀</s>😀😀"):
        ids = tokenizer.encode(text, controls=frozenset({"</s>"}))
        assert backend.encode(text).ids == ids
        assert tokenizer.token_id("<unk>") in ids


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"model_type": "unigram"}, "other ids"),
        ({"normalization_rule_name": "nmt_nfkc"}, "normalises"),
        ({"remove_extra_whitespaces": True}, "other ids"),
        ({"treat_whitespace_as_suffix": True}, "other ids"),
        ({"user_defined_symbols": ["<x>"]}, "other ids"),
    ],
)
def test_models_that_cannot_be_converted(options, reason, texts, tmp_path):
    with refused(ModelError, str(tmp_path / "m.model"), "tokenizer.json", reason):
        train(tmp_path / "m.model", texts[:40], **options)


def test_a_conversion_is_compared(texts, tmp_path, monkeypatch):
    import tokenizers

    train(tmp_path / "m.model", texts[:40])
    bpe = tokenizers.models.BPE
    monkeypatch.setattr(tokenizers.models, "BPE", lambda merges, **rest: bpe(merges=merges[::-1], **rest))
    with refused(ModelError, str(tmp_path / "m.model"), "tokenizer.json", "other ids"):
        load_tokenizer(tmp_path / "m.model")


def test_added_tokens_beside_a_model_are_exported(texts, tmp_path):
    """Llama 2's tokenizer with ChatML's markers after its pieces, as fine-tunes publish it."""
    size = train(tmp_path / "tokenizer.model", texts[:40]).vocab_size
    added = {"<|im_end|>": size, "<|im_start|>": size + 1, "<unused>": size + 2}
    (tmp_path / "added_tokens.json").write_text(json.dumps(added))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|im_end|>"}))
    tokenizer, template = load_tokenizer(tmp_path), TEMPLATES["chatml"]
    assert special_tokens(tokenizer, template) == {"eos_token": "<|im_end|>", "pad_token": "<unk>"}
    backend = written(tmp_path / "out", tokenizer, "chatml")
    text = "<|im_start|>a<|im_end|>\n<|im_start|>b c"
    assert backend.encode(text).ids == tokenizer.encode(text, controls=template.control_strings)
    assert backend.get_vocab_size() == tokenizer.vocab_size == size + 3
    assert backend.encode("<unused>").ids == tokenizer.encode("<unused>")
    again = load_tokenizer(tmp_path / "out")
    assert (again.eos_id, again.vocab_size) == (size, size + 3)
