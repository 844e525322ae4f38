"""The options of `steerjax export` that name attributes; what it writes is tested in hf/test_export.py."""

import pytest

from steerjax.bundle import describe
from steerjax.errors import ConfigError
from steerjax.export import main, parse_schema
from steerjax.schema import Attribute, Schema
from tests.hf_folders import TINY, random_tensors, write_folder


@pytest.mark.short
def test_attributes_as_an_option():
    assert parse_schema("wit:1..5") == Schema((Attribute("wit", 1, 5),))
    own = Schema((Attribute("to-the.point", -1.5, 10), Attribute("b", 0, 1)))
    assert parse_schema("to-the.point:-1.5..10, b:0..1") == own


@pytest.mark.short
@pytest.mark.parametrize(
    "text", ["wit", "wit:5", "wit:5..1", "wit:0.2..0.8", "wit:1..5,wit:1..5", "wit=1..5", "a b:1..2"]
)
def test_attributes_that_are_none(text):
    with pytest.raises(ConfigError, match=r"--attributes.*cure:"):
        parse_schema(text)


def test_a_plain_chat_model_gets_attributes_of_ones_own(tmp_path, capsys):
    source = write_folder(tmp_path / "source", TINY, random_tensors(TINY))
    options = ["--checkpoint", str(source), "--template", "chatml", "--default-ratings", "depth=10"]
    main([*options, "--output", str(tmp_path / "out"), "--attributes", "wit:1..5,depth:1..10"])
    about = describe(tmp_path / "out")
    assert about.schema == Schema((Attribute("wit", 1, 5), Attribute("depth", 1, 10)))
    assert about.default_ratings == {"depth": 10.0}
    capsys.readouterr()
    for arguments, message in (
        (["--attributes", "wit:1..5"], "unknown attribute 'depth'"),
        (["--attributes", "depth:1..5"], "outside 1..5"),
    ):
        with pytest.raises(SystemExit):
            main([*options, "--output", str(tmp_path / "no"), *arguments])
        said = capsys.readouterr().err
        assert message in said
        assert "cure:" in said
