"""One score of several attributes, and one model of several: exact, and read by stock classes."""

import json

import jax
import numpy as np
import pytest

from steerjax import annotate, export, merge
from steerjax.bundle import open_bundle
from steerjax.errors import ConfigError
from steerjax.schema import HELPSTEER, parse_scalar
from tests.hf_folders import CLASSIFIER, TINY, provenance, random_tensors, read_folder, save_checkpoint, write_folder
from tests.refusals import refused
from tests.reward_models import read_rows, reward_folder, some_conversations, write_rows


@pytest.fixture(scope="module")
def reward(tmp_path_factory):
    """A reward model's export, which names its template and attributes."""
    folder = reward_folder(tmp_path_factory.mktemp("reward"))
    about = {"kind": "reward", "template": "extra_id", "attributes": HELPSTEER.to_json()}
    (folder / "steerjax.json").write_text(json.dumps(about))
    return folder


def ratings(model, rows, output):
    annotate.main(["--model", str(model), "--input", str(rows), "--output", str(output)])
    return predictions(output)


def predictions(path):
    turns = [turn for row in read_rows(path) for turn in row["turns"]]
    return [turn["predicted_ratings"] for turn in turns if "predicted_ratings" in turn]


@pytest.mark.parametrize("scalar", ["goodness", "llama3_70b", "verbosity=-2,helpfulness=0.25"])
def test_the_score_is_the_weighted_sum(reward, tmp_path, scalar):
    rows = write_rows(tmp_path / "rows.jsonl", some_conversations(12, longest=20))
    export.main(["--checkpoint", str(reward), "--output", str(tmp_path / "one"), "--scalar", scalar])
    name, weights = parse_scalar(scalar, HELPSTEER)
    config = json.loads((tmp_path / "one" / "config.json").read_text())
    assert (config["num_labels"], config["id2label"]) == (1, {"0": name})
    all_of, one = (ratings(m, rows, tmp_path / f"{m.name}.jsonl") for m in (reward, tmp_path / "one"))
    for values, score in zip(all_of, one, strict=True):
        expected = sum(weight * values[attribute] for attribute, weight in weights.items())
        assert score == {name: pytest.approx(expected, abs=1e-4)}


@pytest.mark.parity
def test_transformers_reads_the_score(reward, tmp_path):
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    rows = write_rows(tmp_path / "rows.jsonl", some_conversations(6, longest=20))
    export.main(["--checkpoint", str(reward), "--output", str(tmp_path / "one"), "--scalar", "goodness"])
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "one", num_labels=1).eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "one")
    ratings(tmp_path / "one", rows, tmp_path / "out.jsonl")
    for row in read_rows(tmp_path / "out.jsonl"):
        messages = [{"role": turn["role"], "content": turn["content"]} for turn in row["turns"]]
        with torch.no_grad():
            logits = model(**tokenizer.apply_chat_template(messages, return_tensors="pt", return_dict=True)).logits
        assert logits.shape == (1, 1)
        assert float(logits) == pytest.approx(row["turns"][-1]["predicted_ratings"]["goodness"], abs=1e-4)


@pytest.mark.parametrize("text", ["kindness=1", "goodnes", "helpfulness=much", "helpfulness=0", "helpfulness=nan",
                                  "helpfulness=1,helpfulness=2", ""])  # fmt: skip
def test_scalars_that_are_none(text):
    with refused(ConfigError, f"--scalar {text}", cure="goodness"):
        parse_scalar(text, HELPSTEER)


def test_a_one_label_model_of_somebody_else(tmp_path):
    """Skywork's layout: one output, called LABEL_0."""
    config = TINY | CLASSIFIER | {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}, "num_labels": 1}
    folder = write_folder(tmp_path / "skywork", config, random_tensors(config))
    rows = write_rows(tmp_path / "rows.jsonl", some_conversations(3, longest=9))
    words = ("--model", folder, "--template", "extra_id", "--input", rows, "--output", tmp_path / "out.jsonl")
    annotate.main([str(word) for word in words])
    assert all(list(found) == ["score"] for found in predictions(tmp_path / "out.jsonl"))


@pytest.mark.parity
@pytest.mark.parametrize(("layout", "tied"), [("one label", False), ("first logit", False), ("first logit", True)])
def test_models_with_one_output_score_as_in_transformers(tmp_path, layout, tied):
    """Skywork's one label, and Nemotron's logit of token 0 of a causal model."""
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    label = {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}, "num_labels": 1}
    config = TINY | (CLASSIFIER | label if layout == "one label" else {"tie_word_embeddings": tied})
    tensors = {name: x * (1 if "norm" in name else 0.2) for name, x in random_tensors(config).items()}
    folder = write_folder(tmp_path / "model", config, tensors)
    about = {"kind": "reward", "template": "extra_id", "attributes": [{"name": "reward", "low": -9, "high": 9}]}
    if layout == "first logit":
        (folder / "steerjax.json").write_text(json.dumps(about))
    bundle = open_bundle(folder, template="extra_id", dtype="float32")
    assert bundle.description.kind == "reward"
    tokens = np.random.default_rng(0).integers(4, 4096, (8, 30))
    inputs = tokens, np.arange(30)[None].repeat(8, 0), np.full((8, 30), 30)
    ours = bundle.module.apply({"params": jax.device_get(bundle.params)}, *inputs)[:, -1]
    kind = AutoModelForSequenceClassification if layout == "one label" else AutoModelForCausalLM
    with torch.no_grad():
        logits = kind.from_pretrained(folder, dtype=torch.float32).eval()(torch.tensor(tokens)).logits
    expected = logits if layout == "one label" else logits[:, -1, :1]
    np.testing.assert_allclose(ours, expected.numpy(), rtol=0, atol=1e-4)


# ---- merge


@pytest.mark.parametrize(("options", "weights"), [
    ((), (0.5, 0.5)), (("--factor", "1.52"), (-0.52, 1.52)), (("--weights", "0.25,0.75"), (0.25, 0.75)),
])  # fmt: skip
def test_merged_parameters_are_the_weighted_sum(reward, tmp_path, options, weights):
    """Of two Hugging Face folders, and of a run beside one."""
    other = reward_folder(tmp_path / "other", seed=1)
    (other / "steerjax.json").write_text((reward / "steerjax.json").read_text())
    merge.main([str(reward), str(other), "--output", str(tmp_path / "out"), *options])
    found, first, second = (read_folder(folder) for folder in (tmp_path / "out", reward, other))
    assert found.keys() == first.keys()
    for name, value in found.items():
        expected = np.float32(weights[0]) * first[name] + np.float32(weights[1]) * second[name]
        np.testing.assert_allclose(value, expected, rtol=1e-6, atol=1e-7)
    about = json.loads((tmp_path / "out" / "steerjax.json").read_text())
    assert list(about["provenance"]["merged"].values()) == pytest.approx(list(weights))
    rows = write_rows(tmp_path / "rows.jsonl", some_conversations(3, longest=9))
    assert len(ratings(tmp_path / "out", rows, tmp_path / "rated.jsonl")) > 0


def test_a_run_beside_its_source(reward, tmp_path):
    """The strong model is a checkpoint that began at the weak one."""
    bundle = open_bundle(reward)
    about = bundle.description
    save_checkpoint(tmp_path / "run", bundle.params, provenance(about.model, "reward"))
    merge.main([str(reward), str(tmp_path / "run"), "--factor", "1.52", "--output", str(tmp_path / "out")])
    for name, value in read_folder(tmp_path / "out").items():
        np.testing.assert_allclose(value, read_folder(reward)[name], rtol=1e-5, atol=1e-6)


BAD = ("A", "A B --factor 2 --weights 1,0", "A B --weights 1,1", "A B --weights 1", "A B --weights a,b", "A C")


@pytest.mark.parametrize("words", BAD)
def test_what_cannot_be_merged(reward, tmp_path, words, capsys):
    other = reward_folder(tmp_path / "other", num_hidden_layers=3)
    (other / "steerjax.json").write_text((reward / "steerjax.json").read_text())
    places = {"A": str(reward), "B": str(reward), "C": str(other)}
    with pytest.raises(SystemExit) as caught:
        merge.main([*(places.get(word, word) for word in words.split()), "--output", str(tmp_path / "out")])
    assert caught.value.code == 2
    assert "cure: " in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
