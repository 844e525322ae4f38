"""A model's own chat template through the commands: trained with, kept, and read again without the model."""

import dataclasses
import json
import shutil

import pytest

from steerjax import annotate, export
from steerjax.bundle import describe
from steerjax.bundle.describe import read_provenance
from steerjax.chat.render import Renderer
from steerjax.chat.templates import named
from steerjax.config import default_config, resolve
from steerjax.data.conversation import Conversation, Turn
from steerjax.errors import CheckpointError, ModelError
from steerjax.report.records import read_metrics
from steerjax.schema import STEERLM
from steerjax.training.train import train
from tests.hf_folders import CLASSIFIER, TINY, random_tensors, write_folder
from tests.refusals import refused
from tests.reward_models import read_rows, some_conversations, write_rows
from tests.source_templates import SOURCES


def go(objective, rows, source, workdir, steps):
    config = default_config()
    config.objectives, config.data.train, config.data.validation_fraction = (objective,), (str(rows),), 0.25
    config.data.attributes = (("quality", 0, 4), ("length", 0, 9))
    config.model.source, config.chat.template = str(source), "source"
    config.batch.update(rows=8, row_length=256)
    config.train.update(steps=steps, plots=False)
    config.optimizer.update(warmup_steps=0, schedule="constant")
    train(resolve(config.to_dict()), workdir)


def source_folder(folder, name, raw=TINY):
    write_folder(folder, raw | {"num_hidden_layers": 1}, random_tensors(raw | {"num_hidden_layers": 1}))
    tokens = {"bos_token": "<s>", "eos_token": "</s>", "chat_template": SOURCES[name]}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokens))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(("objective", "name"), [("regression", "qwen3"), ("sft", "mistral")])
def test_trained_resumed_and_exported(objective, name, tmp_path, capsys):
    """The run and its export open with the source's template when that is gone; a resume compares it."""
    rows = [
        {"prompt": f"What is {i}?", "response": f"It is {i}.", "quality": i % 5, "length": i % 10} for i in range(40)
    ]
    data, source = write_rows(tmp_path / "rows.jsonl", rows), source_folder(tmp_path / "source", name)
    run, out = tmp_path / "run", tmp_path / "out"
    go(objective, data, source, run, 2)
    template = describe(source, template="source").template
    assert read_provenance(run / "checkpoints" / "2").template == template == describe(run).template
    go(objective, data, source, run, 3)
    assert "resumed at step 2" in capsys.readouterr().out
    assert [r["step"] for r in read_metrics(run / "metrics.jsonl") if r["split"] == "train"] == [1, 2, 3]

    config = json.loads((source / "tokenizer_config.json").read_text())
    (source / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": SOURCES["zephyr"]}))
    with refused(CheckpointError, "chat template", cure="--config.train.accept_changes=True"):
        go(objective, data, source, run, 4)
    shutil.rmtree(source)

    export.main(["--checkpoint", str(run), "--output", str(out)])
    about, said = describe(out, template="source"), json.loads((out / "steerjax.json").read_text())
    assert (about.template, said["template"]["name"]) == (template, "source")
    with refused(ModelError, "source", "chatml", cure="--template"):
        describe(out, template="chatml")
    if objective == "regression":
        asked = write_rows(tmp_path / "asked.jsonl", some_conversations(4))
        for model in (run, out):
            rated = tmp_path / f"{model.name}.jsonl"
            annotate.main(["--model", str(model), "--input", str(asked), "--output", str(rated)])
            assert all(row["turns"][-1]["predicted_ratings"] for row in read_rows(rated))
        first, second = (read_rows(tmp_path / f"{model.name}.jsonl") for model in (run, out))
        assert [row["turns"] for row in first] == [row["turns"] for row in second]


def test_a_plain_reward_model(tmp_path):
    """`--template source` of somebody's classifier: read where transformers reads it, and exported with its form."""
    raw = TINY | CLASSIFIER | {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}
    model = source_folder(tmp_path / "model", "qwen2", raw)
    rated, asked = tmp_path / "rated.jsonl", write_rows(tmp_path / "asked.jsonl", some_conversations(4))
    annotate.main(["--model", str(model), "--template", "source", "--input", str(asked), "--output", str(rated)])
    assert all(len(row["turns"][-1]["predicted_ratings"]) == 1 for row in read_rows(rated))
    about = describe(model, template="source")
    conversation = Conversation((Turn("user", "Hi"), Turn("assistant", "Yo")))
    tokens, _ = Renderer(about.tokenizer, about.template, STEERLM).reward_tokens(conversation, 1)
    assert about.tokenizer.decode(tokens).endswith("<|im_start|>assistant\nYo<|im_end|>\n")
    (model / "steerjax.json").write_text('{"kind": "reward", "template": "source"}')
    assert describe(model).template == about.template
    assert named(about.template) is about.template
    form = dataclasses.asdict(about.template) | {"systm": []}
    (model / "steerjax.json").write_text(json.dumps({"kind": "reward", "template": form}))
    with refused(ModelError, "steerjax.json", "systm"):
        describe(model)
    (model / "steerjax.json").unlink()
    (model / "tokenizer_config.json").unlink()
    with refused(ModelError, str(model), cure="chatml"):
        describe(model, template="source")
