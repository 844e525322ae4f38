"""The model card says what the model and its provenance say, and nothing else."""

from dataclasses import replace
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from steerjax.chat.templates import TEMPLATES
from steerjax.chat.tokenizer import load_tokenizer
from steerjax.hf.card import model_card
from steerjax.hf.description import Description
from steerjax.models.config import LlamaConfig
from steerjax.schema import HELPSTEER, Attribute, Schema

OPTIMIZER = {
    "learning_rate": 0.001, "schedule": "cosine", "warmup_steps": 10, "weight_decay": 0.1, "frozen_layers": 0,
}  # fmt: skip
PROVENANCE = {
    "steerjax": "9.8.7",
    "base_model": "owner/base-1B",
    "data": {"embedded:helpsteer": "ab" * 32, "/home/me/private/x.jsonl": "cd" * 32, "hub:owner/rows:train": "ef"},
    "config": {
        "optimizer": OPTIMIZER,
        "batch": {"rows": 8, "row_length": 2048},
        "train": {"steps": 0, "epochs": 1.0},
    },
}


@pytest.fixture(scope="module")
def described():
    return Description(
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
    """The YAML between the first two rules, as the hub reads it."""
    assert card.startswith("---\n")
    return ModelCard(card).data.to_dict()


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
        "AdamW, learning rate 0.001 (cosine, 10 warm-up steps), weight decay 0.1\n",
        "- batch: 8 packed rows of 2048 tokens\n- length: 1 epochs\n- steerjax 9.8.7",
        f"| `embedded:helpsteer` | `{'ab' * 32}` |\n| `x.jsonl` | `{'cd' * 32}` |",
        "| 4 | verbosity | 0 to 4 | amount of detail",
        "| attribute | mse | pearson |\n|---|---|---|\n| helpfulness | 0.500 | 0.400 |\n| verbosity | 0.250 |  |",
        "AutoModelForSequenceClassification",
        "vllm serve MODEL --runner pooling\ncurl localhost:8000/classify",
        'after "<|im_end|>"',
        "\n\n## Licences\n\n",
    ):
        assert text in card, text
    assert "private" not in card  # a path of the machine that trained
    assert "chat_template_kwargs" not in card
    assert "\n\n\n" not in card


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
    assert "\n\n\n" not in card
    assert 'give the server `stop` "<|eot_id|>"' in model_card(replace(chat, template=TEMPLATES["llama3"]))


def test_attributes_of_the_users_own(described):
    """Names, ranges and the example request are the schema's."""
    schema = Schema((Attribute("wit", 1, 5, "dry | or\nnot"), Attribute("depth", 2.5, 10)))
    card = model_card(replace(described, kind="chat", schema=schema, default_ratings={"wit": 4.0}))
    assert "| 0 | wit | 1 to 5 | dry \\| or not | 4 |\n| 1 | depth | 2.5 to 10 |  | none |\n" in card
    assert '"chat_template_kwargs": {"attributes": {"depth": 3}}' in card
    assert "predicts 1 rating of" in model_card(replace(described, schema=Schema(schema.attributes[:1])))
    for word in ("verbosity", "0 to 4"):
        assert word not in card


@pytest.mark.parametrize("kind", ["reward", "chat"])
def test_nothing_is_claimed_that_provenance_does_not_say(described, kind):
    card = model_card(replace(described, kind=kind, provenance={}))
    assert "base_model" not in head(card)
    assert "datasets" not in head(card)
    for word in ("## Base model", "## Data", " trained", "AdamW", "HelpSteer", "steerjax.json"):
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
