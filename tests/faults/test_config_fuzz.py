"""Any value of any key, and any flag: an experiment, or one error that names the key; at once, without traceback."""

import json
import random
import sys
import time
from collections import Counter

import pytest
from absl import flags
from ml_collections import config_flags

from steerjax.config import default_config, resolve
from steerjax.errors import ConfigError
from steerjax.flags import _parse_flags, _recipe
from steerjax.training.config import Experiment
from tests.faults.mutations import HOSTILE, changed, mutated, places

SECONDS = 10.0  # of this process: longer is a hang
BASE = json.loads(default_config().to_json())
TEXTS = (
    "", "inf", "-inf", "nan", "1e400", "1e308", "-1", "0", "0.5", "1" + "0" * 30,
    "1" + "0" * 5000, "(", "[1", "'", '"', "\0",
    "None", "True", "x", "()", "('a',)", "((1,),)", "{}", "a,b", "1_0", "0x10", "__import__('os')", "-", "--",
    "[" * 500, "a" * 10_000,
)  # fmt: skip
ODD_FLAGS = (
    "--config.", "--config..", "--config.=3", "--config.train=3", "--config.train", "--config.train.=3", "--config[",
    "--config.train[", "--config.train[0]=1", "--config.train['seed']=1", "--config.train.seed.x=1", "--config.0=1",
    "--config.\0=1", "--config.__class__=1", "--config.train.__dict__=1", "--config.to_dict=1", "--config.é=1",
    "--", "-", "--config.train.seed", "--noconfig", "--config.data.train[0]=x", "--config.data.train[9]=x",
    "--config. =1", "--config.objectives=", "--config.lock=1", "--config.train.items=1", "--config.train.seed=1=2",
    "--x.y=1",
)  # fmt: skip


def outcome(value: dict, *names: str) -> str:
    """What became of a config; fails where that is not what a user should meet. An error has one of `names`."""
    begun, said = time.process_time(), "resolved"
    try:
        found = resolve(value)
        assert isinstance(found, Experiment)
        json.loads(found.to_json(), parse_constant=pytest.fail)
    except ConfigError as error:
        said = "refused"
        text = str(error)
        assert any(str(name) in text for name in names)
        assert "cure: " in text
        assert len(text) < 2000, "the message is as long as what it refuses"
    assert time.process_time() - begun < SECONDS
    return said


def test_every_key_with_every_hostile_value(tried):
    found = Counter()
    for path in places(BASE):
        for value in HOSTILE:

            def put(holder, key, value=value) -> None:
                holder[key] = value

            found[outcome(changed(BASE, path, put), "" if path == ("objectives", 0) else path[-1])] += 1
    for kind, count in found.items():
        tried("config", f"each key, hostile value: {kind}", count)
    assert found["refused"] > found["resolved"] > 100


@pytest.mark.parametrize(
    ("seed", "count"), [(0, 300), *(pytest.param(n, 5000, marks=pytest.mark.faults) for n in (1, 2))]
)
def test_mutated_configs(tried, seed, count):
    draw, found = random.Random(seed), Counter()
    for _ in range(count):
        found[outcome(mutated(BASE, draw, draw.randrange(1, 6)), "config.", "model.", "config is nested")] += 1
    for kind, number in found.items():
        tried("config", f"several mutations: {kind}", number)


@pytest.fixture
def parsed(monkeypatch, repository):
    """`parsed(arguments)`: what the flags of `steerjax train --config rm` make of them."""

    def parse(*arguments: str, recipe=repository / "configs" / "rm.py") -> dict:
        own = flags.FlagValues()
        sys.modules.pop("config_config", None)  # the recipe before
        holder = config_flags.DEFINE_config_file("config", None, "", flag_values=own)
        monkeypatch.setattr(flags, "FLAGS", own)
        monkeypatch.setattr(sys, "argv", ["train", f"--config={recipe}", *arguments])
        _parse_flags(sys.argv)
        return _recipe(holder)

    return parse


def refused_or_parsed(parsed, capsys, *arguments: str, **options) -> str:
    try:
        resolve(parsed(*arguments, **options))
    except (ConfigError, SystemExit) as error:
        said = capsys.readouterr().err if isinstance(error, SystemExit) else str(error)
        assert "cure: " in said, (arguments, said)
        assert "Traceback" not in said
        return "refused"
    return "taken"


@pytest.mark.parametrize("share", [0.02, pytest.param(1.0, marks=pytest.mark.faults)])
def test_flags(parsed, capsys, tried, share):
    draw = random.Random(7)
    cases = [f"--config.{'.'.join(path)}={text}" for path in places(default_config().to_dict()) for text in TEXTS
             if all(isinstance(part, str) for part in path)]  # fmt: skip
    for flag in (*ODD_FLAGS, *(case for case in cases if draw.random() < share)):
        tried("flag", refused_or_parsed(parsed, capsys, flag))


@pytest.mark.parametrize(
    "content", [b"root:x:0:0\n", b"", b"\0\0", b"\xff\xfe", b"def get_config(): return 3",
                b"def get_config(): return None",
                b"get_config = 3", b"def get_config(x): return x", b"def get_config(): raise ValueError('own')"],
)  # fmt: skip
def test_what_is_no_recipe(parsed, capsys, tried, tmp_path, content):
    (tmp_path / "recipe.py").write_bytes(content)
    assert refused_or_parsed(parsed, capsys, recipe=tmp_path / "recipe.py") == "refused"
    tried("flag", "no recipe")
