"""The pages hold: links lead somewhere, commands parse with their own parsers, Python names what there is."""

import argparse
import ast
import importlib
import inspect
import re
import shlex
import sys
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest
from absl import flags
from markdown_it import MarkdownIt

import steerjax
from steerjax.__main__ import COMMANDS
from steerjax.config import default_config, resolve
from tests.conftest import REPOSITORY

PAGES = [
    *(REPOSITORY / name for name in ("README.md", "launch/README.md")),
    *sorted((REPOSITORY / "docs").glob("*.md")),
    *sorted((REPOSITORY / "docs" / "notes").glob("*.md")),
]
every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPOSITORY)))
RECIPES = sorted((REPOSITORY / "configs").glob("*.py"))  # whose docstrings have commands
PLACEHOLDERS = {"SOURCE": "oasst", "NAME": "steerability"}  # of a synopsis, where only some words will do


def parse(page: Path) -> list:
    text = page.read_text(encoding="utf-8")
    if page.suffix == ".py":
        text = ast.get_docstring(ast.parse(text)) or ""
    return MarkdownIt("commonmark").enable("table").parse(text)


# ---- Links


def anchors(page: Path) -> set[str]:
    """Of a page's headings, as GitHub makes them."""
    found, tokens = Counter(), parse(page)
    anchors = set()
    for heading, line in pairwise(tokens):
        if heading.type == "heading_open":
            text = "".join(part.content for part in line.children if part.type in ("text", "code_inline"))
            slug = re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-")
            anchors.add(f"{slug}-{found[slug]}" if found[slug] else slug)
            found[slug] += 1
    return anchors


def targets(page: Path) -> list[str]:
    """Of links and pictures, in Markdown and HTML."""
    found = []
    for token in parse(page):
        for part in [token, *(token.children or ())]:
            if part.type in ("link_open", "image"):
                found.append(part.attrs.get("href") or part.attrs["src"])
            elif part.type in ("html_block", "html_inline"):
                found += re.findall(r'(?:href|src)="([^"]+)"', part.content)
    return found


def dead_links(page: Path) -> list[str]:
    found = []
    for target in targets(page):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        generated = file.is_relative_to(REPOSITORY / "docs" / "reference")  # which GitHub has not
        if generated or not file.exists() or (anchor and anchor not in anchors(file)):
            found.append(target)
    return found


@every_page
def test_links_lead_somewhere(page):
    assert dead_links(page) == []


# ---- Commands


class Parsed(BaseException):
    """What a command's own parser made of its arguments; nothing on the way catches it."""


def blocks(page: Path) -> list[tuple[str, str]]:
    """(language, text) of each block of code."""
    return [(t.info.strip(), t.content) for t in parse(page) if t.type in ("fence", "code_block")]


def commands(text: str) -> list[list[str]]:
    """The arguments of every `steerjax NAME ...` of a block, NAME first."""
    found = []
    for line in re.sub(r"\\\n", " ", text).splitlines():
        if not re.search(r"(^|[\s/])steerjax[. ]", line):
            continue
        words = shlex.shlex(line, posix=True, punctuation_chars="&|;<>")
        words.whitespace_split = True
        call: list[str] = []
        for word in [*words, ";"]:
            if set(word) <= set("&|;<>"):
                found.append(_arguments(call))
                call = []
            else:
                call.append(word)
    return [call for call in found if call]


def _arguments(call: list[str]) -> list[str]:
    words = [w.strip("[]") for w in call if w.strip("[]") not in ("...", "$")]
    for place, word in enumerate(words):
        if word.startswith("steerjax.") and words[place - 1] == "-m":
            return [word.removeprefix("steerjax."), *words[place + 1 :]]
        if Path(word).name == "steerjax" and words[place + 1 : place + 2]:
            return words[place + 1 :]
    return []


@pytest.fixture
def parsed(tmp_path, monkeypatch, capsys):
    """A function: a command's name and arguments -> what its own parser says against them, nothing where it takes
    them."""
    real = argparse.ArgumentParser.parse_args

    def parse_args(self, args=None, namespace=None):
        raise Parsed(real(self, args, namespace))

    def resolved(values):
        raise Parsed(resolve(values))

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("steerjax.config.resolve", resolved)
    monkeypatch.setattr("absl.app.run", lambda main, flags_parser: main(flags_parser(sys.argv)))

    def ask(name: str, arguments: list[str]) -> str:
        if name not in COMMANDS:
            return "" if name in ("--help", "--version") else f"there is no command {name}"
        if name == "collect" and "--" in arguments:
            rest = arguments[arguments.index("--") + 1 :]
            arguments = arguments[: arguments.index("--")]
            if said := ask("generate", ["--model", "x", "--input", "x", "--output", "x", *rest]):
                return said
        known = set(flags.FLAGS)
        monkeypatch.setattr(sys, "argv", [f"steerjax {name}", *arguments])
        with monkeypatch.context() as patch:
            patch.setattr(argparse.ArgumentParser, "parse_args", parse_args)
            try:
                importlib.import_module(f"steerjax.{name}").main()
            except Parsed:
                return ""
            except SystemExit as end:
                said = capsys.readouterr()
                return "" if not end.code else (said.err or said.out).strip() or "refused"
            finally:
                for flag in set(flags.FLAGS) - known:
                    delattr(flags.FLAGS, flag)
        return "nothing was parsed"

    return ask


def bad_commands(page: Path, ask, folder: Path) -> list[str]:
    found, recipe = [], ""
    for language, text in blocks(page):
        if language == "python" and "def get_config" in text:
            recipe = text
        if language not in ("", "sh", "bash", "console"):
            continue
        for name, *arguments in commands(text):
            arguments = [PLACEHOLDERS.get(word, word) for word in arguments]
            for file in re.findall(r"--config[= ](\S+\.py)\b", " ".join(arguments)):
                if recipe and not (REPOSITORY / file).exists():  # the last recipe that the page shows
                    (folder / file).write_text(recipe)
            if said := ask(name, arguments):
                found.append(f"steerjax {name} {shlex.join(arguments)}: {said}")
    return found


@pytest.mark.parametrize("page", [*PAGES, *RECIPES], ids=lambda page: str(page.relative_to(REPOSITORY)))
def test_commands_parse(page, parsed, tmp_path):
    assert bad_commands(page, parsed, tmp_path) == []


# ---- Python


def wrong_python(page: Path) -> list[str]:
    found, variables = [], {}
    for language, text in blocks(page):
        if language == "python":
            try:
                found += _wrong_names(ast.parse(text), variables)
                _run_recipe(text)
            except Exception as error:
                found.append(f"{type(error).__name__}: {error} in:\n{text}")
    return found


def _run_recipe(text: str) -> None:
    """A recipe, or lines that change one, makes a config that is valid."""
    if "def get_config" in text:
        names: dict = {}
        exec(text, names)
        resolve(names["get_config"]().to_dict())
    elif text.startswith("config."):
        config = default_config()
        exec(text, {"config": config})
        resolve(config.to_dict())


def _wrong_names(tree: ast.AST, variables: dict[str, type]) -> list[str]:
    """Names of steerjax that are not there, and calls that do not fit. `variables` are models, by name."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "steerjax":
            module = importlib.import_module(node.module)
            found += [f"{node.module}.{a.name}" for a in node.names if not hasattr(module, a.name)]
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Call):
            made = {"steerjax.load": steerjax.Model, "steerjax.connect": steerjax.ServedModel}
            if owner := made.get(ast.unparse(node.value.func)):
                variables |= {target.id: owner for target in node.targets if isinstance(target, ast.Name)}
    owners = {"steerjax": steerjax, **variables}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in owners:
            owner = owners[node.value.id]
            own = inspect.isclass(owner) and re.search(rf"self\.{node.attr}\b", inspect.getsource(owner))
            if not own and not hasattr(owner, node.attr):
                found.append(ast.unparse(node))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            owner = owners.get(ast.unparse(node.func.value))
            function = getattr(owner, node.func.attr, None)
            if callable(function):
                given = [None] * (len(node.args) + inspect.isclass(owner))
                try:
                    inspect.signature(function).bind(*given, **{k.arg: None for k in node.keywords if k.arg})
                except TypeError as error:
                    found.append(f"{ast.unparse(node)}: {error}")
    return found


@every_page
def test_python_names_what_there_is(page):
    assert wrong_python(page) == []


# ---- What is wrong is found


@pytest.fixture
def page_of(tmp_path):
    def write(text: str) -> Path:
        page = tmp_path / "page.md"
        page.write_text(f"# A page\n\n## `one` & two\n\n## One  two\n\n{text}\n")
        return page

    return write


@pytest.mark.parametrize(
    ("text", "dead"),
    [
        ("[x](nothing.md)", ["nothing.md"]),
        ("![x](nothing.png)", ["nothing.png"]),
        ('<img src="nothing.png">', ["nothing.png"]),
        ("[x](#three)", ["#three"]),
        ("[x](page.md#three)", ["page.md#three"]),
        ("[x](#one--two) [x](page.md#a-page) [x](https://nothing.example) `[x](nothing.md)`", []),
    ],
)
def test_dead_links_are_found(page_of, text, dead):
    assert dead_links(page_of(text)) == dead


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("steerjax nothing --model DIR", "no command"),
        ("steerjax annotate --model DIR --input FILE --output FILE --nothing", "--nothing"),
        ("steerjax annotate --model DIR --input FILE", "--output"),
        ("steerjax annotate --model DIR --input FILE --output FILE \\\n    --turns none", "none"),
        ("python -m steerjax.export --checkpoint DIR", "--output"),
        ("cd x && .venv/bin/steerjax generate --model DIR --nothing | cat", "--nothing"),
        ("steerjax evaluate --suite nothing --output DIR", "no such suite"),
        ("steerjax evaluate --suite attributes --model DIR --data FILE --output OUT --nothing", "--nothing"),
        ("steerjax collect tasks --answers FILE --output DIR -- --nothing 1", "--nothing"),
        ("steerjax collect tasks --answers FILE --nothing --output DIR", "--nothing"),
        ("steerjax train --config nothing --workdir DIR", "no such recipe"),
        ("steerjax train --config rm", "--workdir"),
        ("steerjax train --config rm --workdir DIR --nothing", "nothing"),
        ("steerjax train --config rm --workdir DIR --config.train.nothing=1", "nothing"),
        ("steerjax train --config rm --workdir DIR --config.train.epochs=-1", "config.train.epochs"),
        ("steerjax plan --config rm --topology v5e:4x4 --nothing", "nothing"),
        ("steerjax train --config rm --workdir DIR --config.train.epochs=2.0  # a comment --nothing", ""),
        ("steerjax plan --config rm --topology v5e:4x4 --nosearch", ""),
        ("steerjax merge A B --output DIR && steerjax export --checkpoint DIR --output OUT", ""),
        ("steerjax prepare SOURCE --input PATH [--input PATH ...] --output FILE", ""),
        ("steerjax evaluate --compare A B --output BOTH", ""),
        ("steerjax --version", ""),
    ],
)
def test_wrong_commands_are_found(page_of, parsed, tmp_path, text, wrong):
    found = bad_commands(page_of(f"```sh\n{text}\n```"), parsed, tmp_path)
    assert len(found) == bool(wrong), found
    assert wrong in "".join(found)


RECIPE = "from steerjax.config import default_config\n\n\ndef get_config():\n    config = default_config()\n"


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("def f(:", "SyntaxError"),
        ("from steerjax.config import nothing", "steerjax.config.nothing"),
        ("import steerjax\nsteerjax.nothing(1)", "steerjax.nothing"),
        ("rm = steerjax.load('x')\nrm.nothing", "rm.nothing"),
        ("rm = steerjax.load('x')\nrm.rate('x', 'y', nothing=1)", "nothing"),
        ("rm = steerjax.load('x', nothing=1)", "nothing"),
        ("config.train.nothing = 1", "nothing"),
        ("config.train.epochs = -1.0", "config.train.epochs"),
        (f"{RECIPE}    config.data.nothing = 1\n    return config", "nothing"),
        (f"{RECIPE}    config.train.steps = 3\n    return config", ""),
        ("rm = steerjax.load('x', mesh='fsdp=2')\nrm.rate('x', ['y'])\nrm.schema.names\nrm.kind", ""),
    ],
)
def test_wrong_python_is_found(page_of, text, wrong):
    found = wrong_python(page_of(f"```python\n{text}\n```"))
    assert len(found) == bool(wrong), found
    assert wrong in "".join(found)
