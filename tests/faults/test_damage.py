"""One damage at a time to any file that we write: it is noticed, or it changes nothing. The functions that the commands
call decide; of a sample the commands themselves."""

import contextlib
import dataclasses
import io
import json
import random
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import pytest

from steerjax import annotate
from steerjax.bundle import describe, locate, open_bundle, verify
from steerjax.bundle.build import abstract_parameters
from steerjax.bundle.store import CheckpointStore
from steerjax.chat.tokenizer import load_tokenizer
from steerjax.checksums import folder_checksum
from steerjax.config import default_config, resolve
from steerjax.data.loading import Skipped
from steerjax.errors import SteerjaxError
from steerjax.export import export
from steerjax.hf.config_json import read_config
from steerjax.hf.export import CARD
from steerjax.hf.weights import FolderReader, load_parameters
from steerjax.inference.job import appended, resumable
from steerjax.models.llama import RewardModel
from steerjax.parallel.mesh import MeshConfig, make_mesh
from steerjax.parallel.processes import ALONE
from steerjax.report.records import read_metrics
from steerjax.training.metrics import MetricsWriter
from steerjax.training.resume import set_damaged_aside
from steerjax.training.source import with_source
from steerjax.training.workdir import claim_workdir, keep_tokenizer
from tests.faults.damage import damage, damageable
from tests.hf_folders import provenance
from tests.refusals import says
from tests.reward_models import reward_folder

STEPS = (3, 5)
OLDER, REFUSED, SAID, BELIEVED = "the older checkpoint", "one sentence", "left out, and said", "BELIEVED"
HARMLESS = "harmless by design: "  # what follows says which design
SETTINGS = {"command": "annotate", "seed": 1, "rate": 1e-05, "attributes": [{"name": "a", "low": 0.0}], "part": "1/1"}
ROWS = [{"id": f"r{n}", "turns": [{"role": "user", "content": "é " * n}], "score": n / 7} for n in range(12)]


class Door(NamedTuple):
    """Files that are opened together, and what becomes of an opening: why it is right, or SteerjaxError."""

    folder: Path
    opened: Callable[[], str]
    harmless: Callable[[Path, bytes, bytes], str] = lambda path, before, after: ""  # why a damage may be believed


class Stopped(Exception):
    pass


class Written:
    """A run of two checkpoints, its export, and the outputs of jobs: finished and not."""

    def __init__(self, root: Path):
        self.root, self.run, self.out = root, root / "run", root / "out"
        source = reward_folder(root / "source", context=128)
        model = read_config(source)
        module = RewardModel(model.model, len(model.labels))
        one = jax.devices()[:1]
        self.like = abstract_parameters(module, make_mesh(MeshConfig(), one))
        sharding = jax.sharding.SingleDeviceSharding(*one)
        self.training = {"step": jax.ShapeDtypeStruct((), np.int32, sharding=sharding)}
        self.params = load_parameters(FolderReader(source, model), self.like)
        with CheckpointStore(self.run / "checkpoints", keep_last=2) as store:
            for number in STEPS:
                said = provenance(model.model, "reward", checksums=True)
                store.save(self.params, {"step": np.int32(number)}, number, said, 1.0 / number)
        keep_tokenizer(load_tokenizer("embedded"), self.run)
        export(str(self.run), self.out)
        config = default_config()
        config.data.train = ("rows.jsonl",)
        self.experiment = resolve(config.to_dict())
        claim_workdir(self.run, self.experiment)
        self.metrics(0, lambda writer: [writer.write(n, "train", {"loss": 1 / n}) for n in range(1, STEPS[1] + 1)])
        for name in ("finished", "begun"):
            with contextlib.suppress(Stopped), resumable(root / name / "out.jsonl", SETTINGS) as output:
                output.skip([Skipped("in.jsonl", line, "too long") for line in range(4)])
                output.add(0, ROWS)
                if name == "begun":
                    raise Stopped
        with appended(self.root / "judgments" / "judgments.jsonl") as (_, add):
            for row in ROWS:
                add(row)

    def metrics(self, step: int, use: Callable[[MetricsWriter], object] = lambda writer: None) -> None:
        with MetricsWriter(self.run, step, (), {}, active=True) as writer:
            use(writer)

    def doors(self) -> dict[str, Door]:
        newest, before = (self.run / "checkpoints" / str(step) for step in STEPS[::-1])

        def checkpoint() -> str:
            with pytest.raises(SteerjaxError) as caught:
                locate(newest)
            says(caught.value, str(newest), cure=str(before))
            assert locate(self.run) == before
            return OLDER

        return {
            "checkpoint": Door(newest, checkpoint),
            "export": Door(self.out, lambda: describe(self.out) and "", card),
            "tokenizer of a run": Door(self.run / "tokenizer", lambda: describe(self.run) and ""),
            "finished output": Door(self.root / "finished", lambda: self.job("finished"), same_json),
            "output that is begun": Door(self.root / "begun", lambda: self.job("begun"), same_json),
            "judgments": Door(self.root / "judgments", self.judgments),
            "config.json of a run": Door(self.run / "config.json", self.claimed),
            "metrics.jsonl of a run": Door(self.run / "metrics.jsonl", self.resumed),
        }

    def job(self, name: str) -> str:
        """Opens an output as the next run does; says whether that begins it anew."""
        with contextlib.suppress(Stopped), resumable(self.root / name / "out.jsonl", SETTINGS) as output:
            if output.done == 0:
                return f"{HARMLESS}no row is left, and all are made again"
            raise Stopped
        return ""

    def judgments(self) -> str:
        """Rows are those that were written, or fewer; the name of a checksum may be lost."""
        with appended(self.root / "judgments" / "judgments.jsonl") as (found, _):
            rows = [row for _, row in found]
        if any(row | written != row for row, written in zip(rows, ROWS, strict=False)):
            return ""
        lost = "a line that is cut is made again" if len(rows) < len(ROWS) else "the name of a line's checksum is lost"
        return HARMLESS + lost

    def claimed(self) -> str:
        """What the command says holds; the file says only whether it may."""
        claim_workdir(self.run, self.experiment)
        same = json.loads((self.run / "config.json").read_text()) == json.loads(self.experiment.to_json())
        return f"{HARMLESS}what a resume may change is written anew" if same else ""

    def resumed(self) -> str:
        """Records are those that were written, or fewer."""
        said = io.StringIO()
        with contextlib.redirect_stderr(said):
            self.metrics(STEPS[1])
        found = [(record["step"], record["loss"]) for record in read_metrics(self.run / "metrics.jsonl")]
        if not set(found) <= {(n, 1 / n) for n in range(1, STEPS[1] + 1)}:
            return ""
        return SAID if "left out" in said.getvalue() else f"{HARMLESS}a log whose end is missing, as a kill leaves it"


def card(path: Path, before: bytes, after: bytes) -> str:
    return "people edit the card" if path.name == CARD else ""


def same_json(path: Path, before: bytes, after: bytes) -> str:
    with contextlib.suppress(ValueError):
        if path.suffix == ".json" and json.loads(after) == json.loads(before):
            return "the same JSON"
    return ""


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    return Written(tmp_path_factory.mktemp("written"))


def outcome(door: Door, file: Path, before: bytes) -> str:
    after = file.read_bytes()
    try:
        found = door.opened()
    except SteerjaxError as error:
        says(error)
        return REFUSED
    why = door.harmless(file, before, after)
    return found or (f"{HARMLESS}{why}" if why else BELIEVED)


@contextlib.contextmanager
def damaged(file: Path, kind: str, seed: int):
    """Damage that is undone, with all that an opening made of the files beside it."""
    kept = {path: path.read_bytes() for path in file.parent.iterdir() if path.is_file()}
    damage(file, kind, seed)
    try:
        yield kept[file]
    finally:
        for path in file.parent.iterdir():
            if path.is_file() and path not in kept:
                path.unlink()
        for path, content in kept.items():
            path.write_bytes(content)


@pytest.mark.parametrize(
    ("flips", "truncations"), [(0, 0), pytest.param(1000, 200, marks=pytest.mark.faults)], ids=["short", "long"]
)
def test_no_damage_is_believed(written, tried, capsys, flips, truncations):
    """Each file once, then so many in all, of doors and files by chance."""
    doors, draw = written.doors(), random.Random(0)
    files = {name: [door.folder] if door.folder.is_file() else damageable(door.folder) for name, door in doors.items()}
    believed, counts = [], Counter()
    for kind, count in (("flip", flips), ("truncate", truncations)):
        todo = [(name, file) for name in doors for file in files[name]]
        more = (draw.choice(list(doors)) for _ in range(count - len(todo)))
        for number, (name, file) in enumerate([*todo, *((name, draw.choice(files[name])) for name in more)]):
            with damaged(file, kind, number) as before:
                try:
                    found = outcome(doors[name], file, before)
                except BaseException as error:
                    error.add_note(f"{kind} {number} of {file}")
                    raise
            counts[f"{name}, {kind}: {found}"] += 1
            if found == BELIEVED:
                believed.append(f"{kind} {number} of {file.relative_to(written.root)}")
    for kind, count in counts.items():
        tried("damage", kind, count, count if kind.endswith(BELIEVED) else 0)
    capsys.readouterr()
    assert not believed, believed


def test_a_command_reads_a_model_once(written, tmp_path, monkeypatch, capsys):
    read, rows = [], tmp_path / "in.jsonl"
    rows.write_text(json.dumps({"prompt": "p", "response": "r"}) + "\n")
    compare, run, out = verify.what_is_wrong, str(written.run), str(written.out)

    def compared(folder: Path, **how) -> str:
        read.append(folder.name)
        return compare(folder, **how)

    monkeypatch.setattr(verify, "what_is_wrong", compared)
    rate = [f"--input={rows}", f"--output={tmp_path / 'out.jsonl'}"]
    trained = dataclasses.replace(written.experiment.model, source=out)
    for use, expected in (
        (lambda: annotate.main([f"--model={run}", *rate]), ["5"]),
        (lambda: annotate.main([f"--model={run}", "--no-verify", *rate]), []),
        (lambda: export(run, tmp_path / "one"), ["5"]),
        (lambda: export(out, tmp_path / "two"), ["out"]),
        (lambda: export(out, tmp_path / "three", scalar="helpfulness"), ["out"]),
        (lambda: export(out, tmp_path / "four", verify=False), []),
        (lambda: with_source(dataclasses.replace(written.experiment, model=trained)), ["out"]),
    ):
        read.clear()
        use()
        assert read == expected


def opened(run: Path, out: Path, written: Written) -> None:
    assert open_bundle(run).description.path == run / "checkpoints" / "3"


def restored(run: Path, out: Path, written: Written) -> None:
    set_damaged_aside(run / "checkpoints", ALONE, bool, whole=True)
    with CheckpointStore(run / "checkpoints", keep_last=2) as store:
        params, training = store.restore(store.latest_step(), written.like, written.training)
    assert training["step"] == STEPS[0]
    jax.tree.map(np.testing.assert_array_equal, params, written.params)


def exported(run: Path, out: Path, written: Written) -> None:
    export(str(run), run.parent / "new")
    assert json.loads((run.parent / "new" / "steerjax.json").read_text())["provenance"]["step"] == STEPS[0]


def annotated(run: Path, out: Path, written: Written) -> None:
    """The run's older checkpoint rates; the export is refused."""
    (run.parent / "in.jsonl").write_text(json.dumps({"prompt": "p", "response": "r"}) + "\n")
    words = [f"--input={run.parent / 'in.jsonl'}", f"--output={run.parent / 'out.jsonl'}"]
    annotate.main([f"--model={run}", *words])
    settings = json.loads((run.parent / "out.jsonl.settings.json").read_text())
    assert settings["model"] == folder_checksum(run / "checkpoints" / "3")
    with pytest.raises(SystemExit) as caught:
        annotate.main([f"--model={out}", *words])
    assert caught.value.code == 2


@pytest.mark.faults
@pytest.mark.parametrize("use", [opened, restored, exported, annotated], ids=lambda use: use.__name__)
def test_a_sample_by_the_commands_themselves(written, tried, tmp_path, capsys, use):
    draw = random.Random(use.__name__)
    for number in range(10):
        run, out = (shutil.copytree(path, tmp_path / str(number) / path.name) for path in (written.run, written.out))
        damage(draw.choice(damageable(run / "checkpoints" / "5")), draw.choice(("flip", "truncate")), number)
        damage(draw.choice(damageable(out, leave=(CARD,))), draw.choice(("flip", "truncate")), number)
        use(run, out, written)
        assert "5' is damaged" in capsys.readouterr().err
        tried("damage, the command itself", use.__name__)
