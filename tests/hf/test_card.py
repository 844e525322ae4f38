"""The model card says what the model and its provenance say, and nothing else."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from steerjax.chat.templates import TEMPLATES
from steerjax.chat.tokenizer import load_tokenizer
from steerjax.config import Experiment, to_dict
from steerjax.hf.card import model_card
from steerjax.hf.description import ModelDescription
from steerjax.models.config import LlamaConfig
from steerjax.schema import HELPSTEER

PROVENANCE = {
    "steerjax": "9.8.7",
    "base_model": "owner/base-1B",
    "data": {"embedded:helpsteer": "ab" * 32, "/home/me/private/x.jsonl": "cd" * 32, "hub:owner/rows:train": "ef"},
    "config": to_dict(Experiment()),
}


@pytest.fixture(scope="module")
def described():
    return ModelDescription(
        path=Path("model"),
        kind="reward",
        model=LlamaConfig(),
        tokenizer=load_tokenizer("embedded"),
        template=TEMPLATES["chatml"],
        schema=HELPSTEER,
        system_prompt=None,
        readout="last",
        default_ratings=None,
        provenance=PROVENANCE,
    )


def head(card):
    """The YAML between the first two rules, a JSON value a line."""
    start, block, _ = card.split("---\n", 2)
    assert start == ""
    return {key: json.loads(value) for key, value in (line.split(": ", 1) for line in block.splitlines())}


def test_reward_card(described):
    card = model_card(described, evaluation={"helpfulness": {"mse": 0.5, "pearson": 0.4}, "verbosity": {"mse": 0.25}})
    assert head(card) == {
        "library_name": "transformers",
        "pipeline_tag": "text-classification",
        "license": "other",
        "license_name": "see-base-model-and-data",
        "tags": ["steerjax", "steerlm", "reward-model"],
        "base_model": "owner/base-1B",
        "datasets": ["nvidia/HelpSteer", "owner/rows"],
    }
    for text in (
        "predicts 5 ratings",
        "- base model: `owner/base-1B`",
        "AdamW, learning rate 0.001 (cosine, 10 warm-up steps), weight decay 0.1",
        "- batch: 8 packed rows of 2048 tokens\n- length: 1 epochs\n- steerjax 9.8.7",
        f"| `embedded:helpsteer` | `{'ab' * 32}` |\n| `x.jsonl` | `{'cd' * 32}` |",
        "| 4 | verbosity | 0 to 4 | amount of detail",
        "| attribute | mse | pearson |\n|---|---|---|\n| helpfulness | 0.500 | 0.400 |\n| verbosity | 0.250 |  |",
        "AutoModelForSequenceClassification",
        "vllm serve MODEL --runner pooling\ncurl localhost:8000/classify",
        'after "<|im_end|>"',
        "## Licences",
    ):
        assert text in card, text
    assert "private" not in card  # a path of the machine that trained
    assert "chat_template_kwargs" not in card


def test_chat_card(described):
    defaults = {"helpfulness": 4.0, "verbosity": 2.0}
    chat = replace(described, kind="chat", default_ratings=defaults)
    card = model_card(chat)
    assert head(card)["pipeline_tag"] == "text-generation"
    assert "| helpfulness | 0 to 4 | overall helpfulness of the response to the prompt | 4 |" in card
    assert '"chat_template_kwargs": {"attributes": {"verbosity": 0}}' in card
    assert 'add_generation_prompt=True, attributes={"verbosity": 0}, return_tensors' in card
    assert "## Metrics" not in card
    assert "classify" not in card
    assert "`stop`" not in card
    assert 'give the server `stop` "<|eot_id|>"' in model_card(replace(chat, template=TEMPLATES["llama3"]))


@pytest.mark.parametrize("kind", ["reward", "chat"])
def test_nothing_is_claimed_that_provenance_does_not_say(described, kind):
    card = model_card(replace(described, kind=kind, provenance={}))
    assert "base_model" not in head(card)
    assert "datasets" not in head(card)
    assert "## Base model" not in card
    assert "## Data" not in card
    for word in (" trained", "AdamW", "HelpSteer", "steerjax.json"):
        assert word not in card
    plain = model_card(replace(described, kind="chat", schema=None, provenance={}))
    for word in ("attributes", "ratings", "## Attributes"):
        assert word not in plain


def test_a_base_model_that_is_no_hub_id(described, tmp_path):
    for base, shown in (("random", "none"), (str(tmp_path / "my-llama"), "`my-llama`")):
        card = model_card(replace(described, provenance=PROVENANCE | {"base_model": base}))
        assert "base_model" not in head(card)
        assert f"- base model: {shown}\n" in card
        assert str(tmp_path) not in card
