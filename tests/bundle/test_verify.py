"""No damage is believed: every file of checkpoints and exports, flipped, cut, emptied and deleted."""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

from steerjax import checksums
from steerjax.bundle import locate
from steerjax.bundle.store import CheckpointStore
from steerjax.chat.tokenizer import load_tokenizer
from steerjax.checksums import LIST
from steerjax.errors import CheckpointError, ModelError
from steerjax.export import export
from steerjax.hf.config_json import read_config
from steerjax.hf.export import CARD
from steerjax.parallel.processes import ALONE
from steerjax.training.resume import set_damaged_aside
from steerjax.training.workdir import keep_tokenizer
from tests.faults.damage import DAMAGES, cases, damage
from tests.hf.test_export import imported
from tests.hf_folders import TINY, provenance, random_tensors, write_folder
from tests.refusals import refused

STEPS = (3, 5)
TREE = {"head": np.arange(6.0, dtype=np.float32), "llama": {"x": np.ones((2, 3), np.float32)}}
STEP = {"step": np.zeros((), np.int32)}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A run of two checkpoints, and its export."""
    folder = tmp_path_factory.mktemp("written")
    source = write_folder(folder / "source", TINY, random_tensors(TINY))
    imported(source, folder / "import", checksums=True)
    run, model = folder / "run", read_config(source).model
    with CheckpointStore(run / "checkpoints", keep_last=2) as store:
        for step in STEPS:
            store.save(TREE, STEP, step, provenance(model, checksums=True), 1.0 / step)
    keep_tokenizer(load_tokenizer("embedded"), run)
    export(str(folder / "import"), folder / "out")
    return folder


@pytest.fixture
def run(written, tmp_path):
    return shutil.copytree(written / "run", tmp_path / "run")


def aside(run):
    set_damaged_aside(run / "checkpoints", ALONE, bool, whole=True)


def save_again(run):
    """Step 5, from what step 3 has."""
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), (TREE, STEP))
    with CheckpointStore(run / "checkpoints", keep_last=2) as store:
        assert store.latest_step() == 3
        store.save(
            *store.restore(3, *like), 5, json.loads((run / "checkpoints/3/provenance/metadata").read_text()), None
        )


def steps(run):
    return sorted(entry.name for entry in (run / "checkpoints").iterdir())


def test_damage_of_a_checkpoint_is_named_and_the_one_before_is_used(run, capsys):
    newest, before = (run / "checkpoints" / str(step) for step in STEPS[::-1])
    assert locate(run) == newest
    tried = 0
    for name, kind, seed in cases(newest, seed=0):
        file, whole = newest / name, (newest / name).read_bytes()
        damage(file, kind, seed)
        assert locate(run) == before, (name, kind)
        assert f"'{newest}' is damaged" in capsys.readouterr().err
        with refused(CheckpointError, str(newest), cure=str(before)):
            locate(newest)
        file.write_bytes(whole)
        tried += 1
    assert tried > 40
    assert locate(run) == newest


@pytest.mark.parametrize(("item", "opened"), [("params", "3"), ("training", "5")])
def test_a_model_is_opened_without_reading_its_training_state(run, monkeypatch, item, opened):
    monkeypatch.setattr(checksums, "SMALL", 0)
    damage(next((run / "checkpoints" / "5" / item).glob("d/*")), "flip", 0)
    assert locate(run).name == opened
    aside(run)
    assert steps(run) == ["3", "5.damaged"]


def test_foreign_files_and_a_folder_that_is_gone_are_damage(run):
    newest, before = (run / "checkpoints" / str(step) for step in STEPS[::-1])
    (newest / "params" / "more").write_text("")
    assert locate(run) == before
    (newest / "params" / "more").unlink()
    assert locate(run) == newest
    shutil.rmtree(newest / "params")
    assert locate(run) == before
    shutil.rmtree(before / "provenance")
    with refused(CheckpointError, str(newest), cure="train"):
        locate(run)


def test_damage_of_an_export_is_refused(written, tmp_path):
    out = shutil.copytree(written / "out", tmp_path / "out")
    for name, kind, seed in cases(out, seed=1, leave=(CARD,)):
        file, whole = out / name, (out / name).read_bytes()
        damage(file, kind, seed)
        with pytest.raises(ModelError, match=r"is not what was exported: .*\n  cure: export it again|config.json"):
            locate(out)
        file.write_bytes(whole)
    (out / CARD).write_text("mine")
    (out / ".gitattributes").write_text("")
    assert locate(out) == out
    (out / "steerjax.json").write_text((out / "steerjax.json").read_text().replace("extra_id", "chatml"))
    assert locate(out, verify=False) == out


def test_damage_of_a_runs_tokenizer_is_refused_and_a_resume_mends_it(written, tmp_path):
    from steerjax.bundle import describe

    run = shutil.copytree(written / "import", tmp_path / "run")
    keep_tokenizer(load_tokenizer("embedded"), run)
    describe(run)
    for name, kind, seed in cases(run / "tokenizer", seed=2):
        damage(run / "tokenizer" / name, kind, seed)
        if kind == "delete" and name == LIST:
            continue  # the tokenizer's own hash holds
        with refused((CheckpointError, ModelError), str(run / "tokenizer")):
            describe(run)
        keep_tokenizer(load_tokenizer("embedded"), run)
        describe(run)


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_resume_sets_damage_aside_and_saves_the_step_again(run, kind, capsys):
    file = next((run / "checkpoints" / "5" / "params").glob("d/*"))
    damage(file, kind, 0)
    aside(run)
    said = capsys.readouterr().err
    assert "5' is damaged" in said
    assert file.name in said
    assert steps(run) == ["3", "5.damaged"]
    save_again(run)
    assert locate(run) == run / "checkpoints" / "5"
    assert steps(run) == ["3", "5", "5.damaged"]


@pytest.mark.parametrize("left", ["", "-listed", "-removed"])
def test_what_a_kill_left_of_a_save_or_a_removal_is_in_no_ones_way(run, left):
    (run / "checkpoints" / "5").rename(run / "checkpoints" / f"5.orbax-checkpoint-tmp{left}")
    assert locate(run) == run / "checkpoints" / "3"
    save_again(run)
    assert steps(run) == ["3", "5"]


def test_a_checkpoint_whose_removal_ends_half_way_has_lost_its_name_first(run, monkeypatch):
    removed = []
    monkeypatch.setattr(shutil, "rmtree", lambda path, **_: removed.append(Path(path).name))
    with CheckpointStore(run / "checkpoints", keep_last=1) as store:
        store.save(TREE, STEP, 7, json.loads((run / "checkpoints/3/provenance/metadata").read_text()), 0.01)
    assert len(removed) == 2
    assert steps(run) == sorted(["7", *removed])
    assert all(name.endswith("-removed") for name in removed)


@pytest.mark.parametrize("kind", ["empty", "flip", "delete"])
def test_any_kept_checkpoints_metrics_may_be_damaged(run, kind):
    damage(run / "checkpoints/3/metrics/metrics", kind, 0)
    aside(run)
    with CheckpointStore(run / "checkpoints", keep_last=2) as store:
        assert (store.latest_step(), store.best_step()) == (5, 5)


def test_nothing_is_set_aside_where_all_are_damaged(run):
    for step in STEPS:
        damage(run / "checkpoints" / str(step) / "provenance" / "metadata", "truncate", step)
    with refused(CheckpointError, str(run / "checkpoints" / "5"), cure="delete"):
        aside(run)
    assert steps(run) == ["3", "5"]


def test_a_checkpoint_of_an_older_steerjax_cannot_be_verified_and_that_is_said(run, capsys):
    for step in STEPS:
        directory = run / "checkpoints" / str(step)
        (directory / LIST).unlink()
        said = json.loads((directory / "provenance" / "metadata").read_text())
        (directory / "provenance" / "metadata").write_text(json.dumps(said | {"checksums": False}))
    assert locate(run) == run / "checkpoints" / "5"
    assert "cannot be verified" in capsys.readouterr().err
    aside(run)
    assert "cannot be verified" in capsys.readouterr().err
    (run / "checkpoints/5/metrics/metrics").write_text("")
    aside(run)
    assert steps(run) == ["3", "5.damaged"]
