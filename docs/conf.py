"""The docs as a site: `python -m sphinx -W --keep-going -b html docs docs/_build/html`.

The pages read on GitHub too. What the code knows (commands, keys of the config, the Python API) is written at each
build, into docs/reference, and never by hand.
"""

import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import steerjax
from steerjax.__main__ import COMMANDS
from steerjax.evaluate import SUITES
from steerjax.flags import recipes
from steerjax.objectives import OBJECTIVES
from steerjax.reference import groups

project, author, copyright = "steerjax", "the steerjax authors", "the steerjax authors"
version = release = steerjax.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode", "sphinx_copybutton"]
exclude_patterns = ["_build"]
html_theme = "sphinx_book_theme"  # that of jax, flax and optax
html_title = f"steerjax {version}"
html_css_files = ["site.css"]
html_static_path = ["static"]
html_theme_options = {"show_navbar_depth": 1, "show_toc_level": 2, "navbar_persistent": []}

myst_enable_extensions = ["attrs_block"]
myst_heading_anchors = 4  # as GitHub makes them
highlight_language = "text"  # of blocks that name none
default_role = "code"  # docstrings write `names` as Markdown does
autodoc_member_order = "bysource"
autodoc_typehints = "signature"

ENVIRONMENT = os.environ | {"COLUMNS": "96", "JAX_PLATFORMS": "cpu"}
HERE = Path(__file__).parent
# File of the repository -> page that includes it.
PAGES = {"README.md": "index.md", "launch/README.md": "launching.md", "benchmarks/README.md": "benchmarks.md"}


def links(text: str, folder: str) -> str:
    """Links of a file of the repository's `folder`, as they are in a page of docs/: to the page where one is the file,
    else to the file, which the site then holds for download."""

    def moved(match: re.Match) -> str:
        words, path, anchor = match.groups()
        if not path or "://" in path:
            return match[0]
        file = (HERE.parent / folder / path).resolve().relative_to(HERE.parent).as_posix()
        page = file.removeprefix("docs/") if file.startswith("docs/") else PAGES.get(file, "")
        if page.endswith(".md") and words == path:
            words = ""  # the page's title
        return f"[{words}]({page or f'../{file}'}{anchor or ''})"

    return re.sub(r"\[([^\]]*)\]\(([^)#\s]*)(#[^)\s]*)?\)", moved, text)


def read_page(app, name: str, content: list[str]) -> None:
    if "/" not in name:
        content[0] = links(content[0], "docs")


def read_included(app, path: Path, page: str, content: list[str]) -> None:
    file = (HERE / path).resolve().relative_to(HERE.parent)
    content[0] = links(content[0], file.parent.as_posix())


def command_reference() -> str:
    """The --help of each command, of its parts and suites."""
    calls = {f"steerjax {name}": [name] for name in COMMANDS}
    calls |= {f"steerjax collect {name}": ["collect", name] for name in ("tasks", "ratings")}
    calls |= {f"steerjax evaluate --suite {name}": ["evaluate", "--suite", name] for name in SUITES}

    def said(call: list[str]) -> str:
        command = [sys.executable, "-m", "steerjax", *call, "--help"]
        return subprocess.run(command, check=True, capture_output=True, text=True, env=ENVIRONMENT).stdout

    with ThreadPoolExecutor() as pool:
        helps = dict(zip(calls, pool.map(said, calls.values()), strict=True))
    parts = ["# Commands", "What each command says with `--help`. `python -m steerjax.NAME` is `steerjax NAME`."]
    for name in sorted(helps, key=lambda name: list(COMMANDS).index(name.split()[1])):
        text, *keys = helps[name].split("\n\nRecipes that come with steerjax:")
        level = "##" if len(name.split()) == 2 else "###"
        parts += [f"{level} `{name}`", f"```text\n{text.strip()}\n```"]
        parts += ["`--config.KEY=VALUE` sets any [key of the config](config.md)."] if keys else []
    return "\n\n".join(parts) + "\n"


def config_reference() -> str:
    """Every key, by group."""
    parts = [
        "# The config",
        "What a recipe returns, and what `--config.KEY=VALUE` sets: every key with its default. "
        "`steerjax train --help` says the same.",
        f"`config.objectives` names what is learnt: {', '.join(f'`{name}`' for name in OBJECTIVES)}. "
        "Each has a group of its own name.",
        f"Recipes that come with the package (`--config NAME`): {', '.join(f'`{name}`' for name in recipes())}.",
    ]
    for name, about, keys in groups():
        rows = [f"| `{key.name}` | `{key.default!r}` | {_cell(key.kind)} | {_cell(key.meaning)} |" for key in keys]
        header = "| key | default | takes | meaning |\n|---|---|---|---|"
        parts += [f"## {name}", about, "\n".join(["{.keys}", header, *rows])]
    return "\n\n".join(parts) + "\n"


def _cell(text: str) -> str:
    return re.sub(r"docs/(\w+\.md)", r"[](../\1)", text.replace("|", "\\|"))


def write_references(app) -> None:
    folder = HERE / "reference"
    folder.mkdir(exist_ok=True)
    for name, text in {"commands.md": command_reference(), "config.md": config_reference()}.items():
        if not (folder / name).exists() or (folder / name).read_text() != text:
            (folder / name).write_text(text)


def example_as_code(app, what: str, name: str, object, options, lines: list[str]) -> None:
    """The example in the package's docstring, which is indented as help() shows it."""
    if what == "module" and (example := [n for n, line in enumerate(lines) if line.startswith("    ")]):
        lines[example[0] : example[0]] = [".. code-block:: python", ""]


def setup(app) -> None:
    app.connect("autodoc-process-docstring", example_as_code)
    app.connect("builder-inited", write_references)
    app.connect("source-read", read_page)
    app.connect("include-read", read_included)
