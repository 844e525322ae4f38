"""What the page shows as answers come, without a page."""

import threading
from types import SimpleNamespace

from steerjax.errors import DataError
from steerjax.inference.steering import Answer, Sampling
from steerjax.playground.page import answers
from tests.playground.models import OWN


def test_an_answer_that_cannot_be_rated_stops_no_other():
    def stream(prompt, system, setting, sampling, stop):
        yield Answer(f"wit {setting['wit']}" if setting["wit"] else "", "stop", 1, ())

    def rate(prompt, system, answer):
        if not answer:
            raise DataError("the answer is empty", cure="ask again")
        return {"wit": 3.0, "depth": 6.0}

    player = SimpleNamespace(schema=OWN, judged=OWN, stream=stream, rate=rate)
    settings = [{"wit": None, "depth": 6}, {"wit": 1, "depth": 6}]
    *_, (problem, empty, _, unrated, text, _, plot) = answers(player, "q", "", settings, Sampling(), threading.Event())
    assert (problem, empty, text) == ("", "", "wit 1")
    assert "empty" in unrated
    assert "ask again" in unrated
    assert "3" in plot
