"""Chat models whose label lines are words or tokens: trained, resumed, exported and trained on."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest

from steerjax import export, generate
from steerjax.bundle.build import abstract_parameters, build_module, open_bundle
from steerjax.bundle.describe import describe
from steerjax.bundle.reader import open_reader
from steerjax.chat.labels import label_tokens
from steerjax.chat.render import ChatConfig, make_renderer
from steerjax.chat.templates import TEMPLATES
from steerjax.chat.tokenizer import load_tokenizer
from steerjax.config import default_config, resolve
from steerjax.errors import ConfigError, ModelError
from steerjax.models.config import HeadConfig
from steerjax.models.llama import Compute
from steerjax.parallel.mesh import MeshConfig, make_mesh
from steerjax.planning.compile import plannable
from steerjax.schema import Attribute, Schema
from steerjax.training.source import initial_parameters, new_tokens, resolve_model
from steerjax.training.train import train
from tests.hf.serving import as_messages, llama3_like, talk
from tests.hf_folders import TINY, random_tensors, write_folder
from tests.refusals import refused
from tests.reward_models import read_rows, write_rows

ATTRIBUTES = (("quality", 0, 4), ("length", 0, 3))
TOKENS = tuple(f"<quality:{i}>" for i in range(5)) + tuple(f"<length:{i}>" for i in range(4))
ROWS = [
    {"prompt": f"What is {i}?", "response": f"It is {i}, <quality:{i % 5}>.", "quality": i % 5, "length": i % 4}
    for i in range(24)
]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A model with a tokenizer.json, a row for each of its tokens, and a head that is not the embedding."""
    folder = tmp_path_factory.mktemp("source")
    texts = [text for row in ROWS for text in (row["prompt"], row["response"], "quality:1 length:2")]
    size = llama3_like(folder, texts).vocab_size
    raw = TINY | {"vocab_size": size, "num_hidden_layers": 1, "tie_word_embeddings": False}
    write_folder(folder, raw, random_tensors(raw))
    (folder / "tokenizer.model").unlink()
    return folder


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    return write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl", ROWS)


def recipe(rows, source, labels, objective="sft", steps=2, **groups):
    config = default_config()
    config.objectives, config.data.train, config.data.validation_fraction = (objective,), (str(rows),), 0.25
    config.data.attributes = ATTRIBUTES
    config.model.source, config.chat.template, config.chat.labels = str(source), "llama3", labels
    config.batch.update(rows=8, row_length=128)
    config.train.update(steps=steps, plots=False, trackers=())
    config.optimizer.update(warmup_steps=0, schedule="constant")
    for group, changes in groups.items():
        config[group].update(changes)
    return resolve(config.to_dict())


@pytest.mark.slow
@pytest.mark.parametrize("labels", ["words", "tokens"])
def test_trained_resumed_exported_and_trained_on(labels, source, rows, tmp_path, capsys):
    """The form travels; an export's tokens and embedding are transformers'; a second run adds no token again."""
    transformers = pytest.importorskip("transformers")
    run, out = tmp_path / "run", tmp_path / "out"
    train(recipe(rows, source, labels), run)
    train(recipe(rows, source, labels, steps=3), run)
    assert "resumed at step 2" in capsys.readouterr().out
    export.main(["--checkpoint", str(run), "--output", str(out)])
    vocabulary = describe(source, template="llama3").tokenizer.vocab_size
    about, conversation = describe(run), talk("Hi", "Yo", "So?")
    rated = [None, {"quality": 3.5, "length": 0}, None]
    assert about.template.labels == describe(out).template.labels == labels
    assert set(label_tokens(about.schema, labels)) == set(TOKENS if labels == "tokens" else ())

    ours = open_bundle(run, MeshConfig()).renderer()
    rendered = ours.render(conversation, rated, generation_prompt=True, generation_label={"length": 1})
    served = transformers.AutoTokenizer.from_pretrained(out)
    found = served.apply_chat_template(
        as_messages(conversation, rated), attributes={"length": 1}, add_generation_prompt=True, return_dict=False
    )
    assert found == rendered.tokens.tolist()
    written = {"words": "quality:very high,length:very low\n", "tokens": "<quality:4><length:0>\n"}[labels]
    assert f"<|attributes|>{written}" in rendered.text
    special = [served.decode(index) for index in found if index >= vocabulary]
    assert special == (["<quality:4>", "<length:0>", "<length:1>"] if labels == "tokens" else [])

    model = transformers.AutoModelForCausalLM.from_pretrained(out)
    size = -(-(vocabulary + len(TOKENS)) // 128) * 128 if labels == "tokens" else vocabulary
    assert model.config.vocab_size == len(model.get_input_embeddings().weight) == len(model.lm_head.weight) == size
    assert model.config.vocab_size >= len(served)
    embedding = open_reader(about.path).read("llama/embedding", (slice(0, size), slice(0, 32)))
    np.testing.assert_array_equal(model.get_input_embeddings().weight.detach().numpy(), embedding)

    asked = ["--attributes", "quality=3", "--sweep", "length=0..3", "--max-new-tokens", "2"]
    files = ["--input", str(write_rows(tmp_path / "asked.jsonl", [{"prompt": "Hi"}])), "--output"]
    generate.main(["--model", str(out), *asked, *files, str(tmp_path / "answers.jsonl")])
    answers = read_rows(tmp_path / "answers.jsonl")
    assert [row["generation"]["attributes"] for row in answers] == [{"quality": 3, "length": n} for n in range(4)]

    again = (
        tmp_path / "again"
    )  # "auto" is the source's form, and a frozen embedding is no harm to tokens that are there
    train(recipe(rows, run, "auto", steps=1, optimizer={"frozen_layers": 1}), again)
    later = describe(again)
    assert (later.template, later.model.vocab_size) == (about.template, size)
    assert later.tokenizer.backend.get_vocab() == about.tokenizer.backend.get_vocab()
    frozen = open_reader(later.path).read("llama/embedding", (slice(0, size), slice(0, 32)))
    np.testing.assert_array_equal(frozen, embedding)


@pytest.mark.parametrize("tied", [True, False])
def test_new_rows_begin_as_the_mean_of_the_number_form(tied, source, rows, tmp_path):
    """On every mesh; the source's rows are kept, and rows without a token are zero."""
    about = describe(source, template="llama3")
    raw = json.loads((source / "config.json").read_text()) | {"tie_word_embeddings": tied}
    folder = tmp_path / "model"
    shutil.copytree(source, folder)
    write_folder(folder, raw, tensors := random_tensors(raw))
    (folder / "tokenizer.model").unlink()
    known, tokenizer = about.tokenizer.vocab_size, about.tokenizer
    e, found, renderer = resolve_model(recipe(rows, folder, "tokens"))
    assert e.model.vocab_size == -(-(known + len(TOKENS)) // 128) * 128
    expected = {}
    for name, theirs in (("llama/embedding", "model.embed_tokens.weight"), ("lm_head", "lm_head.weight")):
        if theirs in tensors:
            rows_of = tensors[theirs]
            means = [rows_of[tokenizer.encode(t[1:-1], continuation=True)].mean(0) for t in TOKENS]
            expected[name] = np.zeros((e.model.vocab_size, rows_of.shape[1]), np.float32)
            expected[name][: known + len(TOKENS)] = np.concatenate([rows_of, means])
    assert len(expected) == 2 - tied
    assert plannable(recipe(rows, folder, "tokens"), 8).model.vocab_size == e.model.vocab_size
    for mesh in (MeshConfig(), MeshConfig(data=2, fsdp=2, tensor=2)):
        module = build_module("chat", e.model.architecture(), Compute(), 0, HeadConfig())
        whole = abstract_parameters(module, make_mesh(mesh))
        params, _ = initial_parameters(found, module, whole, (), 0, new_tokens(renderer, found))
        np.testing.assert_allclose(params["llama"]["embedding"], expected["llama/embedding"], rtol=1e-6)
        if not tied:
            np.testing.assert_allclose(params["lm_head"], expected["lm_head"].T, rtol=1e-6)


@pytest.mark.parametrize(
    ("groups", "key"),
    [
        ({"model": {"lora": {"rank": 2}}}, "config.model.lora.rank"),
        ({"optimizer": {"frozen_layers": 1}}, "config.optimizer.frozen_layers"),
        ({"optimizer": {"frozen": ("embed",)}}, "config.optimizer.frozen"),
    ],
)
def test_new_tokens_are_trained(groups, key, source, rows, tmp_path):
    with refused(ConfigError, "tokens", "9", key, cure="words"):
        train(recipe(rows, source, "tokens", **groups), tmp_path / "run")
    assert not (tmp_path / "run" / "config.json").exists()


def test_where_there_is_no_place_for_tokens(source, rows, tmp_path):
    with refused(ModelError, "SentencePiece", cure="words"):
        train(recipe(rows, "random", "tokens"), tmp_path / "run")
    with refused(ConfigError, "config.chat.labels", "words", cure="auto"):
        recipe(rows, source, "words", "regression")
    with refused(ConfigError, "essay", "10", cure="numbers"):
        recipe(rows, source, "words", data={"attributes": (("essay", 0, 9),)})
    with refused(ConfigError, "config.model.vocab_size", "300"):
        small = {"tokenizer": str(source / "tokenizer.json")}
        train(recipe(rows, "random", "tokens", chat=small, model={"vocab_size": 300}), tmp_path / "run")


def test_a_sources_form_meets_other_attributes():
    """A reward model has no label line, so any attribute."""
    wide, words = Schema((Attribute("essay", 0, 9),)), replace(TEMPLATES["chatml"], labels="words")
    chat = ChatConfig(tokenizer="embedded", template="chatml")
    with refused(ConfigError, "essay", "10", cure="numbers"):
        make_renderer(chat, wide, words)
    assert make_renderer(replace(chat, labels="numbers"), wide, words).template == TEMPLATES["chatml"]
    for form in ("words", "tokens"):
        renderer = make_renderer(chat, wide, replace(words, labels=form), "reward")
        assert renderer.tokenizer.hash == load_tokenizer("embedded").hash


@pytest.mark.slow
def test_a_random_model_on_a_mesh(source, rows, tmp_path):
    """The embedding is cut although the tokens are an odd number."""
    chat, mesh = {"tokenizer": str(source / "tokenizer.json")}, {"fsdp": 4, "tensor": 2}
    model = {"hidden_size": 32, "intermediate_size": 48, "num_layers": 1, "num_heads": 4, "num_kv_heads": 2}
    train(recipe(rows, "random", "tokens", chat=chat, mesh=mesh, model=model, steps=1), tmp_path)
    about = describe(tmp_path)
    assert about.tokenizer.special_strings >= {*TOKENS}
    assert about.model.vocab_size % 128 == 0
