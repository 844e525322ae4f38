"""What a checkpoint says about itself, read as the types that declare it."""

import dataclasses
import json

import pytest

from steerjax.bundle.describe import read_provenance
from steerjax.errors import CheckpointError
from steerjax.models.config import LlamaConfig
from tests.hf_folders import provenance
from tests.refusals import refused

SAID = provenance(LlamaConfig(vocab_size=100), data={"é.jsonl": "00"}, default_ratings={"helpfulness": 4.0})


@pytest.fixture
def said(tmp_path):
    """The file of a step 7."""
    (tmp_path / "7" / "provenance").mkdir(parents=True)
    return tmp_path / "7" / "provenance" / "metadata"


@pytest.mark.short
def test_it_is_read_as_it_was_written(said):
    said.write_text(json.dumps(SAID))
    assert dataclasses.asdict(read_provenance(said.parent.parent)) == SAID


@pytest.mark.short
@pytest.mark.parametrize(
    ("text", "facts"),
    [
        (None, ("metadata",)),
        ("{", ("metadata", "line 1 column 2")),
        ("[]", ("metadata", "list")),
        (json.dumps({"kind": "chat", "model": {}}), ("edition 1", "edition 2")),
        (json.dumps(SAID | {"edition": 3}), ("edition 3", "edition 2")),
        (json.dumps(SAID | {"readout": "lasst"}), ("metadata.readout", "lasst")),
        (json.dumps(SAID | {"model": SAID["model"] | {"num_layers": 0}}), ("metadata.model.num_layers", "0")),
        (
            json.dumps(SAID | {"attributes": [{"name": "wit", "low": 5.0, "high": 1.0}]}),
            ("metadata.attributes.0", "wit"),
        ),
        (json.dumps(SAID | {"humor": 1}), ("metadata.humor",)),
    ],
)
def test_what_is_wrong_is_named(text, facts, said):
    if text is not None:
        said.write_text(text)
    with refused(CheckpointError, str(said.parent.parent), *facts):
        read_provenance(said.parent.parent)
