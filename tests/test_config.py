"""Bad configs are refused at the door with the key and the cure; recipes are whole."""

import json

import pytest

from steerjax.config import Experiment, default_config, resolve, to_json
from steerjax.errors import ConfigError

pytestmark = pytest.mark.short

BAD = {
    "optimizer.lerning_rate": (1e-3, r"unknown key .*lerning_rate; cure: did you mean config.optimizer.learning_rate"),
    "optimisation": ({}, r"unknown key config.optimisation"),
    "batch.rows": ("8", r"config.batch.rows is '8', str; cure: a value of type int"),
    "batch.row_length": (0, r"config.batch.row_length is 0; cure: at least 1"),
    "batch.micro_batches": (3, r"config.batch.micro_batches is 3; cure: a divisor of batch.rows 8"),
    "data.train": ("a.jsonl", r"config.data.train is 'a.jsonl'; cure: a tuple, e.g. \('a.jsonl',\)"),
    "data.schema": ("helpster", r"config.data.schema is 'helpster'; cure: one of helpsteer, oasst, steerlm"),
    "data.on_bad_row": ("ignore", r"config.data.on_bad_row is 'ignore'; cure: one of 'error', 'skip'"),
    "data.validation_fraction": (1.5, r"config.data.validation_fraction is 1.5; cure: a part between 0 and 1"),
    "chat.template": ("alpaca", r"config.chat.template is 'alpaca'; cure: one of 'extra_id', 'chatml'"),
    "optimizer.learning_rate": (0.0, r"config.optimizer.learning_rate is 0.0; cure: more than 0"),
    "optimizer.min_learning_rate": (1.0, r"config.optimizer.min_learning_rate is 1.0; cure: between 0 and"),
    "optimizer.beta2": (1.0, r"config.optimizer.beta2 is 1.0; cure: from 0 to less than 1"),
    "train.epochs": (0.0, r"config.train.epochs is 0.0; cure: more than 0, or set train.steps"),
    "train.plots": (1, r"config.train.plots is 1, int; cure: a value of type bool"),
    "mesh": ({"data": -1, "fsdp": -1}, r"at most one axis of the mesh is -1"),
    "mesh.tensor": (0, r"config.mesh.tensor is 0; cure: at least 1, or -1"),
    "model.num_heads": (3, r"model.num_heads 3 is not a multiple of model.num_kv_heads 2"),
    "model.head_dim": (17, r"model.head_dim is 17; cure: an even number"),
    "model": (5, r"config.model is 5; cure: a group of keys"),
    "objective.attribute_weights": ({"humor": 1.0}, r"humor is not rated; use helpfulness"),
}  # fmt: skip


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
    value, message = BAD[path]
    with pytest.raises(ConfigError, match=message):
        resolve(changed(path, value))


def test_default_config_is_the_default_experiment():
    defaults = default_config()
    assert (defaults.model.head_dim, defaults.model.num_kv_heads) == (0, 0)
    assert resolve(changed("model.num_kv_heads", 2)) == Experiment()


def test_derived_sizes_follow_what_a_recipe_sets():
    config = default_config()
    config.model.hidden_size, config.model.num_heads = 512, 8
    model = resolve(config.to_dict()).model
    assert (model.head_dim, model.num_kv_heads) == (64, 8)


def test_resolved_config_is_json():
    config = json.loads(to_json(Experiment()))
    assert config["optimizer"]["learning_rate"] == Experiment().optimizer.learning_rate


def test_every_recipe_resolves(repository):
    import importlib.util

    recipes = sorted((repository / "configs").glob("*.py"))
    assert recipes
    for path in recipes:
        spec = importlib.util.spec_from_file_location(path.stem, path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        resolve(module.get_config().to_dict())
