"""P(a|x,y) from predicted ratings: the values of both readings of the bins, and what no reading may break."""

import numpy as np
import pytest

from steerjax.beta_bins import log_bins, log_probabilities
from steerjax.errors import DataError
from steerjax.schema import HELPSTEER, Attribute, Schema
from tests.refusals import refused

pytestmark = pytest.mark.short

GOLDEN = {"middle": [0, 0, 0.0265, 0.7945, 0.179], "equal": [0, 0, 0.0149, 0.4441, 0.541]}


@pytest.mark.parametrize("edges", GOLDEN)
def test_golden(edges):
    """Of a predicted 3.2 (steerlm.md 5.2)."""
    found = np.exp(log_bins(np.array([3.2]), HELPSTEER["helpfulness"], edges))[0]
    np.testing.assert_allclose(found, GOLDEN[edges], atol=5e-5)


@pytest.mark.parametrize("edges", GOLDEN)
@pytest.mark.parametrize("attribute", [Attribute("a"), Attribute("a", 1, 10), Attribute("a", -0.5, 3.2)], ids=str)
def test_a_distribution_over_the_labels_for_any_prediction(attribute, edges):
    """Also for predictions at the ends of the range and outside; in the far tails, where 1 - CDF is 0 in float64."""
    span = attribute.high - attribute.low
    predicted = np.concatenate([np.linspace(attribute.low - span, attribute.high + span, 61), [1e9, -1e9]])
    found = log_bins(predicted, attribute, edges)
    assert found.shape == (63, len(attribute.labels))
    np.testing.assert_allclose(np.exp(found).sum(axis=1), 1, rtol=1e-12)
    assert np.isfinite(found).all()
    assert found.min() < -20
    likeliest = np.array(attribute.labels)[found.argmax(axis=1)]
    assert (np.diff(likeliest[:61]) >= 0).all()
    assert likeliest[61:].tolist() == [attribute.labels[-1], attribute.labels[0]]


def test_tails_are_symmetric():
    """The upper tail is as exact as the lower one."""
    found = log_bins(np.array([0.01, 3.99]), HELPSTEER["helpfulness"], "middle")
    np.testing.assert_allclose(found[0], found[1, ::-1], rtol=1e-9)


def test_asked_attributes_add_up():
    predicted = np.array([[3.2, 1.0, 2.0, 0.5, 4.0], [0.1, 4.0, 2.0, 2.5, 1.0]])
    asked = {"verbosity": 2.0, "helpfulness": 3.6}  # 3.6 is asked for as 4
    expected = log_bins(predicted[:, 0], HELPSTEER["helpfulness"], "middle")[:, 4]
    expected = expected + log_bins(predicted[:, 4], HELPSTEER["verbosity"], "middle")[:, 2]
    np.testing.assert_allclose(log_probabilities(predicted, HELPSTEER, asked), expected, rtol=1e-12)
    assert log_probabilities(predicted, HELPSTEER, asked, "equal")[0] != expected[0]
    assert log_probabilities(predicted, HELPSTEER, {}).tolist() == [0, 0]


def test_an_attribute_that_is_not_predicted():
    with refused(DataError, "'quality'", cure="helpfulness"):
        log_probabilities(np.zeros((1, 1)), Schema((Attribute("helpfulness"),)), {"quality": 1})
