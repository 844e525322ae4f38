"""P(a|x,y) of SteerLM 2.0 from a regression reward model: a Beta distribution around the predicted rating.

Source: HelpSteer2, arXiv 2406.08673, section 4.5. It does not say where a label's bin ends.
"""

from collections.abc import Mapping
from typing import Literal

import numpy as np
from jaxtyping import Float
from scipy.special import betainc, betaincc

from steerjax.schema import Attribute, Schema, round_rating

Edges = Literal["middle", "equal"]

_CONCENTRATION = 24.0  # alpha + beta, which the paper has fitted to HelpSteer2
_EPSILON = 1e-6  # the ends of the range have no Beta distribution


def log_probabilities(
    predicted: Float[np.ndarray, "E A"], schema: Schema, asked: Mapping[str, float], edges: Edges = "middle"
) -> Float[np.ndarray, " E"]:
    """log P(a|x,y) of E responses, in nats, float64: the sum over the attributes in `asked`, taken as independent.

    `predicted` are ratings in the schema's order; `asked` are rounded as a label line is. A label's bin ends half-way
    to its neighbours (`middle`, the inverse of rounding), or the bins are `equal` parts of the range.

    Raises DataError: an attribute outside the schema, or a rating that is NaN.
    """
    found = np.zeros(len(predicted))
    for name, rating in asked.items():
        attribute = schema[name]
        label = round_rating(rating, attribute) - attribute.labels[0]
        bins = log_bins(np.asarray(predicted)[:, schema.names.index(name)], attribute, edges)
        found += bins[:, label]
    return found


def log_bins(predicted: Float[np.ndarray, " E"], attribute: Attribute, edges: Edges) -> Float[np.ndarray, "E N"]:
    """log P of each of an attribute's N labels, for E predicted ratings."""
    labels = np.array(attribute.labels, np.float64)
    inner = (labels[1:] + labels[:-1]) / 2
    places = (inner - attribute.low) / (attribute.high - attribute.low)
    if edges == "equal":
        places = np.arange(1, len(labels)) / len(labels)
    places = np.concatenate([[0.0], places, [1.0]])
    mean = (np.asarray(predicted, np.float64) - attribute.low) / (attribute.high - attribute.low)
    mean = np.clip(mean, _EPSILON, 1 - _EPSILON)[:, None]
    alpha, beta = _CONCENTRATION * mean, _CONCENTRATION * (1 - mean)
    below, above = betainc(alpha, beta, places), betaincc(alpha, beta, places)
    # Of two differences that are equal but for rounding, the one of the smaller numbers: the other may be 0.
    bins = np.where(below[:, 1:] < 0.5, np.diff(below), -np.diff(above))
    return np.log(np.maximum(bins, np.finfo(np.float64).tiny))
