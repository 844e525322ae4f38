"""The Python interface: the same ratings and answers as the commands, and errors that cure."""

import json
import pydoc
import subprocess
import sys
import threading

import pytest

import steerjax
from steerjax import annotate, generate
from steerjax.config import default_config
from steerjax.errors import ConfigError, DataError, ModelError
from tests.inference.test_server import FakeServer
from tests.refusals import refused
from tests.reward_models import chat_folder, read_rows, reward_folder, some_conversations, write_rows

SHORT = {"max_new_tokens": 8}


@pytest.fixture(scope="module")
def reward(tmp_path_factory):
    return reward_folder(tmp_path_factory.mktemp("api") / "reward")


@pytest.fixture(scope="module")
def rm(reward):
    return steerjax.load(reward, template="extra_id")


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory):
    return chat_folder(tmp_path_factory.mktemp("api") / "chat")


@pytest.fixture(scope="module")
def chat(chat_model):
    return steerjax.load(chat_model, template="extra_id")


def messages(conversation):
    return [{"role": turn.role, "content": turn.content} for turn in conversation.turns]


def test_ratings_are_those_of_annotate(reward, rm, tmp_path):
    rows = write_rows(tmp_path / "rows.jsonl", conversations := some_conversations(4, longest=12))
    annotate.main(["--model", str(reward), "--template", "extra_id", "--input", str(rows), "--turns", "last",
                   "--output", str(tmp_path / "out.jsonl")])  # fmt: skip
    for conversation, row in zip(conversations, read_rows(tmp_path / "out.jsonl"), strict=True):
        *before, last = messages(conversation)
        found = rm.rate(before, last["content"])
        assert found == pytest.approx(row["turns"][-1]["predicted_ratings"], abs=1e-5)
        assert rm.rate(before, [last["content"]]) == [pytest.approx(found, abs=1e-5)]
    assert rm.kind == "reward"
    assert rm.schema.names == tuple(found)
    assert "helpfulness" in repr(rm)


def test_answers_are_those_of_generate(chat_model, chat, tmp_path):
    rows = write_rows(tmp_path / "rows.jsonl", [{"prompt": f"Question {i}?"} for i in range(3)])
    generate.main(["--model", str(chat_model), "--template", "extra_id", "--schema", "helpsteer", "--input", str(rows),
                   "--output", str(tmp_path / "out.jsonl"), "--attributes", "verbosity=1",
                   "--max-new-tokens", "8"])  # fmt: skip
    expected = [row["turns"][-1]["content"] for row in read_rows(tmp_path / "out.jsonl")]
    prompts = [f"Question {i}?" for i in range(3)]
    assert chat.generate(prompts, {"verbosity": 1}, **SHORT) == expected
    assert chat.generate(prompts[1], {"verbosity": 1}, **SHORT) == expected[1]
    as_messages = [{"role": "system", "content": "Be."}, {"role": "user", "content": "Question 1?"}]
    assert isinstance(chat.generate(as_messages, **SHORT), str)
    assert "".join(chat.stream(prompts[1], {"verbosity": 1}, **SHORT)) == expected[1]


def test_samples_and_seeds(chat):
    first, second = (chat.generate("Why?", samples=3, seed=seed, **SHORT) for seed in (0, 1))
    assert len(first) == len(set(first)) == 3
    assert first != second
    assert chat.generate("Why?", samples=3, seed=0, **SHORT) == first
    assert [len(each) for each in chat.generate(["Why?", "How?"], samples=2, **SHORT)] == [2, 2]
    assert chat.generate([], **SHORT) == []


def test_a_server_answers_too():
    server = FakeServer()
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        served = steerjax.connect(server.url)
        assert served.generate("Why?", {"verbosity": 1}, **SHORT) == '{"verbosity": 1} 0'
        assert server.bodies[-1]["chat_template_kwargs"]["attributes"] == {"verbosity": 1}
        assert "".join(served.stream("Why?", {"verbosity": 1}, **SHORT)) == '{"verbosity": 1}'
    finally:
        server.shutdown()
        server.server_close()


def test_training_resumes_and_says_its_metrics(tmp_path):
    rows = write_rows(tmp_path / "rows.jsonl", [
        {"prompt": f"Q{i}?", "response": "word " * (i % 5 + 1), "helpfulness": i % 5} for i in range(40)
    ])  # fmt: skip
    config = default_config()
    config.data.train = (str(rows),)
    config.model.update(hidden_size=32, intermediate_size=64, num_layers=1, num_heads=2, num_kv_heads=2)
    config.batch.update(rows=8, row_length=128)
    config.optimizer.warmup_steps = 0
    config.train.update(steps=2, plots=False)
    found = steerjax.fit(config, tmp_path / "run")["regression"]
    assert found["attributes/helpfulness/mse"] > 0
    assert steerjax.fit(config, tmp_path / "run")["regression"] == pytest.approx(found)
    assert steerjax.load(tmp_path / "run").schema.names == ("helpfulness",)


@pytest.mark.short
def test_a_recipe_is_a_config_of_its_own(repository):
    config = steerjax.recipe("rm")
    assert config == steerjax.recipe(str(repository / "configs" / "rm.py")) != default_config()
    config.train.steps = 1
    assert steerjax.recipe("rm").train.steps > 1


@pytest.mark.short
def test_what_cannot_be_asked_for(rm, chat, tmp_path):
    for call, error, fact, cure in (
        (lambda: steerjax.load(tmp_path), ModelError, str(tmp_path), "workdir"),
        (
            lambda: steerjax.load(chat.name, template="extra_id", schema="helpster"),
            ConfigError,
            "helpster",
            "helpsteer",
        ),
        (lambda: rm.generate("Why?"), ModelError, "reward", "chat model"),
        (lambda: chat.rate("Why?", "So."), ModelError, "chat", "reward model"),
        (lambda: rm.rate("Why? " * 3000, "So."), DataError, "tokens", "shorter"),
        (lambda: rm.rate([{"role": "user"}], "So."), DataError, "[0]", "content"),
        (lambda: rm.rate([], "So."), DataError, "prompt", "user"),
        (lambda: chat.generate([{"role": "assistant", "content": "Hi"}]), DataError, "prompt", "user"),
        (lambda: chat.generate("Why?", {"humour": 1}), DataError, "humour", "helpfulness"),
        (lambda: chat.generate("Why?", {"verbosity": 7}), DataError, "verbosity", "4"),
        (lambda: chat.generate("Why?", samples=0), ConfigError, "samples", "at least 1"),
        (lambda: chat.generate("Why?", top_p=2.0), ConfigError, "top_p", "1"),
        (lambda: steerjax.fit({"data": {"trian": 1}}, tmp_path), ConfigError, "config.data.trian", "train"),
        (lambda: steerjax.recipe("nope"), ConfigError, "nope", "rm_smollm2"),
        (lambda: steerjax.recipe(__file__), ConfigError, __file__, "get_config"),
    ):
        with refused(error, fact, cure=cure):
            call()


@pytest.mark.short
def test_importing_is_light_and_help_is_a_page():
    code = "import steerjax, sys; print([m for m in ('jax', 'numpy', 'pydantic', 'datasets') if m in sys.modules])"
    assert json.loads(subprocess.check_output([sys.executable, "-c", code]).decode().replace("'", '"')) == []
    page = pydoc.plain(pydoc.render_doc(steerjax))
    said = ("steerjax.load(", "rate(", "generate(", "stream(", "connect(", "recipe(", "fit(", "Raises SteerjaxError")
    assert [word for word in said if word not in page] == []
