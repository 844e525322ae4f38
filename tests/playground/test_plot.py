"""The small plot of requested and predicted ratings."""

import re

import pytest

from steerjax.playground.ratings import ratings_plot
from steerjax.schema import HELPSTEER, Attribute, Schema

pytestmark = pytest.mark.short
OWN = Schema((Attribute("wit", 1, 5), Attribute("depth", 1, 11)))


def places(plot: str, kind: str) -> list[float]:
    return [float(at) for at in re.findall(rf'class="{kind}" style="left:([\d.]+)%"', plot)]


def test_marks_stand_at_their_place_of_the_range():
    plot = ratings_plot(OWN, {"wit": 2, "depth": None}, {"wit": 3.0, "depth": 12.5}, OWN)
    assert places(plot, "asked") == [25.0]  # depth was left out
    assert places(plot, "predicted") == [50.0, 100.0]  # beyond the range: at its end, and the number says so
    assert "12.50" in plot


def test_other_attributes_of_the_reward_model_come_last():
    plot = ratings_plot(OWN, {"wit": 2, "depth": 3}, {"verbosity": 1.0, "wit": 3.0}, HELPSTEER)
    assert re.findall('class="name">(.*?)<', plot) == ["wit", "verbosity"]
    assert places(plot, "predicted") == [50.0, 25.0]
