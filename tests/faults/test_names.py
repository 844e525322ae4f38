"""Every path that a user gives, under names that shells, globs, URLs and file systems read in their own way."""

import os
from pathlib import Path

import numpy as np
import pytest

from steerjax import annotate, export, generate, merge
from steerjax.bundle import describe, open_bundle
from steerjax.bundle.store import _Literal
from steerjax.chat.tokenizer import EMBEDDED
from steerjax.config import default_config, resolve
from steerjax.errors import SteerjaxError
from steerjax.flags import local_folder
from steerjax.training.train import train
from tests.refusals import says
from tests.reward_models import chat_folder, reward_folder, some_conversations, write_rows

STRANGE = "a[1]*?%41'\"{}$~ ü日\n#&;=|!`id`\t"  # all at once; a comma would part two files
NAMES = (
    "[ab]", "a*b", "a?b", "**", "]", "50%", "%41", "q'uo", 'q"uo', "new\nline", "tab\t", "ünï日本", "e\u0301", "sp ace",
    " lead", "trail ", "x" * 200, "-dash", "{b}", "$HOME", "`id`", "a:b", "a#b;&|!", "~", "a,b", "a=b", "...", "\x7f",
    "\u202e", "back\\slash", os.fsdecode(b"\xff\xfe"), "None", "0", "embedded", "nul",
)  # fmt: skip
ATTRIBUTES = ("helpfulness", "correctness", "coherence", "complexity", "verbosity")


def experiment(data: Path, **chat):
    config = default_config()
    config.data.train = (str(data),)
    config.data.validation_fraction = 0.25
    config.model.update(hidden_size=32, intermediate_size=64, num_layers=1, num_heads=2, num_kv_heads=1)
    config.batch.update(rows=8, row_length=128)
    config.compute.attention_chunk = 64
    config.optimizer.update(schedule="constant", warmup_steps=0)
    config.train.update(steps=1, plots=False)
    config.chat.update(chat)
    return resolve(config.to_dict())


def rated_rows(path: Path) -> Path:
    ratings = [
        dict(zip(ATTRIBUTES, row, strict=True)) for row in np.random.default_rng(0).integers(0, 5, (8, 5)).tolist()
    ]
    return write_rows(path, [{"prompt": f"Q{i}?", "response": "a b", **each} for i, each in enumerate(ratings)])


def runs_or_refuses(main, *arguments: object) -> bool:
    """Whether a command did its work; if not, it said in a sentence what is wrong."""
    try:
        main([str(argument) for argument in arguments])
    except SystemExit as end:
        status = end.code
    else:
        return True
    assert status == 2
    return False


def check_commands(folder: Path, capsys) -> int:
    """Each command with each of its paths below `folder`, which is there; how many did their work."""
    models = folder.parent / "models"
    for name, make in (("reward", reward_folder), ("chat", chat_folder)):
        if not (models / name).exists():
            make(models / name)
        if not (folder / name).exists():
            (folder / name).symlink_to(models / name)
    rows = write_rows(folder / "rows.jsonl", some_conversations(2, longest=4))
    asked = write_rows(folder / "asked.jsonl", [{"prompt": "Why?"}])
    short = ("--template", "extra_id", "--max-new-tokens", 2, "--schema", "helpsteer")
    done = 0
    for main, output, *arguments in (
        (annotate.main, "rated.jsonl", "--model", folder / "reward", "--template", "extra_id", "--input", rows),
        (
            generate.main,
            "answers.jsonl",
            "--model",
            folder / "chat",
            "--template",
            "extra_id",
            "--input",
            asked,
            *short,
        ),
        (export.main, "exported", "--checkpoint", folder / "chat", "--template", "extra_id"),
        (merge.main, "merged", folder / "chat", folder / "chat", "--template", "extra_id"),
    ):
        if runs_or_refuses(main, *arguments, "--output", folder / output):
            done += 1
            assert (folder / output).exists()
        else:
            says(capsys.readouterr().err)
    return done


def test_a_run_under_a_strange_name(tmp_path):
    """The run, its data and its tokenizer; what is saved can be opened, and so can an export of it."""
    folder = tmp_path / STRANGE
    folder.mkdir()
    tokenizer = folder / f"{STRANGE}.model"
    tokenizer.write_bytes(Path(EMBEDDED).read_bytes())
    run = experiment(rated_rows(folder / f"{STRANGE}.jsonl"), tokenizer=str(tokenizer))
    train(run, local_folder(str(folder / STRANGE)))
    expected = open_bundle(folder / STRANGE).params
    export.main(["--checkpoint", str(folder / STRANGE), "--output", str(folder / f"{STRANGE}2")])
    exported = open_bundle(folder / f"{STRANGE}2").params
    np.testing.assert_array_equal(*(np.asarray(p["llama"]["embedding"]) for p in (expected, exported)))
    (tmp_path / "link").symlink_to(STRANGE)
    assert describe(tmp_path / "link" / STRANGE).schema.names == ATTRIBUTES


def test_commands_under_a_strange_name(tmp_path, capsys):
    (folder := tmp_path / STRANGE).mkdir()
    assert check_commands(folder, capsys) == 4


@pytest.mark.faults
def test_commands_and_runs_under_every_name(tmp_path, tried, capsys):
    works = 0
    for name in NAMES:
        (folder := tmp_path / name).mkdir()
        works += check_commands(folder, capsys)
        try:
            train(experiment(rated_rows(folder / f"{name}.jsonl")), local_folder(str(folder / name)))
            assert open_bundle(folder / name).params
            works += 1
        except SteerjaxError as error:
            print(f"refused: {error}")
            says(error)
    tried("name in a path", "works", works)
    tried("name in a path", "refused", 5 * len(NAMES) - works)


def test_names_that_checkpoints_do_not_take_are_refused_at_the_door(tmp_path):
    (tmp_path / "back\\slash").mkdir()
    (tmp_path / "link").symlink_to("back\\slash")
    for name in ("back\\slash", "link", os.fsdecode(b"\xff"), "gs://bucket/run"):
        with pytest.raises(SteerjaxError) as refused:
            local_folder(str(tmp_path / name) if "://" not in name else name)
        says(refused.value, "--workdir")
    assert str(_Literal("/gs/runs") / "a*") == "/gs/runs/a*"  # no bucket


def test_links_that_lead_nowhere_or_to_themselves(tmp_path, capsys):
    """As an input, a model, an output and the folder of one."""
    reward, rows = (
        reward_folder(tmp_path / "reward"),
        write_rows(tmp_path / "rows.jsonl", some_conversations(1, longest=4)),
    )
    for name, goal in (("nowhere", "gone"), ("cycle", "cycle")):
        link = tmp_path / name
        link.symlink_to(goal)
        annotated = ("--template", "extra_id", "--output")
        for arguments in (
            ("--model", link, "--input", rows, *annotated, tmp_path / "out.jsonl"),
            ("--model", reward, "--input", link, *annotated, tmp_path / "out.jsonl"),
            ("--model", reward, "--input", rows, *annotated, link / "out.jsonl"),
        ):
            assert not runs_or_refuses(annotate.main, *arguments)
            says(capsys.readouterr().err)
        with pytest.raises(SteerjaxError) as refused:
            train(experiment(link), tmp_path / "run")
        says(refused.value)
