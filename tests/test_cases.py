"""Inputs that failed once, each through the command that met it. `cases/` holds the small ones; the others are made."""

import contextlib
import inspect
import io
import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from steerjax import annotate, evaluate, export, generate, prepare
from steerjax.bundle.describe import read_provenance
from steerjax.chat.templates import TEMPLATES
from steerjax.config import default_config, resolve
from steerjax.data.formats import conversation_from_row
from steerjax.errors import SteerjaxError
from steerjax.schema import HELPSTEER
from steerjax.training.train import train
from tests.helpers import slow_but
from tests.hf_folders import CLASSIFIER, TINY, random_tensors, write_folder
from tests.reward_models import read_rows, reward_folder, write_rows

FILES = Path(__file__).with_name("cases")
HEADER = "prompt,response,helpfulness,correctness,coherence,complexity,verbosity\n"


# ---- Files that are too large to keep


def csv_long_cell(folder: Path) -> None:
    """Legal CSV, 7 rows, one cell of 6,000 lines that look like rows."""
    rows = [f"Question {i}?,Answer {i}.,3,3,4,1,1\n" for i in range(6)]
    table = "".join(f"text {i},reply {i},0,0,0,0,0\n" for i in range(6000))
    rows.insert(3, f'"Clean this table:\n{table}",Done.,4,4,4,2,2\n')
    (folder / "csv_long_cell.csv").write_text(HEADER + "".join(rows), encoding="utf-8")


def annotate_late_control(folder: Path) -> None:
    """300 rows, a control string in row 291."""
    prompts = [f"Question {i}?" if i != 290 else "What does <extra_id_1> mean in T5?" for i in range(300)]
    rows = [{"messages": [{"role": "user", "content": p}, {"role": "assistant", "content": "Yes."}]} for p in prompts]
    write_rows(folder / "annotate_late_control.jsonl", rows)


def sft_all_too_long(folder: Path) -> None:
    prompts = [f"{number} " + "long words " * 400 for number in range(8)]
    rows = [{"messages": [{"role": "user", "content": p}, {"role": "assistant", "content": "Yes."}]} for p in prompts]
    write_rows(folder / "sft_all_too_long.jsonl", rows)


def tokenizer_other_name(folder: Path) -> None:
    """A tokenizer.json under another name, with the control strings of Llama 3."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: index for index, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    controls = [*sorted(TEMPLATES["llama3"].control_strings), "<|finetune_right_pad_id|>"]
    tokenizer.add_special_tokens([AddedToken(control, normalized=False) for control in controls])
    tokenizer.save(str(folder / "tokenizer_other_name.json"))


def added_tokens(folder: Path) -> None:
    """A chat model with tokens beside its tokenizer.model, and a head that always says one of them."""
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["Name a prime."] * 9), model_writer=model, vocab_size=300, model_type="bpe",
        byte_fallback=True, hard_vocab_limit=False, normalization_rule_name="identity", remove_extra_whitespaces=False,
        minloglevel=2,
    )  # fmt: skip
    size = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue()).vocab_size()
    config = TINY | {"vocab_size": size + 2, "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2}
    tensors = random_tensors(config)
    head = tensors["lm_head.weight"]
    head[:], head[size], head[size + 1] = 0, 1, -1
    write_folder(folder / "added_tokens", config, tensors)
    (folder / "added_tokens" / "tokenizer.model").write_bytes(model.getvalue())
    added = {"<|im_end|>": size, "<|im_start|>": size + 1}
    (folder / "added_tokens" / "added_tokens.json").write_text(json.dumps(added))


def label_names(folder: Path) -> None:
    """A classifier that does not name its attributes."""
    labels = {f"LABEL_{i}": i for i in range(5)}
    config = TINY | CLASSIFIER | {"label2id": labels, "id2label": {str(i): name for name, i in labels.items()}}
    write_folder(folder / "label_names", config, random_tensors(config))


MADE = (
    csv_long_cell, annotate_late_control, sft_all_too_long, tokenizer_other_name, added_tokens, label_names
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Everything the cases read."""
    folder = tmp_path_factory.mktemp("cases")
    for path in FILES.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    for make in MADE:
        make(folder)
    reward_folder(folder / "reward")
    write_folder(folder / "chat", TINY, random_tensors(TINY))
    return folder


# ---- Commands, in this process


def run(*words: str) -> None:
    """A command and its arguments."""
    modules = {module.__name__.split(".")[-1]: module for module in (prepare, annotate, generate, evaluate, export)}
    modules[words[0]].main(list(words[1:]))


def run_train(workdir: str, **changes) -> None:
    """`train` of a tiny model for two steps, with keys of the config changed."""
    config = default_config()
    config.data.validation_fraction = 0.25
    if "model.source" not in changes:
        config.model.update(hidden_size=32, intermediate_size=64, num_layers=1, num_heads=2, num_kv_heads=2)
    config.batch.update(rows=8, row_length=512)  # the tests have eight devices
    config.train.update(steps=2, plots=False)
    config.optimizer.warmup_steps = 0
    for key, value in changes.items():
        group, _, name = key.rpartition(".")
        setattr(config[group] if group else config, name, value)
    train(resolve(config.to_dict()), Path(workdir))


def prepared(name: str, rows: int) -> None:
    run("prepare", "helpsteer", "--input", name, "--output", "out.jsonl", "--on-bad-row", "skip")
    assert len(read_rows(Path("out.jsonl"))) == rows
    assert not Path("out.jsonl.skipped.jsonl").exists()


def annotated(name: str, rows: int, *options: str) -> list[dict]:
    run("annotate", "--model", "reward", "--template", "extra_id", "--input", name, "--output", "out.jsonl", *options)
    found = read_rows(Path("out.jsonl"))
    assert [len(row["turns"][-1]["predicted_ratings"]) for row in found] == [5] * rows
    return found


def answered(name: str, model: str = "chat", template: str = "extra_id", *options: str) -> list[dict]:
    run("generate", "--model", model, "--template", template, "--schema", "helpsteer", "--input", name,
        "--output", "answers.jsonl", "--max-new-tokens", "4", *options)  # fmt: skip
    return read_rows(Path("answers.jsonl"))


def refused(act: Callable[[], None], *said: str) -> None:
    """By an error that says these (regular expressions) and a cure."""
    with pytest.raises((SystemExit, SteerjaxError)) as caught, contextlib.redirect_stderr(io.StringIO()) as text:
        act()
    text = text.getvalue() or str(caught.value)
    assert all(re.search(words, text) for words in (*said, "cure: ")), text


# ---- The cases


def long_cell():
    prepared("csv_long_cell.csv", 7)


def utf16():
    prepared("excel_utf16.csv", 16)


def other_rows_under_the_same_name():
    rows = Path("rows.jsonl")
    rows.write_bytes(Path("resume_before.jsonl").read_bytes())
    run_train("run", **{"data.train": ("rows.jsonl",)})
    rows.write_bytes(Path("resume_after.jsonl").read_bytes())
    more = {"data.train": ("rows.jsonl",), "train.steps": 4}
    refused(lambda: run_train("run", **more), "rows.jsonl", "accept_changes")
    run_train("run", **more, **{"train.accept_changes": True})
    assert "rows.jsonl" in read_provenance(Path("run/checkpoints/4")).accepted[0]


def added_tokens_are_tokens():
    (row,) = answered("prompt_int_id.jsonl", "added_tokens", "chatml")
    assert (row["generation"]["finish"], row["turns"][-1]["content"]) == ("stop", "")


def an_unnamed_head(capsys):
    run_train("named", **{"model.source": "label_names", "data.train": ("resume_before.jsonl",)})
    assert re.search("reward head  new.*LABEL_0, LABEL_1", capsys.readouterr().out)


def nan_passes_through():
    assert [row["score"] for row in annotated("passthrough_nan.jsonl", 16)[:3]] == [1.0, 1.0, None]
    rows = answered("passthrough_nan.jsonl", "chat", "extra_id", "--replace-answer", "--on-bad-row", "skip")
    assert len(rows) == len({row["turns"][0]["content"] for row in rows}) > 1


def dates_pass_through():
    annotated("passthrough_date.parquet", 16)


def no_label_of_the_kind_asked_for(capsys):
    sft = {"objectives": ("sft",), "data.train": ("sft_predicted_only.jsonl",)}
    refused(lambda: run_train("sft", **sft), "human", "config.sft.ratings")
    run_train("sft", **sft, **{"sft.ratings": "predicted"})
    assert "100% of 12 responses labelled" in capsys.readouterr().out


def a_tokenizer_under_another_name():
    tokenizer = {"chat.tokenizer": "tokenizer_other_name.json", "chat.template": "llama3"}
    run_train("renamed", **tokenizer, **{"data.train": ("resume_before.jsonl",)})
    run("export", "--checkpoint", "renamed", "--output", "exported")
    for model in ("renamed", "exported"):
        run("annotate", "--model", model, "--input", "resume_before.jsonl", "--output", f"{model}.jsonl")
    ours, theirs = (read_rows(Path(f"{model}.jsonl")) for model in ("renamed", "exported"))
    assert ours == theirs


def a_tokenizer_that_is_not_the_models():
    other = {"chat.tokenizer": "tokenizer_other_name.json", "model.source": "reward"}
    refused(lambda: run_train("other", **other, **{"data.train": ("resume_before.jsonl",)}), "config.chat.tokenizer")


def a_control_string_late_in_the_file():
    rows = annotated("annotate_late_control.jsonl", 300)
    assert rows[290]["turns"][0]["content"] == "What does <extra_id_1> mean in T5?"


def no_usable_row():
    refused(lambda: annotated("annotate_no_usable.jsonl", 0, "--on-bad-row", "skip"), "annotate_no_usable.jsonl")
    assert not Path("out.jsonl").exists()


def an_id_that_is_a_number():
    (row,) = answered("prompt_int_id.jsonl")
    assert row["id"] == "7"


def nothing_fits_a_row():
    sft = {"objectives": ("sft",), "data.train": ("sft_all_too_long.jsonl",), "sft.ratings": "none"}
    said = "8 rows", r"sft_all_too_long.jsonl:\d: .*512", "config.batch.row_length"
    refused(lambda: run_train("long", **sft, **{"data.on_bad_row": "skip"}), *said)


def nine_attributes():
    nine = {"data.train": ("reference_nine_attributes.jsonl",)}
    refused(lambda: run_train("nine", **nine), "reference_nine_attributes.jsonl:1", "steerlm")
    run_train("nine", **nine, **{"data.schema": "steerlm"})


# ---- Found by breaking


def an_output_that_is_the_input():
    rows = Path("rows.jsonl")
    rows.write_text('{"prompt": "a", "response": "b"}\n{"prompt": "c", "response": "d"}')
    for command in ("annotate", "generate"):
        model = "reward" if command == "annotate" else "chat"
        words = ("--model", model, "--template", "extra_id", "--input", "rows.jsonl", "--output", "rows.jsonl")
        refused(lambda: run(command, *words), "rows.jsonl")  # noqa: B023
    assert rows.read_text().count("\n") == 1
    assert rows.read_text().endswith("}")


def an_output_that_is_the_list_of_skipped_rows():
    rows = Path("out.jsonl.skipped.jsonl")
    rows.write_bytes(Path("resume_before.jsonl").read_bytes())
    refused(lambda: prepared(rows.name, 16), rows.name)
    refused(lambda: run("prepare", "helpsteer", "--input", "resume_before.jsonl", "--output", ""), "file")
    assert rows.exists()


def an_attribute_without_a_metric():
    rows = [{"prompt": f"Q{i}?", "response": "yes " * i, "verbosity": i % 5, "coherence": 3} for i in range(1, 12)]
    write_rows(Path("rows.jsonl"), rows)
    run_train("few", **{"data.train": ("rows.jsonl",)})
    run("export", "--checkpoint", "few", "--output", "few-hf")
    assert "| coherence |" in Path("few-hf/README.md").read_text()


def fewer_steps_than_are_done():
    run_train("done", **{"data.train": ("resume_before.jsonl",)})
    refused(lambda: run_train("done", **{"data.train": ("resume_before.jsonl",), "train.steps": 1}), "step 2", "steps")


def a_tokenizer_copy_that_is_not_whole():
    data = {"data.train": ("resume_before.jsonl",)}
    Path("copied/tokenizer").mkdir(parents=True)
    run_train("copied", **data)
    run("annotate", "--model", "copied", "--input", "resume_before.jsonl", "--output", "one.jsonl")
    copy = Path("copied/tokenizer/tokenizer.model")
    copy.write_bytes(copy.read_bytes()[:1000])
    run_train("copied", **data, **{"train.steps": 3})
    run("annotate", "--model", "copied", "--input", "resume_before.jsonl", "--output", "two.jsonl")


def csv_as_people_have_it():
    for text, rows in (
        ("sep=;\nprompt;response; verbosity ;\np;r;3;\n", 1),
        ('prompt,response,verbosity,"notes;a;b;c;d"\np,r,3,x\n', 1),
        ("prompt,response,verbosity,,\np,r,3,,\nq,r,4,,\n", 2),
    ):
        Path("rows.csv").write_text(text)
        prepared("rows.csv", rows)
        assert read_rows(Path("out.jsonl"))[0]["turns"][1]["ratings"] == {"verbosity": 3}
    Path("rows.csv").write_text("prompt,response,verbosity\np,r,0_4\n")
    refused(lambda: run("prepare", "helpsteer", "--input", "rows.csv", "--output", "out.jsonl"), "rows.csv:2", "0_4")


def ratings_in_columns_of_every_format():
    for row in (
        {"conversations": [{"from": "human", "value": "p"}, {"from": "gpt", "value": "r"}], "verbosity": 3},
        {"instruction": "p", "output": "r", "verbosity": 3},
        {"messages": [{"role": "user", "content": "p"}, {"role": "assistant", "content": "r"}], "verbosity": 3},
        {"prompt": "p", "response": "r", "ratings": {"verbosity": 3}, "helpfulness": None},
    ):
        conversation = conversation_from_row(row, HELPSTEER)
        assert conversation.turns[1].ratings == {"verbosity": 3}


def an_attribute_that_is_asked_for_twice():
    ask = ("generate", "--model", "chat", "--template", "extra_id", "--schema", "helpsteer", "--prompt", "Hi")
    refused(lambda: run(*ask, "--sweep", "verbosity=0..1", "--sweep", "verbosity=3..4"), "verbosity")
    refused(lambda: run(*ask, "--sweep", "verbosity=0..1", "--attributes", "verbosity=4"), "verbosity")
    refused(lambda: run(*ask, "--attributes", "verbosity=4,verbosity=none"), "verbosity")


def a_broken_line_of_metrics():
    run_train("broken", **{"data.train": ("resume_before.jsonl",)})
    with Path("broken/metrics.jsonl").open("a") as file:
        file.write("{\n")
    run_train("broken", **{"data.train": ("resume_before.jsonl",)})  # its checkpoints are whole: it goes on


def rows_that_are_all_too_long_to_evaluate():
    words = ("--suite", "attributes", "--model", "reward", "--template", "extra_id", "--data", "resume_before.jsonl")
    refused(lambda: run("evaluate", *words, "--output", "report", "--row-length", "8"), "16", "--row-length")


CASES = (
    an_output_that_is_the_input, an_output_that_is_the_list_of_skipped_rows, an_attribute_without_a_metric,
    fewer_steps_than_are_done, a_tokenizer_copy_that_is_not_whole, csv_as_people_have_it,
    ratings_in_columns_of_every_format, an_attribute_that_is_asked_for_twice, a_broken_line_of_metrics,
    rows_that_are_all_too_long_to_evaluate,
    long_cell, utf16, other_rows_under_the_same_name, added_tokens_are_tokens, an_unnamed_head, nan_passes_through,
    dates_pass_through, no_label_of_the_kind_asked_for, a_tokenizer_under_another_name,
    a_tokenizer_that_is_not_the_models, a_control_string_late_in_the_file,
    no_usable_row, an_id_that_is_a_number, nothing_fits_a_row, nine_attributes,
)  # fmt: skip


SLOW = (  # they train more than once
    an_attribute_without_a_metric, a_tokenizer_copy_that_is_not_whole, other_rows_under_the_same_name, an_unnamed_head,
    no_label_of_the_kind_asked_for, a_tokenizer_under_another_name, nine_attributes,
)  # fmt: skip


@pytest.mark.parametrize(
    "case", slow_but(tuple(case for case in CASES if case not in SLOW), CASES), ids=lambda case: case.__name__
)
def test_case(case, folder, tmp_path, monkeypatch, capsys):
    for path in folder.iterdir():
        (tmp_path / path.name).symlink_to(path)
    monkeypatch.chdir(tmp_path)
    case(*[capsys] * len(inspect.signature(case).parameters))
