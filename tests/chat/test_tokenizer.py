import hashlib
import json
import random
import shutil

import pytest
from chat_helpers import TOKENIZERS, sentencepiece_of, small_llama_spm

from steerjax.chat.templates import TEMPLATES
from steerjax.chat.tokenizer import (
    EMBEDDED,
    HIDE,
    copy_tokenizer,
    load_tokenizer,
    missing_markers,
    with_special_tokens,
)
from steerjax.errors import ModelError
from tests.refusals import refused

TEXTS = [
    "",
    "Hello, world.",
    " one leading space",
    "  two   runs of  spaces  ",
    "tab\tand\t\ttabs\t",
    "\r\nCRLF\r\n\r\nmore\r",
    "\n\n\nnewlines\n",
    "😀 👩‍👩‍👧 e\u0301 ＦＵＬＬ \ufb01 日本語 \u200b\ufeff\u2028\x85",
    "\0 nul",
    "<0x0A> <s> </s> <unk> <pad>",
    "2024-01-31: 12345678",
    "    if x:\n        return {'a': [1, 2]}\n",
]
CONTROLS = frozenset({"<s>", "</s>"})


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("continuation", [False, True])
def test_text_comes_back(tokenizers, name, text, continuation):
    tokenizer = tokenizers[name]
    ids = tokenizer.encode(text, continuation=continuation)
    assert tokenizer.decode(ids, continuation=continuation) == text
    assert all(0 <= index < tokenizer.vocab_size for index in ids)


def test_every_sample_text_comes_back(embedded, texts):
    assert [text for text in texts if embedded.decode(embedded.encode(text)) != text] == []


def test_u2581_is_sentencepieces_space(embedded, llama_spm, gpt2_like):
    assert embedded.decode(embedded.encode("a\u2581b")) == "a b"  # the one exception that the module names
    assert llama_spm.decode(llama_spm.encode("a\u2581b")) == "a b"
    assert gpt2_like.decode(gpt2_like.encode("a\u2581b")) == "a\u2581b"


@pytest.mark.parametrize("name", TOKENIZERS)
def test_continuation_equals_one_go(tokenizers, name):
    tokenizer = tokenizers[name]
    for first, second in [("Hello", " world"), ("Hi there\n", "you"), ("Hi.\n", "two  spaces"), ("x", "\n<s>")]:
        whole = tokenizer.encode(first + second)
        assert tokenizer.encode(first) + tokenizer.encode(second, continuation=True) == whole, (first, second)


def test_dummy_prefix_only_at_the_start(llama_spm, train_tokenizer, texts, tmp_path_factory):
    for tokenizer in (llama_spm, small_llama_spm(train_tokenizer, texts, tmp_path_factory)):
        assert tokenizer.encode("the") != tokenizer.encode("the", continuation=True)
        assert tokenizer.encode(" the", continuation=True) == tokenizer.encode("the")
        assert tokenizer.encode("the") == sentencepiece_of(tokenizer).encode("the")


@pytest.mark.parametrize("name", ["embedded", "spm", "small", "digits"])
def test_ids_and_text_are_sentencepieces(tokenizers, train_tokenizer, texts, tmp_path, tmp_path_factory, name):
    """SentencePiece itself on the sample, on any characters, and on its own ids in any order."""
    if name == "digits":
        path = tmp_path / "digits.model"
        symbols = ["1", "2", "  ", "<x>", "\n", " a b", "\u2581\u2581", "\u2581a\u2581b"]
        path.write_bytes(train_tokenizer.train(texts, 1000, user_defined_symbols=symbols, pad_id=-1))
        tokenizer = load_tokenizer(path)
    else:
        small = name == "small"
        tokenizer = small_llama_spm(train_tokenizer, texts, tmp_path_factory) if small else tokenizers[name]
    oracle, choose = sentencepiece_of(tokenizer), random.Random(0)
    alphabet = sorted(set("".join(texts))) + list(" \n\t\0é😀<>|12xab\u2581\ufeff") * 5
    mixed = ["".join(choose.choices(alphabet, k=choose.randint(0, 60))) for _ in range(1000)]
    pieces = [oracle.id_to_piece(i) for i in range(oracle.vocab_size()) if not oracle.is_byte(i)]
    spelt = ["".join(choose.choices(pieces, k=20)).replace("\u2581", " ") for _ in range(500)]
    runs = [" " * i + "x" + " " * j for i in range(40) for j in range(5)] + ["=" * i for i in range(100)]
    for text in (*TEXTS, *texts, *mixed, *spelt, *runs):
        ids = oracle.encode(text)
        assert tokenizer.encode(text) == ids, text
        assert tokenizer.decode(ids) == oracle.decode(ids), text
    whole = [i for i in range(oracle.vocab_size()) if not (oracle.is_byte(i) or oracle.is_control(i))]
    whole.remove(oracle.unk_id())
    for _ in range(500):
        ids = choose.choices(whole, k=10)
        assert tokenizer.decode(ids) == oracle.decode(ids)
    own = (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id if oracle.pad_id() >= 0 else -1)
    assert own == (oracle.bos_id(), oracle.eos_id(), oracle.pad_id())
    assert tokenizer.vocab_size == oracle.vocab_size()
    assert tokenizer.hash == hashlib.sha256(tokenizer.files[0].read_bytes()).hexdigest()


def test_a_newline_that_joins_what_follows_is_refused(tmp_path):
    # A dummy prefix, and a token that begins with a newline: a continuation has no tokens of its own.
    from tokenizers import Tokenizer, decoders, models, normalizers

    vocab = {"\u2581": 0, "\n": 1, "x": 2, "y": 3, "\nx": 4, "a": 5}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[("\n", "x")]))
    backend.normalizer, backend.decoder = normalizers.Prepend("\u2581"), decoders.Fuse()
    backend.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.encode("y", continuation=True) == [3]
    with refused(ModelError, "newline", "x"):
        tokenizer.encode("x", continuation=True)


def test_control_pieces_only_when_asked_for(embedded, llama_spm):
    for tokenizer in (embedded, llama_spm):
        bos, eos = tokenizer.bos_id, tokenizer.eos_id
        assert bos not in tokenizer.encode("<s>hi</s>")
        assert eos not in tokenizer.encode("<s>hi</s>")
        ids = tokenizer.encode("<s>hi </s><s>you", controls=CONTROLS)
        hi, you = tokenizer.encode("hi "), tokenizer.encode("you")
        assert ids == [bos, *hi, eos, bos, *you]  # a fresh text, with its prefix, after each
        assert tokenizer.decode(ids) == "<s>hi </s><s>you"
        assert ("<s>" in tokenizer.restarts) == bool(tokenizer.head)


def test_special_strings(embedded, gpt2_like, llama_spm):
    expected = {"<extra_id_0>", "<extra_id_1>", "<extra_id_2>", "<|im_start|>", "<|im_end|>", "<|attributes|>"}
    assert embedded.special_strings == expected  # without "\n"
    assert llama_spm.special_strings == frozenset()
    for tokenizer in (embedded, gpt2_like):
        for string in tokenizer.special_strings:
            assert tokenizer.encode(f"a{string}b").count(tokenizer.token_id(string)) == 1
    assert embedded.token_id("no such piece") is None
    assert gpt2_like.token_id("no such piece") is None


def test_one_character_pieces_are_ordinary_text(train_tokenizer, texts, tmp_path):
    path = tmp_path / "digits.model"
    path.write_bytes(train_tokenizer.train(texts, 1000, user_defined_symbols=["1", "2", "  ", "<x>"], pad_id=-1))
    assert load_tokenizer(path).special_strings == {"<x>"}


def test_embedded_ids(embedded):
    assert (embedded.vocab_size, embedded.pad_id, embedded.bos_id, embedded.eos_id) == (4096, 0, 2, 3)
    assert embedded.files == (EMBEDDED,)
    assert len(embedded.encode("\n")) == len(embedded.encode("<extra_id_1>")) == 1
    assert embedded.encode("123") == [*embedded.encode("1"), *embedded.encode("2"), *embedded.encode("3")]


def test_script_makes_the_packaged_model(train_tokenizer):
    """Byte for byte, with the sentencepiece that made it (0.2.3); run the script again after an upgrade."""
    sample = train_tokenizer.sample_texts(train_tokenizer.SAMPLE)
    first = train_tokenizer.train(sample)
    assert first == train_tokenizer.train(sample)
    assert first == EMBEDDED.read_bytes()


def folder_with(tmp_path, source, config=None, special_map=None):
    shutil.copy(source.files[0], tmp_path / "tokenizer.json")
    for name, content in (("tokenizer_config.json", config), ("special_tokens_map.json", special_map)):
        if content is not None:
            (tmp_path / name).write_text(json.dumps(content))
    return tmp_path


def test_special_ids_from_the_files_beside(gpt2_like, tmp_path):
    config = {"bos_token": "<s>", "eos_token": {"content": "</s>", "lstrip": False}, "pad_token": None}
    folder = folder_with(tmp_path, gpt2_like, config, {"pad_token": "<|im_end|>", "eos_token": "<|eot_id|>"})
    tokenizer = load_tokenizer(folder)
    names = ("<s>", "</s>", "<|im_end|>")
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == tuple(map(tokenizer.token_id, names))
    assert {file.name for file in tokenizer.files} == {
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
    }
    assert tokenizer.hash == gpt2_like.hash
    assert (gpt2_like.bos_id, gpt2_like.eos_id, gpt2_like.pad_id) == (None, None, None)


def test_a_folder_prefers_tokenizer_json(gpt2_like, tmp_path):
    shutil.copy(EMBEDDED, tmp_path / "tokenizer.model")
    assert load_tokenizer(tmp_path).hash == load_tokenizer("embedded").hash
    assert load_tokenizer(folder_with(tmp_path, gpt2_like)).hash == gpt2_like.hash


def test_a_file_by_its_name(gpt2_like):
    assert load_tokenizer(gpt2_like.files[0]).hash == gpt2_like.hash
    assert load_tokenizer(str(EMBEDDED)).hash == load_tokenizer("embedded").hash


@pytest.mark.parametrize(
    ("make", "facts"),
    [
        (lambda d: d / "missing", ()),
        (lambda d: d, ("tokenizer.json", "0 .model")),
        (lambda d: write(d / "tokenizer.model", b"no model"), ("SentencePiece",)),
        (lambda d: write(d / "tokenizer.model", b""), ("SentencePiece",)),
        (lambda d: write(d / "tokenizer.json", b'{"a": 1}'), ("line 1",)),
        (lambda d: write(d / "pytorch_model.bin", b"\x80\x02"), ("pickle",)),
        (lambda d: write(d / "tokenizer.pkl", b"\x80\x02"), ("pickle",)),
        (lambda d: write(d / "vocab.txt", b"a"), ()),
        (
            lambda d: write(write(d / "a.model", b"a").with_name("b.model"), b"b").parent,
            ("tokenizer.json", "2 .model"),
        ),
    ],
)
def test_errors_name_the_cure(tmp_path, make, facts):
    path = make(tmp_path)
    with refused(ModelError, str(path), *facts):
        load_tokenizer(path)


def write(path, content):
    path.write_bytes(content)
    return path


def test_a_truncated_model_is_refused(tmp_path):
    path = write(tmp_path / "cut.model", EMBEDDED.read_bytes()[:1000])
    with pytest.raises(ModelError):
        load_tokenizer(path)


@pytest.mark.parametrize(
    ("content", "facts"),
    [('{"eos_token": "<no>"}', ("eos_token", "<no>")), ("[1", ("line 1",)), ('{"eos_token": 3}', ("eos_token", "3"))],
)
def test_wrong_files_beside(gpt2_like, tmp_path, content, facts):
    folder = folder_with(tmp_path, gpt2_like)
    (folder / "tokenizer_config.json").write_text(content)
    with refused(ModelError, str(folder / "tokenizer_config.json"), *facts):
        load_tokenizer(folder)


ADDED = {"<|im_end|>": 0, "<|im_start|>": 1, "[PAD]": 2}  # places after the model's pieces


def slow_folder(folder, model, added=None, config=None):
    """A folder as Hugging Face's slow tokenizers save it: a tokenizer.model, and tokens added beside it."""
    folder.mkdir(exist_ok=True)
    shutil.copy(model.files[0], folder / "tokenizer.model")
    added = {string: model.vocab_size + place for string, place in ADDED.items()} if added is None else added
    (folder / "added_tokens.json").write_text(json.dumps(added))
    config = {"legacy": True, "eos_token": "<|im_end|>", "pad_token": {"content": "[PAD]"}} | (config or {})
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def test_added_tokens_beside_a_model(llama_spm, tmp_path):
    tokenizer, size = load_tokenizer(slow_folder(tmp_path / "slow", llama_spm)), llama_spm.vocab_size
    assert (tokenizer.vocab_size, tokenizer.bos_id) == (size + 3, llama_spm.bos_id)
    assert (tokenizer.eos_id, tokenizer.pad_id) == (size, size + 2)
    assert tokenizer.hash != llama_spm.hash
    text, controls = "<|im_start|>user\nHi<|im_end|>\n", TEMPLATES["chatml"].control_strings
    ids = [size + 1, *llama_spm.encode("user\nHi"), size, *llama_spm.encode("\n")]
    assert tokenizer.encode(text, controls=controls) == ids
    assert tokenizer.decode(ids) == text
    assert tokenizer.encode(text) == llama_spm.encode(text)  # text never becomes one
    assert missing_markers(tokenizer, TEMPLATES["chatml"]) == ("<|attributes|>",)


@pytest.mark.parity
def test_added_tokens_are_transformers(llama_spm, tmp_path):
    transformers = pytest.importorskip("transformers")
    folder = slow_folder(
        tmp_path / "slow", llama_spm, config={"tokenizer_class": "LlamaTokenizer", "pad_token": "[PAD]"}
    )
    (folder / "config.json").write_text('{"model_type": "llama"}')
    theirs = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    text, ours = "<|im_start|>user\nHi there.<|im_end|>\n<|im_start|>assistant\nYo", load_tokenizer(folder)
    expected = theirs(text, add_special_tokens=False)["input_ids"]
    assert ours.encode(text, controls=TEMPLATES["chatml"].control_strings) == expected
    assert ours.vocab_size == len(theirs)


def test_added_tokens_that_only_the_config_names(llama_spm, tmp_path):
    names = {"added_tokens_decoder": {str(llama_spm.vocab_size): {"content": "<|im_end|>", "special": True}}}
    tokenizer = load_tokenizer(slow_folder(tmp_path / "a", llama_spm, {}, names | {"pad_token": None}))
    assert tokenizer.eos_id == tokenizer.token_id("<|im_end|>") == llama_spm.vocab_size


@pytest.mark.parametrize(
    ("added", "config"),
    [({"<x>": 5}, {}), ({"<x>": -1}, {}), ({"<x>": 90000, "<y>": 90000}, {}), ({"<x>": "5"}, {}), ([1], {}),
     (None, {"legacy": False}), (None, {"pad_token": "[no]"}), (None, {"added_tokens_decoder": {"x": {}}})],
)  # fmt: skip
def test_added_tokens_that_do_not_fit(llama_spm, tmp_path, added, config):
    folder = slow_folder(tmp_path / "slow", llama_spm, added, config)
    with refused(ModelError, str(folder)):
        load_tokenizer(folder)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_an_id_without_a_token_spells_nothing(tokenizers, name):
    """Embeddings are padded, and a model may draw any of their ids."""
    tokenizer = tokenizers[name]
    ids = tokenizer.encode("Hello")
    for stray in (tokenizer.vocab_size, tokenizer.vocab_size + 1000, 2**31 - 1):
        assert tokenizer.decode([*ids, stray, stray]) == "Hello"
        assert tokenizer.decode([stray], continuation=True) == ""


@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_copy_is_found_again(tokenizers, name, tmp_path):
    source = tmp_path / f"other_name{tokenizers[name].files[0].suffix}"
    shutil.copy(tokenizers[name].files[0], source)
    (tmp_path / "copy").mkdir()
    tokenizer = load_tokenizer(source)
    copy_tokenizer(tokenizer, tmp_path / "copy")
    again = load_tokenizer(tmp_path / "copy")
    assert again.hash == tokenizer.hash
    assert again.encode(TEXTS[1]) == tokenizer.encode(TEXTS[1])


def test_a_copy_has_the_files_beside(llama_spm, tmp_path):
    tokenizer = load_tokenizer(slow_folder(tmp_path / "slow", llama_spm))
    (tmp_path / "copy").mkdir()
    copy_tokenizer(tokenizer, tmp_path / "copy")
    again = load_tokenizer(tmp_path / "copy")
    assert (again.hash, again.eos_id, again.vocab_size) == (tokenizer.hash, tokenizer.eos_id, tokenizer.vocab_size)


def test_missing_markers(embedded, gpt2_like, llama3_like, llama_spm, llama_hf):
    lacking = {name: missing_markers(embedded, TEMPLATES[name]) for name in ("extra_id", "chatml", "llama3")}
    assert lacking["extra_id"] == lacking["chatml"] == ()
    assert lacking["llama3"] == ("<|begin_of_text|>", "<|end_header_id|>", "<|eot_id|>", "<|start_header_id|>")
    assert [missing_markers(t, TEMPLATES[name]) for t in (gpt2_like, llama_hf) for name in TEMPLATES] == [()] * 8
    assert missing_markers(llama3_like, TEMPLATES["llama3"]) == ("<|attributes|>",)
    assert not {"<s>", "</s>"} & set(missing_markers(llama_spm, TEMPLATES["llama2"]))
    assert missing_markers(llama_spm, TEMPLATES["extra_id"]) == ("<extra_id_0>", "<extra_id_1>", "<extra_id_2>")


@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_normalizer_of_replacements_gives_what_the_librarys_gives(tokenizers, name):
    tokenizer = tokenizers[name]
    own = tokenizer.backend.normalizer
    for text in (*TEXTS, "\u2581 a\u2581", " "):
        assert tokenizer.normalized(text) == (own.normalize_str(text) if own else text)


def test_tokens_are_those_of_encode_with_offsets(embedded, texts):
    for text in (*TEXTS, *texts[:100]):
        assert embedded.encode(text) == embedded.backend.encode(text, add_special_tokens=False).ids


def test_special_tokens_that_are_added(gpt2_like, llama_hf, nfkc, tmp_path):
    """After the last id, and nothing else changes; text that is told to stay text does; a copy is the same."""
    new = ("<x:0>", "<x:1>")
    for number, before in enumerate((gpt2_like, llama_hf, nfkc)):
        after = with_special_tokens(before, new)
        last = before.vocab_size
        assert [after.token_id(string) for string in new] == [last, last + 1] == [after.vocab_size - 2, last + 1]
        assert after.backend.get_vocab() == before.backend.get_vocab() | {new[0]: last, new[1]: last + 1}
        assert before.token_id(new[0]) is None
        for text in TEXTS:
            assert after.encode(text) == before.encode(text)
        ids = after.encode(f"a<x:1>b<{HIDE}x:1>")
        assert (ids.count(last + 1), ids.count(last)) == (1, 0)
        assert with_special_tokens(after, new[::-1]) is after
        (folder := tmp_path / str(number)).mkdir()
        copy_tokenizer(after, folder)
        again = load_tokenizer(folder)
        assert (again.hash, again.special_strings, again.told) == (after.hash, after.special_strings, after.told)
        assert again.hash != before.hash
        assert with_special_tokens(again, new) is again


def test_a_token_that_is_there_becomes_special(nfkc):
    string = "<extra_id_1>"
    after = with_special_tokens(nfkc, (string,))
    assert string in after.special_strings - nfkc.special_strings
    assert after.backend.get_vocab() == nfkc.backend.get_vocab()


def test_where_no_token_can_be_added(embedded, tmp_path):
    from tokenizers import Tokenizer, models

    with refused(ModelError, "SentencePiece", cure="save_pretrained"):
        with_special_tokens(embedded, ("<x:1>",))
    gaps = Tokenizer(models.WordLevel({"\n": 0, "a": 1, "b": 5}, unk_token="a"))
    gaps.save(str(tmp_path / "tokenizer.json"))
    with refused(ModelError, "tokenizer.json", "<x:1>", cure="gaps"):
        with_special_tokens(load_tokenizer(tmp_path), ("<x:1>",))
