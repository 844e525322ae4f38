"""The Python blocks of docs/serving.md. A block is named by its first line, `# NAME.py`."""

import re

from tests.conftest import REPOSITORY

_BLOCK = re.compile(r"^```python\n# (\S+\.py)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def snippets() -> dict[str, str]:
    return dict(_BLOCK.findall((REPOSITORY / "docs" / "serving.md").read_text(encoding="utf-8")))


def changed(name: str, changes: dict[str, str]) -> str:
    """A block with other texts in place of some of its own: a shorter run, another port."""
    code = snippets()[name]
    for old, new in changes.items():
        assert old in code
        code = code.replace(old, new)
    return code


def run(name: str, changes: dict[str, str] | None = None) -> dict:
    """Executes a block in the working directory; returns what it defines."""
    defined = {"__name__": name}
    exec(compile(changed(name, changes or {}), name, "exec"), defined)
    return defined
