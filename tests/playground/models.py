"""A tiny chat model and a reward model with attributes of their own."""

import json
from pathlib import Path

from steerjax.schema import Attribute, Schema
from tests.reward_models import chat_folder, reward_folder

EVIL = "how <img src=x onerror=alert(1)> *funny* [a](http://example.com)"
OWN = Schema((Attribute("wit", 1, 5, EVIL), Attribute("depth", 1, 10, "how deep it goes")))


def play_folders(folder: Path) -> dict[str, Path]:
    """Folders `chat` and `reward`."""
    labels = {"id2label": dict(zip("01", OWN.names, strict=True)), "label2id": {n: i for i, n in enumerate(OWN.names)}}
    made = {"chat": chat_folder(folder / "chat"), "reward": reward_folder(folder / "reward", **labels)}
    for kind, path in made.items():
        about = {"kind": kind, "template": "extra_id", "attributes": OWN.to_json()}
        (path / "steerjax.json").write_text(json.dumps(about))
    return made
