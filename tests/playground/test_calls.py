"""The calls for copying do what the page does: run, they send the same question."""

import ast
import json
import shutil
import subprocess
from types import SimpleNamespace

import pytest

import steerjax
from steerjax.data.conversation import Conversation, Turn
from steerjax.inference.server import Server
from steerjax.inference.steering import Sampling
from steerjax.playground.calls import Target, curl_call, python_call
from steerjax.schema import HELPSTEER
from tests.inference.test_server import fake  # noqa: F401 - a fixture

SETTING = {"helpfulness": 4, "verbosity": None}
SAMPLING = Sampling(temperature=0.5, max_new_tokens=9)
TRICKY = [
    ("Why is the sky blue?", ""),
    ("It's $HOME `id` \"here\" \\n\nnew line, é, 🙂 </script>'; exit 1; '", "Be 'kind'"),
    ("@/etc/passwd", ""),
]


@pytest.mark.parametrize(("prompt", "system"), TRICKY)
def test_curl_sends_what_the_page_asks(fake, prompt, system):  # noqa: F811
    if not shutil.which("curl"):
        pytest.skip("curl is not here")
    server = Server(fake.url, None, HELPSTEER, SAMPLING)
    call = curl_call(Target(server.model, server.url), prompt, system, SETTING, SAMPLING)
    ran = subprocess.run(["bash", "-c", call], capture_output=True, timeout=60, check=True)
    assert json.loads(ran.stdout)["choices"]
    conversation = Conversation((Turn("user", prompt),), system or None)
    list(server.stream(server.prepare(conversation, [SETTING], 1)))
    by_curl, by_page = fake.bodies
    assert by_curl == {key: by_page[key] for key in by_curl}
    assert by_curl["chat_template_kwargs"]["attributes"] == SETTING


def test_curl_names_the_key_and_does_not_show_it(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    call = curl_call(Target("m", "http://x/v1"), "q", "", SETTING, SAMPLING)
    assert "secret" not in call
    assert "$OPENAI_API_KEY" in call


@pytest.mark.parametrize(("prompt", "system"), TRICKY)
@pytest.mark.parametrize("url", [None, "http://127.0.0.1:1/v1"])
def test_python_is_the_same_question(monkeypatch, capsys, prompt, system, url):
    asked = {}

    def generate(prompt, **options):
        asked.update(options, prompt=prompt)
        return "the answer"

    def opened(*arguments, **options):
        asked["opened"] = (*arguments, *options.values())
        return SimpleNamespace(generate=generate)

    monkeypatch.setattr(steerjax, "load" if url is None else "connect", opened, raising=False)
    text = python_call(Target("runs/it's", url), prompt, system, SETTING, SAMPLING)
    exec(compile(ast.parse(text), "call", "exec"), {})
    assert asked["opened"] == (("runs/it's",) if url is None else (url, "runs/it's"))
    assert (asked["attributes"], asked["temperature"], asked["max_new_tokens"]) == (SETTING, 0.5, 9)
    given = asked["prompt"] if system else [{"role": "user", "content": asked["prompt"]}]
    assert given[-1] == {"role": "user", "content": prompt}
    assert [m["content"] for m in given[:-1]] == ([system] if system else [])
    assert capsys.readouterr().out == "the answer\n"
