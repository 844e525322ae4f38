"""What the page shows for copying: the same question as a shell command, and in Python."""

import json
import os
import shlex
from dataclasses import dataclass

from steerjax.inference.steering import Sampling, Setting


@dataclass(frozen=True)
class Target:
    """Where calls go. `model`: the folder, or the name that the server knows; `url` ends in /v1, None without one."""

    model: str
    url: str | None = None

    @property
    def address(self) -> str:
        """Without a server, where an export would be served."""
        return self.url or "http://localhost:8000/v1"


def messages_of(prompt: str, system: str) -> list[dict[str, str]]:
    """A system text that is empty is none."""
    given = [{"role": "system", "content": system}] if system else []
    return [*given, {"role": "user", "content": prompt}]


def curl_call(target: Target, prompt: str, system: str, setting: Setting, sampling: Sampling) -> str:
    """To an OpenAI-compatible server of the exported model. A key is named by its variable, never written out."""
    body = {
        "model": target.model, "messages": messages_of(prompt, system), "max_tokens": sampling.max_new_tokens,
        "temperature": sampling.temperature, "chat_template_kwargs": {"attributes": dict(setting)},
    }  # fmt: skip
    key = ['-H "Authorization: Bearer $OPENAI_API_KEY"'] if os.environ.get("OPENAI_API_KEY", "").strip() else []
    parts = [
        f"curl {shlex.quote(target.address + '/chat/completions')}",
        "-H 'Content-Type: application/json'",
        *key,
        "-d " + shlex.quote(json.dumps(body, ensure_ascii=False)),
    ]
    return " \\\n  ".join(parts)


def python_call(target: Target, prompt: str, system: str, setting: Setting, sampling: Sampling) -> str:
    """With steerjax's own API: the model itself, or the server that answers here."""
    opened = f"load({target.model!r})" if target.url is None else f"connect({target.url!r}, model={target.model!r})"
    asked = messages_of(prompt, system) if system else prompt
    lines = [
        "import steerjax", "",
        f"model = steerjax.{opened}",
        "answer = model.generate(",
        f"    {asked!r},",
        f"    attributes={dict(setting)!r},",
        f"    temperature={sampling.temperature!r},",
        f"    max_new_tokens={sampling.max_new_tokens!r},",
        ")",
        "print(answer)",
    ]  # fmt: skip
    return "\n".join(lines)
