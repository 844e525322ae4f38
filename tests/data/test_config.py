"""The config group `data`: what it takes, and what it refuses with a cure."""

import pytest

from steerjax.data.config import DataConfig
from steerjax.data.formats import FORMATS
from steerjax.errors import ConfigError
from steerjax.schema import HELPSTEER
from steerjax.typed import typed
from tests.refusals import refused


def data(**values):
    return typed(DataConfig, values, "config.data", ConfigError)


def test_defaults_train_on_the_sample():
    assert data() == DataConfig()
    assert (data().train, data().on_duplicate) == (("embedded:helpsteer",), "keep")
    assert data().make_schema() == HELPSTEER


@pytest.mark.parametrize("value", ["a.jsonl,b.jsonl", " a.jsonl, b.jsonl,", ["a.jsonl", "b.jsonl"]])
def test_sources_may_be_one_text_with_commas(value):
    assert data(train=value).train == data(validation=value).validation == ("a.jsonl", "b.jsonl")


def test_own_attributes_take_the_presets_place():
    schema = data(schema="steerlm", attributes=[["clarity", 1, 5], ["depth", 1.0, 10, "how far"]]).make_schema()
    assert [(a.name, a.low, a.high, a.meaning) for a in schema.attributes] == [
        ("clarity", 1, 5, ""),
        ("depth", 1, 10, "how far"),
    ]


def test_every_format_can_be_named():
    assert {data(format=name).format for name in FORMATS} == set(FORMATS)


@pytest.mark.parametrize(
    ("values", "key"),
    [
        ({"train": ""}, "train"),
        ({"train": 3}, "train"),
        ({"schema": "helpster"}, "schema"),
        ({"format": "chat"}, "format"),
        ({"validation_fraction": 1}, "validation_fraction"),
        ({"on_duplicate": "error"}, "on_duplicate"),
        ({"control_strings": "escape"}, "control_strings"),
        ({"attributes": [["clarity", 5, 1]]}, "attributes"),
        ({"attributes": [["clarity", 1, 5], ["clarity", 1, 5]]}, "attributes"),
    ],
)
def test_refusals_name_the_key(values, key):
    with refused(ConfigError, f"config.data.{key}"):
        data(**values).make_schema()
