"""Stock vLLM serves what we export: our tokens, our scores, our answers, without an option of ours."""

import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from steerjax.chat.render import Renderer
from steerjax.chat.templates import TEMPLATES
from steerjax.chat.tokenizer import load_tokenizer
from steerjax.data.conversation import Conversation, Turn
from steerjax.data.loading import load_conversations, split_by_prompt
from steerjax.models.families import FAMILIES
from steerjax.schema import HELPSTEER, parse_scalar
from tests.hf.serving import as_messages
from tests.reward_models import read_rows, write_rows
from tests.serving.snippets import run as run_block
from tests.serving.vllm_server import environment, python, serving

pytestmark = [pytest.mark.vllm, pytest.mark.smollm2, pytest.mark.parity]

# All 50 with STEERJAX_CONVERSATIONS=50; the default keeps the run short.
CONVERSATIONS = int(os.environ.get("STEERJAX_CONVERSATIONS", "10"))
DEFAULTS = {"helpfulness": 4, "correctness": 4, "coherence": 4, "complexity": 2, "verbosity": 2}
NEW_TOKENS = 48


def steerjax(name: str, *arguments: object, repository: Path) -> None:
    """A command of ours, on one device."""
    command = [sys.executable, "-m", f"steerjax.{name}", *map(str, arguments)]
    subprocess.run(command, cwd=repository, env=os.environ | {"PYTHONPATH": str(repository)}, check=True)


@pytest.fixture(scope="module")
def smollm2() -> Path:
    python()
    return Path(os.environ.get("STEERJAX_SMOLLM2") or pytest.skip("STEERJAX_SMOLLM2 is not set"))


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    """What vLLM compiles once."""
    return tmp_path_factory.mktemp("vllm")


@pytest.fixture(scope="module")
def renderer(smollm2) -> Renderer:
    return Renderer(load_tokenizer(smollm2), TEMPLATES["chatml"], HELPSTEER)


# --- A reward model.


@pytest.fixture(scope="module")
def halves(renderer) -> tuple[list[Conversation], list[Conversation]]:
    """Real rows: 40 short ones to train on, and of other prompts the 50 with the fewest tokens, or some of these."""
    rows = load_conversations(("embedded:helpsteer",), HELPSTEER).conversations
    train, held_out = split_by_prompt(rows, 0.2, 0)
    train = sorted(train, key=lambda conversation: sum(len(turn.content) for turn in conversation.turns))
    held_out = sorted(held_out, key=lambda conversation: len(reward_ids(renderer, conversation)))[:50]
    return train[:40], held_out[:: len(held_out) // CONVERSATIONS][:CONVERSATIONS]


@pytest.fixture(scope="module")
def run(smollm2, halves, tmp_path_factory, repository) -> Path:
    """A run's folder: the recipe of `configs/rm_smollm2.py`, for a few steps."""
    folder = tmp_path_factory.mktemp("reward")
    data = write_rows(folder / "train.jsonl", halves[0])
    settings = {
        "data.train": f"('{data}',)", "model.source": smollm2, "batch.rows": 1, "batch.row_length": 1024,
        "batch.micro_batches": 1, "optimizer.warmup_steps": 0, "train.steps": 4, "train.plots": False,
    }  # fmt: skip
    options = [f"--config.{key}={value}" for key, value in settings.items()]
    steerjax("train", "--config", "configs/rm_smollm2.py", *options, "--workdir", folder / "run", repository=repository)
    return folder / "run"


@pytest.fixture(scope="module")
def reward(run, repository) -> Path:
    steerjax("export", "--checkpoint", run, "--output", run.parent / "reward", repository=repository)
    return run.parent / "reward"


@pytest.fixture(scope="module")
def ids(renderer, halves) -> list[list[int]]:
    """Our tokens of the held-out conversations."""
    return [reward_ids(renderer, conversation) for conversation in halves[1]]


def reward_ids(renderer: Renderer, conversation: Conversation) -> list[int]:
    """Token ids of the text whose reward is that of the last turn."""
    return renderer.reward_tokens(conversation, len(conversation.turns) - 1)[0].tolist()


@pytest.fixture(scope="module")
def messages(halves) -> list[list[dict]]:
    return [as_messages(conversation) for conversation in halves[1]]


@pytest.fixture(scope="module")
def scores(reward, halves, repository) -> np.ndarray:
    return scored(reward, halves[1], repository)


def scored(model: Path, conversations: list[Conversation], repository: Path) -> np.ndarray:
    """Our own: `steerjax.annotate`."""
    folder = model.parent
    given, output = write_rows(folder / "held_out.jsonl", conversations), folder / f"{model.name}.jsonl"
    steerjax("annotate", "--model", model, "--input", given, "--output", output, repository=repository)
    ratings = [row["turns"][-1]["predicted_ratings"] for row in read_rows(output)]
    return np.array([[rating[name] for name in HELPSTEER.names] for rating in ratings])


def assert_same(found, scores: np.ndarray, what: str, tolerance: float = 1e-3) -> None:
    largest = np.abs(np.array(found) - scores).max()
    print(f"{what}: largest difference {largest:.2g} of {len(scores)} conversations")
    assert largest < tolerance


def test_the_run_scores_as_its_export(run, halves, scores, repository):
    """The ratings differ from each other by much more than the tolerance."""
    assert_same(scored(run, halves[1], repository), scores, "the run")
    assert scores.std(axis=0).min() > 0.02


def test_transformers_scores(reward, messages, ids, scores):
    """One by one, and in padded batches."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(reward)
    model = AutoModelForSequenceClassification.from_pretrained(reward)
    assert [model.config.id2label[i] for i in range(model.config.num_labels)] == list(HELPSTEER.names)
    one_by_one, batches = [], []
    with torch.no_grad():
        for conversation in messages:
            inputs = tokenizer.apply_chat_template(conversation, return_tensors="pt", return_dict=True)
            assert inputs["input_ids"][0].tolist() == ids[len(one_by_one)]
            one_by_one += model(**inputs).logits.tolist()
        for start in range(0, len(messages), 5):
            batch = messages[start : start + 5]
            inputs = tokenizer.apply_chat_template(batch, padding=True, return_tensors="pt", return_dict=True)
            batches += model(**inputs).logits.tolist()
    assert_same(one_by_one, scores, "transformers")
    assert_same(batches, scores, "transformers, padded")


def test_llm_classify(reward, ids, messages, scores, cache, tmp_path):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(reward)
    texts = [tokenizer.apply_chat_template(conversation, tokenize=False) for conversation in messages]
    (tmp_path / "cases.json").write_text(json.dumps({"ids": ids, "texts": texts}))
    script = Path(__file__).with_name("vllm_classify.py")
    arguments = [python(), script, reward, tmp_path / "cases.json", tmp_path / "found.json"]
    subprocess.run(arguments, env=environment(cache), check=True, cwd=tmp_path)
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["ids"] == ids
    assert_same(found["by_ids"], scores, "LLM.classify, token ids")
    assert_same(found["by_text"], scores, "LLM.classify, text")


def small(family: str, tokenizer: Path, folder: Path, repository: Path) -> Path:
    """A random classifier as transformers saves it, of sizes that vLLM's attention takes; exported by us."""
    import torch
    import transformers

    prefix = FAMILIES[family].prefix
    sizes = {
        "vocab_size": load_tokenizer(tokenizer).vocab_size, "hidden_size": 128, "intermediate_size": 256,
        "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 2048,
        "id2label": dict(enumerate(HELPSTEER.names)), "pad_token_id": 0, "initializer_range": 0.06,
    }  # fmt: skip
    torch.manual_seed(0)
    config = getattr(transformers, prefix + "Config")(**sizes)
    getattr(transformers, prefix + "ForSequenceClassification")(config).save_pretrained(folder / "base")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(tokenizer / name, folder / "base" / name)
    about = {"kind": "reward", "template": "chatml", "attributes": HELPSTEER.to_json()}
    (folder / "base" / "steerjax.json").write_text(json.dumps(about))
    export = ["--checkpoint", folder / "base", "--output", folder / family, "--template", "chatml"]
    steerjax("export", *export, repository=repository)
    return folder / family


@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "llama"])
def test_other_families_classify(family, smollm2, halves, ids, cache, tmp_path, repository):
    """By token ids: transformers gives a Qwen 2 folder Qwen's own tokenizer, and this one has SmolLM2's."""
    model = small(family, smollm2, tmp_path, repository)
    expected = scored(model, halves[1], repository)
    assert expected.std(axis=0).min() > 0.1
    with serving(model, cache, "--runner", "pooling", "--enforce-eager") as server:
        replies = [server.post("/classify", input=tokens)["data"][0] for tokens in ids]
    assert_same([reply["probs"] for reply in replies], expected, f"/classify, {family}", 1e-4)


def test_the_server_classifies(reward, ids, messages, scores, cache, tmp_path, monkeypatch):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(reward)
    texts = [tokenizer.apply_chat_template(conversation, tokenize=False) for conversation in messages]
    with serving(reward, cache, "--runner", "pooling") as server:
        reply = server.post("/classify", input=texts)
        assert reply["usage"]["prompt_tokens"] == sum(map(len, ids))
        ordered = sorted(reply["data"], key=lambda entry: entry["index"])
        assert_same([entry["probs"] for entry in ordered], scores, "/classify, text")
        replies = [server.post("/classify", messages=conversation)["data"][0] for conversation in messages]
        assert_same([entry["probs"] for entry in replies], scores, "/classify, messages")
        (tmp_path / "rm").symlink_to(reward)
        monkeypatch.chdir(tmp_path)
        rate = run_block("classify.py", {"http://localhost:8000": server.url})["rate"]  # of docs/serving.md
        found = [rate(conversation) for conversation in messages]
        assert_same([[ratings[name] for name in HELPSTEER.names] for ratings in found], scores, "classify.py")
        assert "nothing to rate" in server.refusal("/classify", messages=messages[0][:1])
        spelled = [{"role": "user", "content": "a<|im_end|>"}, {"role": "assistant", "content": "b"}]
        assert len(server.post("/classify", messages=spelled)["data"]) == 1  # text, as any other


@pytest.fixture(scope="module")
def one_score(run, repository) -> Path:
    folder = run.parent / "one-score"
    steerjax("export", "--checkpoint", run, "--output", folder, "--scalar", "goodness", repository=repository)
    return folder


def test_the_server_classifies_with_one_score(one_score, messages, scores, cache):
    """The score itself: a server would put a lone label through a sigmoid, did the folder not say `regression`."""
    weights = parse_scalar("goodness", HELPSTEER)[1]
    expected = scores @ [weights.get(name, 0.0) for name in HELPSTEER.names]
    assert expected.std() > 0.02
    with serving(one_score, cache, "--runner", "pooling", "--enforce-eager") as server:
        replies = [server.post("/classify", messages=conversation)["data"][0] for conversation in messages]
    assert [reply["num_classes"] for reply in replies] == [1] * len(messages)
    assert_same([reply["probs"] for reply in replies], expected[:, None], "/classify, one score", 1e-4)


# --- A chat model.


@pytest.fixture(scope="module")
def chat(smollm2, tmp_path_factory, repository) -> Path:
    """SmolLM2 as it is, with our template."""
    folder = tmp_path_factory.mktemp("chat") / "chat"
    ratings = ",".join(f"{name}={rating}" for name, rating in DEFAULTS.items())
    options = ["--template", "chatml", "--schema", "helpsteer", "--default-ratings", ratings]
    steerjax("export", "--checkpoint", smollm2, *options, "--output", folder, repository=repository)
    return folder


@pytest.fixture(scope="module")
def chat_server(chat, cache):
    with serving(chat, cache, "--enforce-eager", "--max-model-len", "1024") as server:
        yield server


def talks() -> list[Conversation]:
    """Eight that end with a user turn; one with a system text, one with an answer that has ratings."""
    questions = [
        "What is the capital of France?", "Write two sentences about rain.", "List three prime numbers.",
        "How do I boil an egg?", "Translate 'good morning' into Spanish.", "Why is the sky blue?",
    ]  # fmt: skip
    history = (Turn("user", "Name a fruit."), Turn("assistant", "An apple.", {"verbosity": 1.0, "helpfulness": 3.0}))
    return [
        *(Conversation((Turn("user", question),)) for question in questions),
        Conversation((Turn("user", "Name a colour."),), system="Answer in one word."),
        Conversation((*history, Turn("user", "And a larger one?"))),
    ]


def request_of(conversation: Conversation, asked: dict | None) -> dict:
    """What a client sends; ratings of earlier answers apart from the messages."""
    given = {"attributes": asked} if asked is not None else {}
    ratings = [None] * (conversation.system is not None) + [turn.ratings for turn in conversation.turns]
    given |= {"message_attributes": ratings} if any(ratings) else {}
    return {"messages": as_messages(conversation)} | ({"chat_template_kwargs": given} if given else {})


@pytest.mark.parametrize("asked", [None, {"verbosity": 1}, {"complexity": 3.5}, dict.fromkeys(DEFAULTS)])
def test_the_servers_tokens_are_ours(asked, chat_server, chat, renderer):
    label = {name: rating for name, rating in (DEFAULTS | (asked or {})).items() if rating is not None}
    for conversation in talks():
        history = [turn.ratings for turn in conversation.turns]
        expected = renderer.render(conversation, history, generation_prompt=True, generation_label=label or None)
        found = chat_server.post("/tokenize", model=str(chat), **request_of(conversation, asked))
        assert found["tokens"] == expected.tokens.tolist()


def test_what_the_template_refuses(chat_server, chat):
    (conversation, *_), path = talks(), "/v1/chat/completions"
    for asked, message in (
        ({"humor": 1}, "attributes: unknown attribute 'humor'; use helpfulness, correctness, coherence, complexity, "),
        ({"verbosity": 9}, "attributes: rating 9 of 'verbosity' is outside 0..4"),
        ("verbosity=1", "attributes: expected a mapping of attribute to number"),
    ):
        body = request_of(conversation, asked)
        assert message in chat_server.refusal(path, model=str(chat), max_tokens=1, **body)


@pytest.fixture(scope="module")
def answers(chat, repository) -> list[dict]:
    """Ours: `steerjax.generate`, greedy, each question asked for short and for long."""
    return generated(chat, "local", repository, "--model", chat)


def generated(chat: Path, name: str, repository: Path, *options: object) -> list[dict]:
    given, output = write_rows(chat.parent / "questions.jsonl", talks()), chat.parent / f"{name}.jsonl"
    options = (*options, "--sweep", "verbosity=0,4", "--max-new-tokens", NEW_TOKENS, "--batch-size", 16)
    steerjax("generate", *options, "--input", given, "--output", output, repository=repository)
    return read_rows(output)


def test_greedy_answers(chat_server, chat, answers):
    """What any client gets is what our decoder says, token for token as far as the text and their number tell."""

    def ask(index: int) -> dict:
        body = request_of(talks()[index // 2], {"verbosity": (0, 4)[index % 2]})
        path = "/v1/chat/completions"
        return chat_server.post(path, model=str(chat), temperature=0, max_tokens=NEW_TOKENS, **body)

    with ThreadPoolExecutor(len(answers)) as pool:
        replies = list(pool.map(ask, range(len(answers))))
    for reply, answer in zip(replies, answers, strict=True):
        choice, said = reply["choices"][0], answer["generation"]
        assert choice["message"]["content"].strip() == answer["turns"][-1]["content"]
        assert (choice["finish_reason"], reply["usage"]["completion_tokens"]) == (said["finish"], said["tokens"])
    assert {answer["generation"]["finish"] for answer in answers} == {"stop", "length"}


@pytest.mark.parametrize("knowing", [False, True])
def test_generate_with_a_server(knowing, chat_server, chat, answers, repository):
    """--server, without and with the folder of what it serves, is the same as the model at hand."""
    options = ("--server", chat_server.url, *(("--model", chat) if knowing else ()))
    served = generated(chat, f"served-{knowing}", repository, *options)
    for ours, theirs in zip(answers, served, strict=True):
        assert {**theirs, "generation": None} == {**ours, "generation": None}
        said = {key: ours["generation"][key] for key in ("finish", "tokens", "sampling")}
        assert said.items() <= theirs["generation"].items()
