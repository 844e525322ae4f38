"""The Python blocks of docs/serving.md run, and give our own ratings and answers. vLLM's: `test_vllm.py`."""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

import steerjax
from steerjax import export
from steerjax.schema import HELPSTEER, parse_scalar
from tests.reward_models import chat_folder, reward_folder, write_rows
from tests.serving.snippets import changed, run, snippets

MESSAGES = [{"role": "user", "content": "Hi"}]
GOODNESS = parse_scalar("goodness", HELPSTEER)[1]


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A folder with the files that the blocks open: `rm`, `chat` and `prompts.jsonl`."""
    folder = tmp_path_factory.mktemp("serving")
    template = ["--template", "extra_id"]
    ratings = ",".join(f"{name}=2" for name in HELPSTEER.names)
    reward = reward_folder(folder / "reward")
    about = {"kind": "reward", "template": "extra_id", "attributes": HELPSTEER.to_json()}
    (reward / "steerjax.json").write_text(json.dumps(about))
    export.main(["--checkpoint", str(reward), "--output", str(folder / "rm"), *template])
    chat = chat_folder(folder / "base")
    export.main(
        ["--checkpoint", str(reward), "--output", str(folder / "rm-goodness"), "--scalar", "goodness", *template]
    )
    steered = ["--schema", "helpsteer", "--default-ratings", ratings]
    export.main(["--checkpoint", str(chat), "--output", str(folder / "chat"), *steered, *template])
    prompts = [{"prompt": [{"role": "user", "content": f"Question {number}?"}]} for number in range(4)]
    write_rows(folder / "prompts.jsonl", prompts)
    return folder


@pytest.fixture(scope="module")
def rm(work):
    return steerjax.load(work / "rm")


@pytest.fixture(autouse=True)
def inside(work, monkeypatch):
    monkeypatch.chdir(work)


def test_every_block_is_tried():
    assert set(snippets()) == {"classify.py", "rate.py", "answer.py", "best.py", "grpo.py", "get_reward.py"}


@pytest.mark.parity
def test_transformers_rates(rm):
    assert run("rate.py")["ratings"] == pytest.approx(rm.rate("Hi", "Hello!"), abs=1e-4)


@pytest.mark.parity
def test_transformers_answers(work):
    chat = steerjax.load(work / "chat")
    answer = run("answer.py", {"max_new_tokens=256": "max_new_tokens=12"})["answer"]
    assert answer == chat.generate("Why is the sky blue?", {"verbosity": 1}, max_new_tokens=12)
    assert answer != chat.generate("Why is the sky blue?", {"verbosity": 4}, max_new_tokens=12)


def test_the_best_of_several_answers(rm):
    found = run("best.py", {"samples=8": "samples=3, max_new_tokens=8"})
    assert len(set(found["answers"])) == 3
    rated = rm.rate(found["prompt"], found["answers"])
    assert found["best"] == max(zip(found["answers"], rated, strict=True), key=lambda pair: pair[1]["helpfulness"])[0]


@pytest.mark.parity
def test_one_reward_function_an_attribute_trains_with_trl(rm):
    short = {"max_steps=500": "max_steps=2, use_cpu=True, bf16=False, logging_steps=1", "length=512": "length=8"}
    beside = {"in WEIGHTS]": 'in WEIGHTS] + ["rm-goodness"]', "list(WEIGHTS.values())": "[*WEIGHTS.values(), 0.0]"}
    found = run("grpo.py", short | beside)
    first, second, _ = found["trainer"].state.log_history
    for log in (first, second):
        means = {name: log[f"rewards/{name}/mean"] for name in GOODNESS}
        goodness = sum(GOODNESS[name] * mean for name, mean in means.items())
        assert log["reward"] == pytest.approx(goodness, abs=1e-4)
        assert log["rewards/rm-goodness/mean"] == pytest.approx(goodness, abs=1e-4)  # one score, in torch
        assert log["reward_std"] > 0
    assert first["reward"] != second["reward"]

    prompts = [MESSAGES, MESSAGES, [{"role": "user", "content": "Why?"}]]
    texts = ["Hello!", "", "So."]
    completions = [[{"role": "assistant", "content": text}] for text in texts]
    for name in GOODNESS:
        expected = [rm.rate(prompt, text)[name] for prompt, text in zip(prompts, texts, strict=True)]
        assert found["reward_of"](name)(prompts=prompts, completions=completions) == pytest.approx(expected, abs=1e-4)
        assert np.std(expected) > 0.01
    assert found["rated"].cache_info().hits == 2 * (len(GOODNESS) - 1) + 2  # two steps and the last lines


# --- OpenRLHF's requests, as `openrlhf/utils/agent.py` of 0.11.2 posts and reads them.


@pytest.fixture(scope="module")
def reward_server(work):
    """The address of `get_reward.py`, which runs as a script."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    (work / "get_reward.py").write_text(changed("get_reward.py", {"5000": str(port)}))
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    process = subprocess.Popen([sys.executable, "get_reward.py"], cwd=work, env=environment, stderr=subprocess.PIPE)
    try:
        end = time.monotonic() + 120
        while process.poll() is None and time.monotonic() < end:
            try:
                socket.create_connection(("127.0.0.1", port), timeout=1).close()
                break
            except OSError:
                time.sleep(0.2)
        else:
            process.kill()
            pytest.fail(process.stderr.read().decode())
        yield f"http://127.0.0.1:{port}/get_reward"
    finally:
        process.terminate()
        process.communicate(timeout=30)


def asked_of(url, query, prompts, labels):
    body = json.dumps({"query": query, "prompts": prompts, "labels": labels}).encode()
    request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as reply:
        assert reply.headers["Content-Type"] == "application/json"  # or aiohttp's `json()` refuses it
        return json.load(reply)


PROMPT = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"  # of a policy with another template


def test_rewards_for_openrlhf(rm, reward_server):
    texts = ["Hello!", "No.", "Hello! How are you"]
    expected = rm.rate(MESSAGES, texts)
    query = [PROMPT + texts[0] + "<|im_end|>", PROMPT + texts[1] + "<|im_end|>", PROMPT + texts[2]]  # one is cut off
    found = asked_of(reward_server, query, [PROMPT] * 3, [MESSAGES] * 3)
    scores = [sum(GOODNESS[name] * ratings[name] for name in GOODNESS) for ratings in expected]
    assert found["rewards"] == found["scores"] == pytest.approx(scores, abs=1e-4)
    assert np.std(scores) > 0.01
    assert found["extra_logs"].keys() == set(HELPSTEER.names)
    for name, logged in found["extra_logs"].items():
        assert logged == pytest.approx([ratings[name] for ratings in expected], abs=1e-4)

    def one(number):
        """A rollout asks for its own reward, beside all others."""
        return asked_of(reward_server, [query[number % 3]], [PROMPT], [MESSAGES])["rewards"]

    with ThreadPoolExecutor(16) as pool:
        rewards = [*pool.map(one, range(48))]
    assert rewards == [[pytest.approx(scores[number % 3], abs=1e-4)] for number in range(48)]


def test_a_query_that_lost_its_prompt_has_no_reward(reward_server):
    with pytest.raises((urllib.error.URLError, ConnectionError, OSError)):
        asked_of(reward_server, ["a prompt without its beginning" + "Hello!"], [PROMPT], [MESSAGES])
