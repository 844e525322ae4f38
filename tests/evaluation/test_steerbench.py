"""STEERBENCH's measures: golden rows of its own code, and what they say of plain cases."""

import numpy as np
import pytest

from steerjax.evaluation.steerbench import MEASURES, binned, continuous, measures

pytestmark = pytest.mark.short
# github.com/tchang1997/steerability at 546e8de, by benchmarks/oracles/steerbench.py's way: steerability_metrics.py, and
# rewards.py for the continuous orthogonality. Made-up texts: unmoved, exact, nothing asked for, two others.
SOURCE = [
    [0.636961687321454, 0.26978671376387, 0.040973523936195, 0.016527635528529],
    [0.813270239200272, 0.912755577277722, 0.60663577576718, 0.729496560983998],
    [0.543624991465423, 0.935072423787768, 0.815853554121532, 0.002738500170148],
    [0.857404276587569, 0.033585575305464, 0.729655446429944, 0.175655620602559],
    [0.028319671145463, 0.124283276499564, 0.67062441469363, 0.64718951157425],
]
OUTPUT = [
    [0.636961687321454, 0.26978671376387, 0.040973523936195, 0.016527635528529],
    [1.0, 0.294750826004994, 0.377199660531104, 0.239887814636773],
    [0.309755263757715, 0.974006831409955, 0.758606383096064, 0.433755816151303],
    [0.397914987776004, 0.265591770962025, 0.844028693378941, 0.0],
    [0.457423891942469, 0.0, 1.0, 0.213879520341352],
]
TARGET = [
    [0.054583168336793, 0.735488520478627, None, 0.0],
    [1.0, 0.294750826004994, None, 0.239887814636773],
    [None, None, None, None],
    [0.723776852337709, None, 0.156709710296715, None],
    [0.0, 0.0, None, 1.0],
]
EXPECTED = {
    continuous: {
        "steering error": [
            0.7458659898992044,
            0.2294361152360755,
            0.4952414591903488,
            0.8144170376122521,
            0.9673211988034031,
        ],
        "miscalibration": [0.999999973185532, 0.0, 0.0, 1.011930096736119, 2.0629494687745344],
        "orthogonality": [
            0.00017975392364174523,
            0.2724264359716056,
            0.9999999999979808,
            0.9998144204343699,
            0.8241674870471207,
        ],
    },
    binned: {
        "steering error": [
            0.5150787536377127,
            0.2857142857142857,
            0.40406101782088427,
            0.6700593942604899,
            1.0690449676496976,
        ],
        "miscalibration": [0.9999999611709872, 0.0, 0.0, 1.0999999513009255, 2.3999998497362394],
        "orthogonality": [0.00037692305505940846, 0.3481326366764628, 0.9999999999975252, 0.9948879483095884, 1.0],
    },
}


@pytest.mark.parametrize("variant", [continuous, binned])
def test_golden_rows(variant):
    found = measures(variant(*(np.array(part, np.float64) for part in (SOURCE, OUTPUT, TARGET))))
    assert list(found) == list(MEASURES)
    for name, values in found.items():
        np.testing.assert_allclose(values, EXPECTED[variant][name], rtol=0, atol=1e-9, err_msg=name)


@pytest.mark.parametrize(("output", "expected"), [
    ((0.8, 0.5), (0.0, 0.0, 0.0)),  # as asked for
    ((0.6, 0.5), (0.2, 0.5, 0.0)),  # half of the way
    ((0.8, 0.9), (0.4, 0.0, np.sqrt(0.5))),  # all of it, and as far to the side
    ((0.4, 0.9), (np.hypot(0.4, 0.4), 1.0, 1.0)),  # to the side alone
])  # fmt: skip
def test_by_hand(output, expected):
    """From (0.4, 0.5), asked for 0.8 in the first attribute alone."""
    found = measures(continuous(*np.array([[[0.4, 0.5]], [output], [[0.8, np.nan]]])))
    np.testing.assert_allclose(np.ravel(list(found.values())), expected, atol=2e-3)
