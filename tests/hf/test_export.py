"""Export: bit for bit what came in, loadable by transformers, and nothing half written."""

import dataclasses
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest

from steerjax.bundle import describe
from steerjax.bundle.build import abstract_parameters
from steerjax.chat.templates import TEMPLATES
from steerjax.errors import ConfigError, ModelError, SteerjaxError, WriteError
from steerjax.export import export, main
from steerjax.hf.config_json import read_config
from steerjax.hf.description import read_about
from steerjax.hf.tokenizer_files import stop_tokens
from steerjax.hf.weights import FolderReader, load_parameters
from steerjax.models.llama import CausalLM, RewardModel
from steerjax.parallel.mesh import MeshConfig, make_mesh
from steerjax.schema import HELPSTEER, Attribute, Schema
from tests.hf_folders import (
    CLASSIFIER,
    TINY,
    assert_same_tensors,
    provenance,
    random_tensors,
    read_folder,
    save_checkpoint,
    write_folder,
)
from tests.refusals import refused, says

OPTIONS = {"dtype": "auto", "max_shard_size": "5GB", "template": None}
EIGHT = MeshConfig(data=2, fsdp=2, tensor=2)


def imported(folder: Path, workdir: Path, mesh_config=EIGHT, devices: int = 8, **changes) -> Path:
    """A checkpoint with the parameters of a folder."""
    config = read_config(folder)
    labels = len(config.labels)
    model = RewardModel(config.model, labels) if labels else CausalLM(config.model)
    mesh = make_mesh(mesh_config, jax.devices()[:devices])
    params = load_parameters(FolderReader(folder, config), abstract_parameters(model, mesh))
    return save_checkpoint(workdir, params, provenance(config.model, "reward" if labels else "chat", **changes))


def leftovers(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# changes of TINY, devices, shard size
ROUND_TRIPS = {
    "tied": ({}, 8, "5GB"),
    "tied-one-device": ({}, 1, "100KB"),
    "untied-bfloat16-sharded": ({"tie_word_embeddings": False, "torch_dtype": "bfloat16"}, 8, "300KB"),
    "untied-float16": ({"tie_word_embeddings": False, "torch_dtype": "float16"}, 8, "5GB"),
    "biases": ({"attention_bias": True, "mlp_bias": True}, 8, "20KB"),
    "classifier": (CLASSIFIER, 8, "5GB"),
    "classifier-bfloat16": (CLASSIFIER | {"torch_dtype": "bfloat16", "tie_word_embeddings": False}, 1, "300KB"),
}


@pytest.mark.parametrize("case", ROUND_TRIPS)
def test_folder_checkpoint_folder(case, tmp_path):
    """Folder -> shards -> Orbax -> folder is the same, bit for bit, and so is the config."""
    change, devices, shard_size = ROUND_TRIPS[case]
    raw = TINY | change
    tensors = random_tensors(raw)
    source = write_folder(tmp_path / "source", raw, tensors, shards=2)
    mesh = EIGHT if devices == 8 else MeshConfig(data=1)
    imported(source, tmp_path / "run", mesh, devices)
    output = tmp_path / "exports" / "model"
    export(str(tmp_path / "run"), output, dtype=raw["torch_dtype"], max_shard_size=shard_size, template=None)
    assert_same_tensors(read_folder(output), tensors)
    assert (len(list(output.glob("*.safetensors"))) > 1) == (shard_size != "5GB")
    old, new = read_config(source), read_config(output)
    assert dataclasses.replace(new, raw={}) == dataclasses.replace(old, raw={})
    assert leftovers(tmp_path / "exports") == ["model"]
    for file in output.iterdir():
        assert file.stat().st_mode & 0o777 == (output / "config.json").stat().st_mode & 0o777


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_folder_to_folder(dtype, tmp_path):
    """Without a checkpoint between them; tokenizer, template and token ids stay."""
    raw = TINY | {"torch_dtype": dtype, "eos_token_id": [3, 5], "tie_word_embeddings": False}
    tensors = random_tensors(raw)
    source = write_folder(tmp_path / "source", raw, tensors)
    (source / "chat_template.jinja").write_text("{{ messages }}")
    (source / "pytorch_model.bin").write_bytes(b"not copied")
    export(str(source), tmp_path / "out", **OPTIONS | {"max_shard_size": "200KB"})
    assert_same_tensors(read_folder(tmp_path / "out"), tensors)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["torch_dtype"] == dtype
    assert config["eos_token_id"] == [3, 5]
    for name in ("chat_template.jinja", "tokenizer.model"):
        assert (tmp_path / "out" / name).read_bytes() == (source / name).read_bytes()
    assert not (tmp_path / "out" / "pytorch_model.bin").exists()


def test_folder_to_another_dtype(tmp_path):
    """bfloat16 rounds as ml_dtypes does, to nearest even; a bare model keeps its names."""
    raw = TINY | {"architectures": ["LlamaModel"]}
    tensors = random_tensors(raw)
    source = write_folder(tmp_path / "source", raw, tensors)
    export(str(source), tmp_path / "out", **OPTIONS | {"dtype": "bfloat16"})
    assert_same_tensors(read_folder(tmp_path / "out"), {n: t.astype(ml_dtypes.bfloat16) for n, t in tensors.items()})
    assert read_config(tmp_path / "out").dtype == "bfloat16"


def test_a_bare_model_gets_our_template(tmp_path):
    raw = TINY | {"architectures": ["LlamaModel"]}
    tensors = random_tensors(raw)
    source = write_folder(tmp_path / "source", raw, tensors)
    export(str(source), tmp_path / "out", **OPTIONS | {"template": "extra_id"})
    assert_same_tensors(read_folder(tmp_path / "out"), {f"model.{name}": t for name, t in tensors.items()})
    assert read_config(tmp_path / "out").architecture == "LlamaForCausalLM"
    assert "extra_id" in (tmp_path / "out" / "chat_template.jinja").read_text()


def test_the_index_lists_every_tensor(tmp_path):
    tensors = random_tensors(TINY)
    source = write_folder(tmp_path / "source", TINY, tensors)
    export(str(source), tmp_path / "out", **OPTIONS | {"max_shard_size": "30KB"})
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    assert index["weight_map"].keys() == tensors.keys()
    names = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert sorted(set(index["weight_map"].values())) == names
    assert names[-1] == f"model-{len(names):05}-of-{len(names):05}.safetensors"
    sizes = [path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors")]
    assert sorted(sizes)[-2] < 35_000 < sorted(sizes)[-1]  # the embedding stands alone


def test_a_reward_model_folder(tmp_path):
    """All files of an exported reward model, with its token ids and provenance."""
    source = write_folder(tmp_path / "source", TINY | CLASSIFIER, random_tensors(TINY | CLASSIFIER))
    checkpoint = imported(source, tmp_path / "run")
    (tmp_path / "run" / "metrics.jsonl").write_text(
        '{"step": 3, "split": "validation", "attributes/helpfulness/mse": 9.0}\n'
        '{"step": 7, "split": "validation", "loss": 0.5, "attributes/helpfulness/mse": 0.4321}\n'
    )
    export(str(checkpoint), tmp_path / "out", **OPTIONS)
    assert set(leftovers(tmp_path / "out")) == {
        "README.md", "chat_template.jinja", "checksums.json", "config.json", "model.safetensors",
        "special_tokens_map.json",
        "steerjax.json", "tokenizer.json", "tokenizer.model", "tokenizer_config.json",
    }  # fmt: skip
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architectures"] == ["LlamaForSequenceClassification"]
    assert config["problem_type"] == "regression"
    assert config["num_labels"] == 5
    assert config["pad_token_id"] == 0
    about = json.loads((tmp_path / "out" / "steerjax.json").read_text())
    assert [attribute["name"] for attribute in about["attributes"]] == list(CLASSIFIER["label2id"])
    assert about["provenance"]["step"] == 7
    assert about["template"] == "extra_id"
    assert "0.432" in (tmp_path / "out" / "README.md").read_text()


def test_a_chat_model_stops_at_the_end_of_its_turn(tmp_path):
    source = write_folder(tmp_path / "source", TINY, random_tensors(TINY))
    imported(source, tmp_path / "run", default_ratings={"helpfulness": 4.0})
    export(str(tmp_path / "run"), tmp_path / "out", **OPTIONS)
    from steerjax.chat.tokenizer import load_tokenizer

    tokenizer = load_tokenizer("embedded")
    end = tokenizer.token_id("<extra_id_1>")
    generation = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert generation["eos_token_id"] == stop_tokens(tokenizer, TEMPLATES["extra_id"])
    assert json.loads((tmp_path / "out" / "config.json").read_text())["eos_token_id"] == end
    assert json.loads((tmp_path / "out" / "steerjax.json").read_text())["default_ratings"] == {"helpfulness": 4.0}


def test_attributes_of_a_plain_chat_model(tmp_path, capsys):
    """--schema and --default-ratings; an export's own defaults can be changed, its attributes not."""
    source = write_folder(tmp_path / "source", TINY, random_tensors(TINY))
    plain = ["--checkpoint", str(source), "--template", "chatml"]
    main([*plain, "--output", str(tmp_path / "out"), "--schema", "helpsteer", "--default-ratings", "verbosity=1"])
    about = describe(tmp_path / "out")
    assert (about.schema, about.default_ratings) == (HELPSTEER, {"verbosity": 1.0})
    assert 'default_ratings = {"verbosity": 1}' in (tmp_path / "out" / "chat_template.jinja").read_text()
    ours = ["--checkpoint", str(tmp_path / "out"), "--output", str(tmp_path / "again")]
    main([*ours, "--default-ratings", "helpfulness=4,coherence=3"])
    assert describe(tmp_path / "again").default_ratings == {"helpfulness": 4.0, "coherence": 3.0}
    assert_same_tensors(read_folder(tmp_path / "again"), read_folder(source))
    ours[-1] = str(tmp_path / "no")
    for arguments, facts, cure in (
        ([*plain, *ours[2:], "--default-ratings", "verbosity=1"], [], "--schema"),
        ([*ours, "--schema", "oasst"], ["--schema"], "leave them out"),
        ([*ours, "--default-ratings", "humor=1"], ["--default-ratings", "humor"], "verbosity"),
        ([*ours, "--default-ratings", "verbosity=9"], ["--default-ratings", "verbosity", "9"], "0 to 4"),
        ([*plain[:2], *ours[2:], "--schema", "helpsteer"], [], "--template"),
    ):
        with pytest.raises(SystemExit):
            main(arguments)
        says(capsys.readouterr().err, *facts, cure=cure)
    assert leftovers(tmp_path) == ["again", "out", "source"]


@pytest.mark.parametrize("kind", ["chat", "reward"])
def test_attributes_of_the_users_own(kind, tmp_path):
    """Their names and ranges travel from a checkpoint to config.json, steerjax.json, template and card."""
    schema = Schema((Attribute("wit", 1, 5, "how funny"), Attribute("depth", 1, 10)))
    labels = {"id2label": {"0": "wit", "1": "depth"}, "label2id": {"wit": 0, "depth": 1}}
    raw = TINY | (CLASSIFIER | labels if kind == "reward" else {})
    source = write_folder(tmp_path / "source", raw, random_tensors(raw))
    ratings = {"depth": 10.0} if kind == "chat" else None
    imported(source, tmp_path / "run", attributes=schema.to_json(), default_ratings=ratings)
    export(str(tmp_path / "run"), tmp_path / "out", **OPTIONS)
    about = describe(tmp_path / "out")
    assert (about.schema, about.kind, about.default_ratings) == (schema, kind, ratings)
    assert read_config(tmp_path / "out").labels == (schema.names if kind == "reward" else ())
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| 0 | wit | 1 to 5 | how funny |" in card
    assert "| 1 | depth | 1 to 10 |" in card
    assert '"wit": [1, 5' in (tmp_path / "out" / "chat_template.jinja").read_text()


def test_a_reward_model_takes_no_default_ratings(tmp_path):
    source = write_folder(tmp_path / "source", TINY | CLASSIFIER, random_tensors(TINY | CLASSIFIER))
    with refused(ConfigError, "--schema", "--default-ratings", cure="leave them out"):
        export(str(source), tmp_path / "out", **OPTIONS | {"template": "chatml"}, default_ratings="verbosity=1")


def test_what_no_server_can_load_is_refused(tmp_path):
    raw = TINY | CLASSIFIER
    source = write_folder(tmp_path / "source", raw, random_tensors(raw))
    config = read_config(source)
    imported(source, tmp_path / "mean", readout="mean")
    with refused(ModelError, "readout", "mean"):
        export(str(tmp_path / "mean"), tmp_path / "out", **OPTIONS)

    model = RewardModel(config.model, 5, use_bias=True)
    shapes = abstract_parameters(model, make_mesh(EIGHT))
    params = jax.tree.map(lambda x: jax.device_put(np.zeros(x.shape, x.dtype), x.sharding), shapes)
    save_checkpoint(tmp_path / "bias", params, provenance(config.model, "reward"))
    with refused(ModelError, "head", "bias"):
        export(str(tmp_path / "bias"), tmp_path / "out", **OPTIONS)
    with refused(ModelError, "attributes", "template"):
        export(str(source), tmp_path / "out", **OPTIONS | {"template": "extra_id"})
    assert leftovers(tmp_path) == ["bias", "mean", "source"]


@pytest.mark.short
def test_numbers_that_overflow_are_named(tmp_path):
    tensors = random_tensors(TINY)
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = -70000.0
    source = write_folder(tmp_path / "source", TINY, tensors)
    with refused(ModelError, "model.layers.1.mlp.up_proj.weight", "70000", "float16"):
        export(str(source), tmp_path / "out", **OPTIONS | {"dtype": "float16"})
    assert leftovers(tmp_path) == ["source"]
    export(str(source), tmp_path / "out", **OPTIONS | {"dtype": "bfloat16"})


def big_tokenizer(folder: Path) -> None:
    """A tokenizer with more tokens than the embedding has rows."""
    raw = TINY | {"vocab_size": 4095}
    write_folder(folder, raw, random_tensors(raw))


def unknown_rope(folder: Path) -> None:
    raw = TINY | {"rope_scaling": {"rope_type": "longrope", "factor": 2.0}}
    write_folder(folder, raw, random_tensors(TINY))


def no_config(folder: Path) -> None:
    write_folder(folder, TINY, random_tensors(TINY))
    (folder / "config.json").unlink()


def pickle_only(folder: Path) -> None:
    write_folder(folder, TINY, random_tensors(TINY))
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def truncated(folder: Path) -> None:
    write_folder(folder, TINY, random_tensors(TINY), shards=2)
    file = folder / "model-00002-of-00002.safetensors"
    file.write_bytes(file.read_bytes()[:-4])


def missing_file(folder: Path) -> None:
    write_folder(folder, TINY, random_tensors(TINY), shards=2)
    (folder / "model-00002-of-00002.safetensors").unlink()


def wrong_shape(folder: Path) -> None:
    write_folder(folder, TINY | {"intermediate_size": 47}, random_tensors(TINY))


def extra_tensor(folder: Path) -> None:
    write_folder(folder, TINY, random_tensors(TINY) | {"lm_head.bias": np.zeros(3, np.float32)})


def no_tokenizer(folder: Path) -> None:
    write_folder(folder, TINY, random_tensors(TINY))
    (folder / "tokenizer.model").unlink()


# What the error names.
ERRORS = {
    truncated: ("model-00002-of-00002.safetensors", "truncated"),
    missing_file: ("model-00002-of-00002.safetensors", "missing"),
    wrong_shape: ("model.layers.0.mlp.gate_proj.weight", "(48, 32)", "(47, 32)"),
    extra_tensor: ("lm_head.bias", "(3,)", "absent"),
    unknown_rope: ("config.json", "rope_type", "longrope"),
    no_config: ("config.json",),
    pickle_only: ("pytorch_model.bin", "model.safetensors"),
    big_tokenizer: ("tokenizer", "4096", "embedding", "4095"),
    no_tokenizer: ("tokenizer.json",),
}


@pytest.mark.parametrize("breaks", ERRORS, ids=lambda f: f.__name__)
def test_errors_leave_nothing_behind(breaks, tmp_path, capsys):
    breaks(tmp_path / "source")
    arguments = ["--checkpoint", str(tmp_path / "source"), "--output", str(tmp_path / "out"), "--template", "extra_id"]
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    says(said, *ERRORS[breaks])
    with refused(SteerjaxError, str(tmp_path / "source"), *ERRORS[breaks]):
        export(str(tmp_path / "source"), tmp_path / "out", **OPTIONS | {"template": "extra_id"})
    assert leftovers(tmp_path) == ["source"]


def test_outputs_that_cannot_be_written(tmp_path, monkeypatch):
    source = str(write_folder(tmp_path / "source", TINY, random_tensors(TINY)))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("")
    for output in ("full", "full/file", "source"):
        with refused(ModelError, str(tmp_path / output), cure="another --output"):
            export(source, tmp_path / output, **OPTIONS)
    with refused(WriteError, str(tmp_path / "full" / "file" / "below"), cure="move the file away"):
        export(source, tmp_path / "full" / "file" / "below", **OPTIONS)
    (tmp_path / "empty").mkdir()
    export(source, tmp_path / "empty", **OPTIONS)
    assert (tmp_path / "empty" / "config.json").is_file()

    import safetensors.numpy

    def no_room(*_, **__):
        raise safetensors.SafetensorError("IoError: No space left on device")

    monkeypatch.setattr(safetensors.numpy, "save_file", no_room)
    with refused(WriteError, str(tmp_path / "out"), "No space left on device"):
        export(source, tmp_path / "out", **OPTIONS)
    assert leftovers(tmp_path) == ["empty", "full", "source"]


def test_a_killed_export_does_not_look_whole(tmp_path, monkeypatch):
    """SIGKILL cannot be caught: what is left has another name."""
    source = write_folder(tmp_path / "source", TINY, random_tensors(TINY))
    code = (
        "import os, safetensors.numpy as s; from steerjax.export import main\n"
        "s.save_file = lambda *a, **k: os.kill(os.getpid(), 9)\n"
        f"main(['--checkpoint', {str(source)!r}, '--output', {str(tmp_path / 'out')!r}])"
    )
    killed = subprocess.run([sys.executable, "-c", code], env=environment(), check=False)
    assert killed.returncode == -9
    assert {name.split("-")[0] for name in leftovers(tmp_path)} == {".out.lock", ".out.partial", "source"}
    export(str(source), tmp_path / "out", **OPTIONS)
    assert leftovers(tmp_path) == ["out", "source"]


def test_sizes_and_dtypes_that_are_none(tmp_path):
    source = str(write_folder(tmp_path / "source", TINY, random_tensors(TINY)))
    for size in ("5", "GB", "5GiB", "-1GB", "infGB", "1e3 GB"):
        with refused(ConfigError, "--max-shard-size", size, cure="5GB"):
            export(source, tmp_path / "out", **OPTIONS | {"max_shard_size": size})
    with refused(ConfigError, "--dtype", "float64", cure="bfloat16"):
        export(source, tmp_path / "out", **OPTIONS | {"dtype": "float64"})
    assert leftovers(tmp_path) == ["source"]
    export(source, tmp_path / "out", **OPTIONS | {"max_shard_size": "1.5 mb"})
    assert len(list((tmp_path / "out").glob("*.safetensors"))) == 1


ABOUT = {"kind": "chat", "template": "extra_id", "attributes": [{"name": "wit", "low": 1, "high": 10}]}
# What changes in a good steerjax.json, and what the error names.
BAD_ABOUT = [
    ({"readout": "lasst"}, "readout 'lasst'"),
    ({"kind": "classifier"}, "kind 'classifier'"),
    ({"template": None}, "template None"),
    ({"attributes": ["wit"]}, "attributes.0 'wit'"),
    ({"attributes": [{"name": "wit", "low": "1"}]}, "attributes.0.low '1'"),
    ({"attributes": 2 * ABOUT["attributes"]}, "attributes 'wit' twice"),
    ({"default_ratings": {"wit": True}}, "default_ratings.wit True"),
    ({"default_ratings": {"wit": 11}}, "default_ratings 'wit' 11 1..10"),
    ({"default_ratings": {"humor": 1}}, "default_ratings 'humor'"),
    ({"provenance": []}, "provenance []"),
    ({"defaults": {}}, "defaults default_ratings"),
]


@pytest.mark.parametrize(("change", "said"), BAD_ABOUT, ids=lambda value: None)
def test_steerjax_json_is_typed(change, said, tmp_path):
    file = tmp_path / "steerjax.json"
    assert read_about(tmp_path) is None
    file.write_text(json.dumps(ABOUT | {"default_ratings": {"wit": 10}}))
    about = read_about(tmp_path)
    assert (about.schema.names, about.readout, about.default_ratings) == (("wit",), "last", {"wit": 10.0})
    file.write_text(json.dumps(ABOUT | change))
    with refused(ModelError, str(file), *said.split()):
        read_about(tmp_path)


def environment() -> dict[str, str]:
    root = Path(__file__).resolve().parents[2]
    return os.environ | {"PYTHONPATH": os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])}


def test_the_command(tmp_path, capsys):
    source = write_folder(tmp_path / "source", TINY, random_tensors(TINY))
    arguments = ["--checkpoint", str(source), "--output", str(tmp_path / "out")]
    main(arguments)
    assert str(tmp_path / "out") in capsys.readouterr().out
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    says(capsys.readouterr().err, str(tmp_path / "out"), cure="--output")


def test_the_command_starts_without_jax():
    probe = "import sys, steerjax.export; print([m for m in ('jax', 'torch', 'numpy') if m in sys.modules])"
    seen = subprocess.run([sys.executable, "-c", probe], env=environment(), capture_output=True, text=True, check=True)
    assert seen.stdout.strip() == "[]"


WORKER = """
import sys, jax
source, workdir, port, index = sys.argv[1:]
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 2)
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(f"localhost:{port}", 2, int(index))
from pathlib import Path
from steerjax.parallel.mesh import MeshConfig
from tests.hf.test_export import imported
from steerjax.hf import weights
read, original = 0, weights.read_tensor
def counting(*arguments):
    global read
    value = original(*arguments)
    read += value.nbytes
    return value
weights.read_tensor = counting
imported(Path(source), Path(workdir), MeshConfig(data=1, fsdp=2, tensor=2), 4)
print("read", read)
"""


def test_two_processes(tmp_path):
    """Each reads its part, they save one checkpoint, and the export is the folder again."""
    raw = TINY | {"tie_word_embeddings": False, "torch_dtype": "bfloat16"}
    tensors = random_tensors(raw)
    source = write_folder(tmp_path / "source", raw, tensors, shards=2)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, str(source), str(tmp_path / "run"), str(port), str(index)],
            env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for index in range(2)
    ]  # fmt: skip
    try:
        outputs = [worker.communicate(timeout=120) for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    assert [worker.returncode for worker in workers] == [0, 0], outputs
    # Half of every matrix, and every norm.
    norms = sum(tensor.nbytes for name, tensor in tensors.items() if tensor.ndim == 1)
    total = sum(tensor.nbytes for tensor in tensors.values())
    assert [int(out.split()[-1]) for out, _ in outputs] == [(total + norms) // 2] * 2
    export(str(tmp_path / "run"), tmp_path / "out", **OPTIONS | {"dtype": "bfloat16"})
    assert_same_tensors(read_folder(tmp_path / "out"), tensors)


@pytest.mark.parity
@pytest.mark.parametrize("kind", ["chat", "chat-untied-sharded", "reward"])
def test_transformers_loads_the_export(kind, tmp_path):
    """The export's logits, from transformers, are the source's (loaded by transformers too)."""
    import torch
    import transformers

    change = {"chat": {}, "chat-untied-sharded": {"tie_word_embeddings": False}, "reward": CLASSIFIER}[kind]
    raw = TINY | change
    tensors = {name: 0.1 * tensor for name, tensor in random_tensors(raw).items()}
    source = write_folder(tmp_path / "source", raw, tensors)
    imported(source, tmp_path / "run")
    options = OPTIONS | ({"max_shard_size": "300KB"} if "sharded" in kind else {})
    export(str(tmp_path / "run"), tmp_path / "out", **options)
    family = "AutoModelForSequenceClassification" if kind == "reward" else "AutoModelForCausalLM"
    tokens = torch.tensor(np.random.default_rng(0).integers(5, 4096, (2, 20)))
    logits = []
    for folder in (source, tmp_path / "out"):
        model, info = getattr(transformers, family).from_pretrained(folder, output_loading_info=True)
        assert not any(info.values()), info
        with torch.no_grad():
            logits.append(model(tokens).logits.numpy())
    assert np.abs(logits[0]).max() > 0.01
    np.testing.assert_array_equal(logits[1], logits[0])
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.chat_template


def test_an_export_names_no_folder_of_its_maker(tmp_path):
    folder = write_folder(tmp_path / "source", TINY, random_tensors(TINY))
    more = {"base_model": "/home/me/runs/old/checkpoints/4", "data": {"/home/me/rows.jsonl": "00", "hub:a/b": "11"}}
    imported(folder, tmp_path / "run", **more, system_prompt="/no_think")
    export(str(tmp_path / "run"), tmp_path / "out")
    text = (tmp_path / "out" / "steerjax.json").read_text()
    said = json.loads(text)["provenance"]
    assert "/home" not in text
    assert str(tmp_path) not in text
    assert (said["base_model"], said["data"]) == ("old/checkpoints/4", {"rows.jsonl": "00", "hub:a/b": "11"})
    assert said["system_prompt"] == "/no_think"


def test_a_copied_tokenizer_config_names_no_code(tmp_path):
    """transformers would ask to run it, and it is not beside the weights."""
    folder = write_folder(tmp_path / "source", TINY, random_tensors(TINY))
    config = {"model_max_length": 99, "auto_map": {"AutoTokenizer": ["tokenization_own.Own", None]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    export(str(folder), tmp_path / "out")
    assert json.loads((tmp_path / "out" / "tokenizer_config.json").read_text()) == {"model_max_length": 99}
