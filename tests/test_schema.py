"""Label strings and rounding (reference facts, sections 2.3, 2.4, 2.8)."""

import math

import pytest

from steerjax.chat.labels import label_line
from steerjax.errors import DataError
from steerjax.schema import (
    HELPSTEER,
    OASST,
    SCALAR_WEIGHTS,
    SCHEMAS,
    STEERLM,
    check_rating,
    parse_label,
    round_rating,
    scalarize,
    schema_from_json,
)
from tests.refusals import refused

pytestmark = pytest.mark.short
HELPFULNESS = HELPSTEER["helpfulness"]


def test_order_is_the_reference_head_order():
    assert STEERLM.names == OASST.names + HELPSTEER.names
    assert OASST.names == ("quality", "toxicity", "humor", "creativity")
    assert HELPSTEER.names == ("helpfulness", "correctness", "coherence", "complexity", "verbosity")
    assert [len(schema) for schema in SCHEMAS.values()] == [5, 4, 9]


@pytest.mark.parametrize(
    ("value", "label"), [(0.5, 0), (1.5, 2), (2.5, 2), (3.5, 4), (-3.0, 0), (9.0, 4), (3.49, 3), (math.inf, 4)]
)
def test_predictions_round_half_to_even_after_clipping(value, label):
    assert round_rating(value, HELPFULNESS) == label


@pytest.mark.parametrize(("likert", "label"), [(0.125, 0), (0.375, 2), (0.625, 2), (0.875, 4)])
def test_oasst_scale_rounds_half_to_even(likert, label):
    assert round_rating(likert * 4, OASST["quality"]) == label


def test_nan_is_an_error_and_never_zero():
    with refused(DataError, "helpfulness", "NaN"):
        round_rating(math.nan, HELPFULNESS)
    with refused(DataError, "helpfulness", "nan"):
        check_rating(math.nan, HELPFULNESS)


def test_label_round_trip():
    label = "helpfulness:3,correctness:4,coherence:4,complexity:2,verbosity:2"
    ratings = parse_label(label, HELPSTEER)
    assert ratings == {"helpfulness": 3, "correctness": 4, "coherence": 4, "complexity": 2, "verbosity": 2}
    assert label_line(ratings, HELPSTEER, "numbers") == label
    assert label_line(dict(reversed(ratings.items())), HELPSTEER, "numbers") == label


def test_missing_ratings_are_left_out():
    assert label_line({"verbosity": 1, "quality": 4}, STEERLM, "numbers") == "quality:4,verbosity:1"
    assert parse_label("", STEERLM) == {}


@pytest.mark.parametrize(
    ("label", "facts"),
    [
        ("helpfulness", ["helpfulness", "name:number"]),
        ("helpfulness:x", ["helpfulness", "'x'"]),
        ("helpfulness:9", ["helpfulness", "9", "0..4"]),
        ("helpfulness:-1", ["helpfulness", "-1", "0..4"]),
        ("helpfulness:nan", ["helpfulness", "nan"]),
        ("humour:1", ["humour"]),
        ("verbosity:1,verbosity:2", ["verbosity", "twice"]),
    ],
)
def test_bad_labels(label, facts):
    with refused(DataError, *facts):
        parse_label(label, STEERLM)


def test_scalar_weights_are_the_published_vectors():
    def vector(name):
        return [SCALAR_WEIGHTS[name].get(attribute, 0) for attribute in STEERLM.names]

    assert vector("llama3_70b") == [0, 0, 0, 0, 0.65, 0.8, 0.45, 0.55, -0.4]
    assert vector("nemotron4_340b") == [0, 0, 0, 0, 0.3, 0.74, 0.46, 0.47, -0.33]
    ratings = {"helpfulness": 4, "correctness": 3, "coherence": 2}
    assert scalarize(ratings, SCALAR_WEIGHTS["goodness"]) == pytest.approx(0.65 * 4 + 0.8 * 3 + 0.45 * 2)
    with refused(DataError, "complexity, verbosity", cure="weights"):
        scalarize(ratings, SCALAR_WEIGHTS["llama3_70b"])


def test_schema_survives_json():
    assert schema_from_json(STEERLM.to_json(), "attributes", DataError) == STEERLM
