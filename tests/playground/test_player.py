"""Who answers and rates, without a page."""

import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

import pytest

from steerjax.api import load
from steerjax.errors import DataError, ModelError
from steerjax.inference.steering import Answer, Sampling
from steerjax.playground.player import Player, streamed
from tests.playground.models import OWN, play_folders
from tests.refusals import refused

SHORT = Sampling(max_new_tokens=6)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return play_folders(tmp_path_factory.mktemp("play"))


@pytest.fixture(scope="module")
def player(folders):
    with closing(Player(load(folders["chat"]), load(folders["reward"]))) as player:
        yield player


def test_answers_are_those_of_generate(player, folders, capsys):
    """Streamed from another thread a piece: the text that the command prints."""
    from steerjax.generate import main

    *pieces, whole = player.stream("Why?", "", {"wit": 1, "depth": None}, SHORT, threading.Event())
    assert isinstance(whole, Answer)
    assert "".join(pieces) == whole.text
    main(["--model", str(folders["chat"]), "--prompt", "Why?", "--attributes", "wit=1,depth=none",
          "--max-new-tokens", "6"])  # fmt: skip
    assert capsys.readouterr().out.rstrip("\n") == whole.text.rstrip("\n")


def test_ratings_have_the_reward_models_attributes(player):
    rated = player.rate("Why?", "Be kind.", "Because.")
    assert list(rated) == list(OWN.names)
    assert rated == player.rate("Why?", "Be kind.", "Because.")


def test_start_is_the_defaults_or_the_middle(player, monkeypatch):
    assert player.default_setting() == {"wit": 3, "depth": 6}
    monkeypatch.setattr(player, "defaults", {"depth": 9.0})
    assert player.default_setting() == {"wit": None, "depth": 9}


@pytest.mark.parametrize(
    ("prompt", "facts", "cure"),
    [(" \n", ("prompt", "empty"), "question"), ("why " * 2000, ("tokens", "1024"), "shorten")],
)
def test_what_cannot_be_answered(player, prompt, facts, cure):
    with refused(DataError, *facts, cure=cure):
        list(player.stream(prompt, "", {}, SHORT, threading.Event()))
    assert list(player.stream("Why?", "", {}, SHORT, threading.Event()))  # the next one can


def test_what_cannot_be_rated(player):
    with refused(DataError, "empty", cure="again"):
        player.rate("Why?", "", " ")
    with refused(DataError, "tokens", cure="shorter"):
        player.rate("Why?", "", "so " * 4000)


def test_what_cannot_be_opened(folders):
    with refused(ModelError, "reward model", cure="chat model"):
        Player(load(folders["reward"]))
    with refused(ModelError, "chat model", cure="reward model"):
        Player(load(folders["chat"]), load(folders["chat"]))


def test_one_at_a_time_and_nothing_mixes():
    """Four at once: each gets its own pieces in order, and the thread works for one at a time."""
    working, most = [], []

    def pieces(name):
        working.append(name)
        for n in range(5):
            most.append(len(working))
            yield f"{name}{n}"
        working.remove(name)

    closed = threading.Event()
    with ThreadPoolExecutor(1) as pool, ThreadPoolExecutor(4) as people:
        got = list(people.map(lambda name: [*streamed(pool, lambda: pieces(name), threading.Event(), closed)], "abcd"))
    assert got == [[f"{name}{n}" for n in range(5)] for name in "abcd"]
    assert set(most) == {1}


def test_one_who_leaves_or_stops_does_not_hold_the_model():
    closed, ended = threading.Event(), threading.Event()

    def endless():
        try:
            while True:
                yield "x"
        finally:
            ended.set()

    with ThreadPoolExecutor(1) as pool:
        left = streamed(pool, endless, threading.Event(), closed)
        assert next(left) == "x"
        left.close()
        assert ended.wait(10)
        ended.clear()
        stop = threading.Event()
        stopped = streamed(pool, endless, stop, closed)  # and neither read on nor closed
        assert next(stopped) == "x"
        stop.set()
        assert ended.wait(10)
        assert list(stopped) == []
        assert list(streamed(pool, lambda: (piece for piece in "ab"), threading.Event(), closed)) == ["a", "b"]
