"""Fine-tuning a chat model: trained tokens a second and peak memory beside TRL and PyTorch.

    python benchmarks/sft.py --model SMOLLM2 [--peer PYTHON] [--oasst TREES.jsonl]

A turn is an optimizer step (AdamW, float32) from the same weights, a chat model of SmolLM2's widths with --layers
layers; trained tokens are those with a loss, counted once for every conversation that they are in. The data is
HelpSteer, each response after a label line of its ratings, or OpenAssistant's trees, all threads with every assistant
turn of them.

steerjax     --rows rows of 2048 tokens; what conversations share is written once
unshared     steerjax, each conversation a text of its own, in as many rows as have about as many trained tokens
trl          TRL's SFTTrainer, packing with its default strategy `bfd`, rows of 2048, as many as for `unshared`
trl padded   the same, without packing: batches of 8 conversations; 14 GiB, so only where --only names it
padded       a loop in PyTorch over the very conversations of each step of `steerjax`, 8 at once, logits at trained
             tokens alone; losses are compared step by step

`bfd` is meant for flash attention. On a CPU transformers makes a mask of 2048 x 2048 from the positions: exact, and its
attention computes every pair. The loss of TRL's first step is compared with that of its conversations one by one.
(`wrapped` packs without a mask: conversations see each other, and are cut at the end of a row.)
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import itertools
import json
import sys
import tempfile
from pathlib import Path

from training import BETAS, DECAY, EPSILON, LENGTH, RATE, first_layers
from turns import add_options, in_turn, report, serve, workers

PEERS = ("unshared", "trl", "trl padded", "padded")
KEYS = ("turns", "rows")  # of the workers


def our_turns(folder: Path, steps: int, rows: int, shared: bool):
    """Trees write steps.jsonl, the conversations of each step; a turn trains on the next."""
    from prepared import Steps, make_task

    from steerjax.data.batch import BatchPlan
    from steerjax.data.trees import grow

    threads = (folder / "oasst.jsonl").exists()
    task = make_task(
        ("sft",),
        data={"on_bad_row": "skip", **({"train": (str(folder / "oasst.jsonl"),)} if threads else {})},  # too long ones
        sft={"ratings": "none", "threads": "all"} if threads else {},
        model={"source": str(folder / "start")},
        chat={"template": "chatml"},
        batch={"rows": rows, "row_length": LENGTH, "micro_batches": rows},
        optimizer={"learning_rate": RATE, "min_learning_rate": RATE, "warmup_steps": 0, "beta1": BETAS[0],
                   "beta2": BETAS[1], "epsilon": EPSILON, "weight_decay": DECAY, "clip_norm": 0.0},
    )  # fmt: skip
    plan = task.input().plan
    if shared:
        write_steps(folder / "steps.jsonl", plan, steps)
    else:
        trees = tuple(grow([example])[0] for tree in plan.trees for example in tree.examples)
        e = task.experiment
        apart = BatchPlan(trees, rows, LENGTH, e.train.seed)
        rows = round(rows * len(apart.epoch(0)) / len(plan.epoch(0)))
        plan = dataclasses.replace(apart, rows=rows)
        e = dataclasses.replace(e, batch=dataclasses.replace(e.batch, rows=rows, micro_batches=rows))
        task = dataclasses.replace(task, experiment=e)
    step, numbers = Steps(task, plan.trees, steps), itertools.count()

    def turn() -> dict:
        rows = plan.step_rows(next(numbers))
        batch = step.feed(rows)
        loss = float(step.dispatch(batch)["loss"])
        return {"loss": loss, "trained_tokens": float(batch.targets["sft"]["weights"].sum()), **step.facts(rows)}

    return turn


def write_steps(path: Path, plan, steps: int) -> None:
    """A line a step: of each conversation `input_ids` and `labels`, -100 where nothing is trained."""
    with path.open("w") as file:
        for step in range(steps):
            said = []
            for part in (part for row in plan.step_rows(step) for part in row):
                for example in (plan.trees[part.tree].examples[i] for i in part.examples):
                    labels = [-100] * len(example.tokens)
                    for place, target in zip(example.places, example.targets, strict=True):
                        labels[place + 1] = int(target)  # which is predicted a place before
                    said.append({"input_ids": example.tokens.tolist(), "labels": labels})
            print(json.dumps(said), file=file)


def read_steps(folder: Path) -> list[list[dict]]:
    return [json.loads(line) for line in (folder / "steps.jsonl").open()]


def count_tokens(inputs: dict) -> dict[str, float]:
    """Of a micro-batch of TRL's; the first token of a text is predicted by nothing."""
    labels = inputs["labels"]
    return {"trained_tokens": int((labels[:, 1:] != -100).sum()), "computed_tokens": labels.numel()}


def trl_turns(folder: Path, packing: bool):
    """The conversations of all steps, in TRL's own order, in equal parts."""
    import torch
    import trainer
    from datasets import Dataset
    from padded import BATCH
    from transformers import AutoTokenizer, LlamaForCausalLM
    from trl import SFTConfig, SFTTrainer, pack_dataset

    steps = read_steps(folder)
    data = Dataset.from_list([example for step in steps for example in step])
    rows = pack_dataset(data, LENGTH) if packing else data  # to count them: the trainer packs
    batch = 1 if packing else BATCH  # rows of a micro-batch become one text, whose mask grows with its square
    shared = trainer.arguments(folder, len(steps), max(1, round(len(rows) / len(steps) / batch)), batch)
    first = []  # loss of the first step's conversations one by one, and how many tokens

    class Checked(SFTTrainer):
        def training_step(self, model, inputs, num_items_in_batch=None):
            if self.state.global_step == 0:
                first.append(loss_alone(model, inputs))
            return super().training_step(model, inputs, num_items_in_batch)

    turn = trainer.by_turns(
        Checked,
        count_tokens,
        model=LlamaForCausalLM.from_pretrained(folder / "start", dtype=torch.float32),
        # recomputing activations is TRL's default: left out, as memory is enough
        args=SFTConfig(packing=packing, max_length=LENGTH, gradient_checkpointing=False, **shared),
        train_dataset=data,
        processing_class=AutoTokenizer.from_pretrained(folder / "start"),
    )

    def checked() -> dict:
        said = turn()
        if first:
            said["loss_alone"] = sum(loss for loss, _ in first) / sum(count for _, count in first)
            first.clear()
        return said

    return checked


def loss_alone(model, inputs: dict) -> tuple[float, int]:
    """Sum of the loss and count of trained tokens, every conversation of a micro-batch in a row of its own."""
    import torch

    total = count = 0
    if "position_ids" in inputs:  # packed: each begins at 0
        starts = (inputs["position_ids"][0] == 0).nonzero().flatten().tolist()
        bounds = [(0, a, b) for a, b in zip(starts, [*starts[1:], inputs["labels"].shape[1]], strict=True)]
    else:
        bounds = [(row, 0, int(length)) for row, length in enumerate(inputs["attention_mask"].sum(1))]
    with torch.no_grad():
        for row, start, stop in bounds:
            ids, labels = (inputs[name][row : row + 1, start:stop] for name in ("input_ids", "labels"))
            loss, trained = summed_loss(model, ids, None, labels)
            total, count = total + loss.item(), count + trained
    return total, count


def summed_loss(model, ids, mask, labels) -> tuple:
    """The sum over the trained tokens of [B, T], and how many they are; logits are computed for them alone."""
    from torch.nn.functional import cross_entropy

    states = model.model(input_ids=ids, attention_mask=mask).last_hidden_state[:, :-1]
    trained = labels[:, 1:] != -100
    logits = model.lm_head(states[trained])
    return cross_entropy(logits, labels[:, 1:][trained], reduction="sum"), int(trained.sum())


def padded_turns(folder: Path):
    import torch
    from padded import BATCH, adamw, padded
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(folder / "start", dtype=torch.float32).train()
    optimizer = adamw(model, RATE, BETAS, EPSILON, DECAY)
    steps = read_steps(folder)
    number = 0

    def turn() -> dict:
        nonlocal number
        examples = steps[number]
        number += 1
        count = sum(label != -100 for example in examples for label in example["labels"])
        total = tokens = 0
        optimizer.zero_grad()
        for first in range(0, len(examples), BATCH):
            some = examples[first : first + BATCH]
            ids, mask = padded([example["input_ids"] for example in some])
            labels = torch.full_like(ids, -100)
            for row, example in enumerate(some):
                labels[row, : len(example["labels"])] = torch.tensor(example["labels"])
            loss = summed_loss(model, ids, mask, labels)[0] / count
            loss.backward()
            total += loss.item()
            tokens += ids.numel()
        optimizer.step()
        return {"loss": total, "trained_tokens": count, "computed_tokens": tokens}

    return turn


def make_turn(name: str, folder: Path, o: argparse.Namespace):
    """The turn of a worker."""
    if name == "padded":
        return padded_turns(folder)
    if name in ("trl", "trl padded"):
        return trl_turns(folder, packing=name == "trl")
    return our_turns(folder, o.turns + 1, o.rows, shared=name == "steerjax")


def prepare(trees: Path, folder: Path) -> None:
    """OpenAssistant's trees as threads."""
    from steerjax.prepare import main

    with contextlib.redirect_stdout(sys.stderr):
        main(["oasst", "--input", str(trees), "--output", str(folder / "oasst.jsonl")])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser, 5)
    add = parser.add_argument
    add("--layers", type=int, default=6)
    add("--rows", type=int, default=2, help="packed rows of a step of steerjax")
    add("--oasst", type=Path, metavar="FILE", help="OpenAssistant's trees in place of HelpSteer")
    add("--only", default="unshared,trl,padded", help=f"steerjax and some of {', '.join(PEERS)}, with commas")
    o = parser.parse_args()
    if o.worker:
        serve(make_turn(o.worker[0], Path(o.worker[1]), o))
        return
    with tempfile.TemporaryDirectory() as scratch:
        first_layers(o.model, Path(scratch) / "start", o.layers, "chat")
        if o.oasst:
            prepare(o.oasst, Path(scratch))
        commands = workers(__file__, PEERS, o, KEYS, scratch)
        commands["unshared"][0] = sys.executable
        if o.only:
            commands = {name: commands[name] for name in ("steerjax", *o.only.split(","))}
        found = in_turn(commands, o.turns, {"JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": ""})
    data = "oasst" if o.oasst else "helpsteer"
    settings = {key: vars(o)[key] for key in ("layers", *KEYS)} | {"data": data}
    report(f"sft_{data}", found, "steerjax", "trained tokens", "trained_tokens", settings)
    for name, one in found.items():
        if "loss_alone" in (first := one["warm_up"]):
            apart = abs(first["loss"] - first["loss_alone"])
            print(f"loss of the first step: {name} differs by {apart:.1e} from its conversations one by one")
    if "padded" in found:
        pairs = zip(found["steerjax"]["turns"], found["padded"]["turns"], strict=True)
        apart = max(abs(a["loss"] - b["loss"]) for a, b in pairs)
        print(f"losses of {o.turns} steps: padded differs by at most {apart:.1e}")


if __name__ == "__main__":
    main()
