"""Bad configs are refused at the door with the key and the cure; recipes are whole."""

import json
import re
import subprocess
import sys

import pytest

from steerjax.chat.render import make_renderer
from steerjax.config import default_config, resolve
from steerjax.errors import ConfigError
from steerjax.training.input import make_input
from steerjax.training.program import make_objectives
from steerjax.training.source import with_source
from tests.refusals import refused, says

pytestmark = pytest.mark.short

BAD = {
    "optimizer.lerning_rate": (1e-3, "learning_rate"),
    "optimisation": ({}, "optimizer"),
    "task": ("reward", "cure"),
    "objectives": (("regresion",), "regression"),
    "batch.rows": ("8", "int"),
    "batch.row_length": (0, "at least 1"),
    "batch.micro_batches": (3, "divisor"),
    "data.train": ((), "data.train"),
    "data.schema": ("helpster", "helpsteer"),
    "data.on_bad_row": ("ignore", "skip"),
    "data.validation_fraction": (1.5, "less than 1"),
    "data.attributes": ((("fun", 5, 1),), "range"),
    "chat.template": ("alpaca", "chatml"),
    "chat": ({"template": "source"}, "model.source"),
    "optimizer.learning_rate": (0.0, "more than 0"),
    "optimizer.min_learning_rate": (1.0, "at most learning_rate"),
    "optimizer.beta2": (1.0, "less than 1"),
    "train.epochs": (0.0, "steps above 0"),
    "train.plots": (1, "bool"),
    "mesh": ({"data": -1, "fsdp": -1}, "at most one"),
    "mesh.tensor": (0, "at least 1"),
    "model.num_heads": (3, "multiple of model.num_kv_heads"),
    "model.head_dim": (17, "even"),
    "model.hidden_size": (-1, "at least 1"),
    "model.rope_theta": (float("inf"), "rope_theta"),
    "model.keep_layers": (2, "source"),
    "model": (5, "model"),
    "head.readout": ("lasst", "last"),
    "compute.cache_frozen": (True, "frozen_layers"),
    "regression.attribute_weights": ({"humor": 1.0}, "helpfulness"),
    "regression.average": ("mean", "ratings"),
    "regression.weight": (-1.0, "at least 0"),
    "bradley_terry.score": ({"helpfulness": float("nan")}, "at most 1e+30"),
    "sft.missing": ("drop", "omit"),
}


def changed(path, value):
    config = default_config().to_dict()
    config["model"]["num_kv_heads"] = 2
    *groups, key = path.split(".")
    place = config
    for group in groups:
        place = place[group]
    place[key] = value
    return config


@pytest.mark.parametrize("path", BAD)
def test_bad_values_name_the_key_and_the_cure(path):
    value, cure = BAD[path]
    with pytest.raises(ConfigError) as found:
        resolve(changed(path, value))
    message = str(found.value)
    assert path.split(".")[-1] in message
    assert "cure: " in message
    assert cure in message


def test_what_depends_on_the_schema_is_checked_for_the_objectives_that_are_chosen():
    for objectives, key, value in (
        (("sft",), "sft.default_ratings", {"helpfulness": 9.0}),
        (("sft",), "sft.default_ratings", {"humor": 1.0}),
        (("regression",), "regression.attribute_weights", dict.fromkeys(default_config().data.to_dict(), 1.0)),
    ):
        with refused(ConfigError, f"config.{key}"):
            resolve(changed(key, value) | {"objectives": objectives})
    zero = dict.fromkeys(("helpfulness", "correctness", "coherence", "complexity", "verbosity"), 0.0)
    with refused(ConfigError, "config.regression.attribute_weights"):
        resolve(changed("regression.attribute_weights", zero))


def test_derived_sizes_follow_what_a_recipe_sets():
    defaults = default_config()
    assert (defaults.model.head_dim, defaults.model.num_kv_heads) == (0, 0)
    defaults.model.hidden_size, defaults.model.num_heads = 512, 8
    model = resolve(defaults.to_dict()).model
    assert (model.head_dim, model.num_kv_heads) == (64, 8)


def test_a_resolved_experiment_is_json_and_resolves_again():
    experiment = resolve(default_config().to_dict())
    assert resolve(json.loads(experiment.to_json())) == experiment


@pytest.mark.parametrize("value", ["a.jsonl,b.jsonl", ("a.jsonl", "b.jsonl"), ("a.jsonl,b.jsonl",)])
def test_data_files_as_a_tuple_or_with_commas(value):
    assert resolve(changed("data.train", value)).data.train == ("a.jsonl", "b.jsonl")


@pytest.mark.parametrize(
    ("path", "value", "expected"),
    [
        ("objectives", ("regression,bradley_terry",), ("regression", "bradley_terry")),
        ("optimizer.frozen", ("embedding, layers/.{1,2}",), ("embedding", "layers/.{1,2}")),
        ("model.lora.targets", ("q,v",), ("q", "v")),
        ("train.trackers", ("tensorboard,",), ("tensorboard",)),
        ("regression.train", ("a.jsonl,b.jsonl",), ("a.jsonl", "b.jsonl")),
    ],
)
def test_lists_with_commas_as_a_flag_gives_them(path, value, expected):
    found = resolve(changed(path, value)).to_dict()
    for key in path.split("."):
        found = found[key]
    assert found == expected


@pytest.mark.parametrize(
    ("flag", "says_so", "cure"),
    [
        ("--config.train.epochs=a", "float", "train --help"),
        ("--config.train.epoch=3", "epochs", "train --help"),
        ("--config.train.plots=maybe", "maybe", "train --help"),
        ("--config.none.epochs=3", "none", "train --help"),
        ("--config.train.seed.x=3", "x", "train --help"),
        ("--worker=3", "worker", "train --help"),
        ("--config.data.attributes=clarity,1,5", "config.data.attributes", "clarity"),
    ],
)
def test_a_wrong_flag_is_an_error_like_any_other(flag, says_so, cure, tmp_path):
    command = [sys.executable, "-m", "steerjax", "train", "--config", "rm", "--workdir", str(tmp_path), flag]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    says(done.stderr, says_so, cure=cure)


def test_every_recipe_resolves(repository):
    recipes = [path.read_text() for path in (repository / "configs").glob("*.py")]
    pages = [repository / "README.md", *(repository / "docs").glob("*.md")]
    recipes += [block for page in pages for block in re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)]
    recipes = [text for text in recipes if "def get_config" in text]
    assert len(recipes) >= 11
    for text in recipes:
        namespace: dict = {}
        exec(text, namespace)
        resolve(namespace["get_config"]().to_dict())


def test_every_recipe_saves_while_it_runs(repository):
    for path in (repository / "configs").glob("*.py"):
        namespace: dict = {}
        exec(path.read_text(), namespace)
        assert namespace["get_config"]().train.checkpoint_every > 0, path.name


@pytest.mark.parametrize("recipe", ["default", "rm", "sft"])
def test_packaged_data_is_taken_as_it_is(repository, recipe):
    """Every row becomes an example, duplicates too, and none is too long."""
    config = default_config()
    if recipe != "default":
        namespace: dict = {}
        exec((repository / "configs" / f"{recipe}.py").read_text(), namespace)
        config = namespace["get_config"]()
    e, source = with_source(resolve(config.to_dict()))
    schema = e.data.make_schema()
    renderer = make_renderer(e.chat, schema)
    found = make_input(e, make_objectives(e, schema, renderer), renderer)
    assert source is None
    assert not found.skipped
    assert sum(len(tree.examples) for trees in (found.plan.trees, found.validation) for tree in trees) == 429
