"""SteerLM 2.0's driver: two iterations on tiny random models; killed in each stage it goes on to the same."""

import json

import numpy as np
import pytest

from steerjax.config import default_config, resolve
from steerjax.iteration.driver import prepare, sample_groups
from steerjax.iteration.options import Options
from steerjax.schema import HELPSTEER
from tests.hf_folders import CLASSIFIER, TINY, random_tensors, write_folder
from tests.reward_models import write_rows

ASKED = "helpfulness=1,verbosity=0"


def model_folder(folder, kind, config, scale):
    """Tiny, with norms that do nothing, and a label line's attributes."""
    config = TINY | {"num_hidden_layers": 2, "tie_word_embeddings": False} | config
    tensors = random_tensors(config)
    for name, tensor in tensors.items():
        tensors[name] = np.ones_like(tensor) if "norm" in name else scale * tensor
    if kind == "chat":
        tensors["lm_head.weight"][3] *= 5  # the end of a text: answers are short
    write_folder(folder, config, tensors)
    about = {"kind": kind, "template": "extra_id", "attributes": HELPSTEER.to_json()}
    (folder / "steerjax.json").write_text(json.dumps(about))
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return model_folder(folder / "chat", "chat", {}, 0.3), model_folder(folder / "reward", "reward", CLASSIFIER, 0.3)


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    history = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello", "ratings": {"verbosity": 1}},
    ]
    rows = [{"prompt": f"Name a prime above {n}."} for n in range(6)]
    rows += [{"turns": [*history, {"role": "user", "content": f"{n}?"}], "id": "one name"} for n in range(2)]
    return write_rows(tmp_path_factory.mktemp("prompts") / "prompts.jsonl", [*rows, rows[0]])


def experiment(chat, **changes):
    config = default_config()
    config.objectives = ("sft",)
    config.model.source = str(chat)
    config.batch.update(rows=2, row_length=256)
    config.train.update(steps=2, plots=False)
    return resolve(config.to_dict())


def options(reward, prompts, **changes):
    given = {"samples": 4, "max_new_tokens": 16, "attributes": ASKED} | changes
    return Options(prompts=str(prompts), reward_model=str(reward), **given)


def test_stages(models, prompts, tmp_path, capsys):
    chat, reward = models
    setup = prepare(experiment(chat), options(reward, prompts), tmp_path)
    groups, found = sample_groups(setup, setup.experiment, 1, setup.first)
    print(found)
    print(groups.read_text()[:1500])
    print(capsys.readouterr().out)
