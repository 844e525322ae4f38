"""`train --help` names every key; recipes are found by name, wherever they lie."""

import runpy
import subprocess
import sys
import tomllib

import pytest

from steerjax.__main__ import COMMANDS
from steerjax.config import default_config
from steerjax.errors import ConfigError
from steerjax.flags import REFERENCE, find_recipe, recipes
from steerjax.reference import groups, reference_text
from tests.refusals import refused

pytestmark = pytest.mark.short


def leaves(config, prefix=""):
    for key, value in config.items():
        if isinstance(value, dict) and value:
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def test_every_key_is_there_with_its_default_and_a_meaning():
    expected = dict(leaves(default_config().to_dict()))
    del expected["objectives"]
    found = {key.name: key for _, _, keys in groups() for key in keys}
    assert {name: key.default for name, key in found.items()} == expected
    assert [name for name, key in found.items() if not key.meaning or not key.kind] == []
    text = reference_text()
    assert all(f"--config.{name}=" in text for name in expected)


def test_help_of_train():
    done = subprocess.run([sys.executable, "-m", "steerjax", "train", "--help"], capture_output=True, text=True)
    assert done.returncode == 0
    for word in ("--workdir", "--config.optimizer.learning_rate=0.001  (number", "rm_smollm2", "config.sft:"):
        assert word in done.stdout


def test_the_text_that_help_shows_is_that_of_the_code():
    assert REFERENCE.read_text() == reference_text(), "python -m steerjax.reference writes it"


@pytest.mark.parametrize("name", COMMANDS)
def test_help_imports_nothing_heavy(name):
    heavy = ("jax", "flax", "orbax", "datasets", "torch", "transformers", "matplotlib", "pandas", "tokenizers")
    code = f"""import atexit, sys
atexit.register(lambda: print([name for name in {heavy} if name in sys.modules], file=sys.stderr))
sys.argv = ["steerjax", "{name}", "--help"]
from steerjax.__main__ import main
main()"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr.strip()) == (0, "[]")
    assert name in done.stdout


def test_recipes_by_name(tmp_path, monkeypatch, repository):
    expected = {file.stem for file in (repository / "configs").glob("*.py")}
    assert set(recipes()) == expected
    monkeypatch.chdir(tmp_path)
    for name in ("rm", "rm.py", "configs/rm.py"):
        assert find_recipe(name).endswith("configs/rm.py")
    own = tmp_path / "rm"
    own.write_text("")
    assert find_recipe("rm") == "rm"  # a file goes before
    for name in ("nothing", "elsewhere/rm.py", "configs/nothing.py"):
        with refused(ConfigError, name, cure="rm_smollm2"):
            find_recipe(name)


def test_an_installed_package_has_all_of_its_files(repository, monkeypatch):
    """Recipes, samples, templates and prompts, which an editable install would find anyway."""
    said = {}
    monkeypatch.setattr("setuptools.setup", lambda **options: said.update(options))
    monkeypatch.chdir(repository)
    runpy.run_path("setup.py")
    patterns = tomllib.loads((repository / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["*"]
    assert said["package_dir"] == {"steerjax.recipes": "configs"}
    assert {"steerjax", "steerjax.recipes", "steerjax.data.samples"} <= set(said["packages"])
    for file in (repository / "steerjax").rglob("*"):
        if file.is_file() and file.suffix not in (".pyc", ".py"):
            assert ".".join(file.relative_to(repository).parent.parts) in said["packages"], file
            assert any(file.match(pattern) for pattern in patterns), file
