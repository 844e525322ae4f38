"""Training a reward model: examples a second and peak memory beside transformers and PyTorch.

    python benchmarks/training.py --model SMOLLM2 [--peer PYTHON]

A turn is an optimizer step (AdamW) on the same examples of HelpSteer from the same weights, a model of SmolLM2's widths
with --layers layers and five outputs: in float32 on a CPU, on a GPU in bfloat16 with float32 parameters. steerjax packs
the examples into rows of 2048 tokens, with what they share written once. The peer is LlamaForSequenceClassification in
batches of --peer-batch, padded to the longest of the batch: as the examples come (`padded`), or sorted by length within
the step (`grouped`), gradients added up over the step: losses are compared step by step. `trainer` is transformers'
Trainer as its users run it, which groups by length within 50 batches.
"""

from __future__ import annotations

import argparse
import itertools
import json
import tempfile
from pathlib import Path

import numpy as np
from turns import add_options, in_turn, report, serve, workers

LENGTH, ATTRIBUTES = 2048, 5
RATE, BETAS, EPSILON, DECAY = 1e-4, (0.9, 0.98), 1e-8, 0.01
KEYS = ("turns", "devices", "rows", "micro_batches", "chunk", "peer_batch")  # of the workers
PEERS = ("padded", "grouped", "trainer")
NAMES = ("helpfulness", "correctness", "coherence", "complexity", "verbosity")


def first_layers(source: Path, folder: Path, layers: int, kind: str = "reward") -> None:
    """The first layers of a Llama of Hugging Face's; a reward model has a small random head of five outputs."""
    from safetensors.numpy import load_file, save_file

    weights = {name: x for file in source.glob("*.safetensors") for name, x in load_file(file).items()}
    weights = {name: np.asarray(x, np.float32) for name, x in weights.items()
               if not name.startswith("model.layers.") or int(name.split(".")[2]) < layers}  # fmt: skip
    weights.pop("lm_head.weight", None)
    width = weights["model.norm.weight"].shape[0]
    if kind == "reward":
        weights["score.weight"] = np.random.default_rng(0).normal(0, 0.02, (ATTRIBUTES, width)).astype(np.float32)
    folder.mkdir()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    labels = {str(i): name for i, name in enumerate(NAMES)}
    config |= {"num_hidden_layers": layers, "pad_token_id": 0, "torch_dtype": "float32"}
    if kind == "reward":
        config |= {"architectures": ["LlamaForSequenceClassification"], "id2label": labels,
                   "label2id": {name: int(i) for i, name in labels.items()}, "problem_type": "regression"}  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((source / name).read_bytes())
    attributes = [{"name": name, "low": 0, "high": 4} for name in NAMES]
    (folder / "steerjax.json").write_text(json.dumps({"kind": kind, "template": "chatml", "attributes": attributes}))


def our_turns(folder: Path, steps: int, options: argparse.Namespace):
    """Writes steps.jsonl, the examples of each step; a turn trains on the next."""
    import jax
    from prepared import Steps, make_task

    if options.devices > 1:
        jax.config.update("jax_num_cpu_devices", options.devices)
    task = make_task(
        model={"source": str(folder / "start")},
        chat={"template": "chatml"},
        batch={"rows": options.rows, "row_length": LENGTH, "micro_batches": options.micro_batches},
        compute={"attention_chunk": options.chunk},
        optimizer={"learning_rate": RATE, "min_learning_rate": RATE, "warmup_steps": 0, "beta1": BETAS[0],
                   "beta2": BETAS[1], "epsilon": EPSILON, "weight_decay": DECAY, "clip_norm": 0.0},
        mesh={"data": options.devices},
    )  # fmt: skip
    plan = task.input().plan
    step = Steps(task, plan.trees, steps)
    with (folder / "steps.jsonl").open("w") as file:
        for number in range(steps):
            examples = [plan.trees[part.tree].examples[i]
                        for row in plan.step_rows(number) for part in row for i in part.examples]  # fmt: skip
            rated = [task.objectives[0].data["train"].rows[example.number] for example in examples]
            said = [{"tokens": x.tokens.tolist(), "ratings": r} for x, r in zip(examples, rated, strict=True)]
            print(json.dumps(said), file=file)
    numbers = itertools.count()
    return lambda: step(plan.step_rows(next(numbers)))


def peer_turns(folder: Path, grouped: bool, batch: int):
    import torch
    from padded import DEVICE, adamw, padded, rewards
    from transformers import LlamaForSequenceClassification

    model = LlamaForSequenceClassification.from_pretrained(folder / "start", dtype=torch.float32).train().to(DEVICE)
    optimizer = adamw(model, RATE, BETAS, EPSILON, DECAY)
    steps = [json.loads(line) for line in (folder / "steps.jsonl").open()]
    number = 0

    def turn() -> dict:
        nonlocal number
        examples = steps[number]
        number += 1
        if grouped:
            examples = sorted(examples, key=lambda example: len(example["tokens"]))
        count = sum(r is not None for example in examples for r in example["ratings"])
        total = tokens = real = 0
        optimizer.zero_grad()
        for first in range(0, len(examples), batch):
            some = examples[first : first + batch]
            ids, mask = padded([example["tokens"] for example in some])
            ratings = torch.tensor(
                [[float("nan") if r is None else r for r in e["ratings"]] for e in some], device=DEVICE
            )
            errors = rewards(model, ids, mask) - ratings.nan_to_num()
            loss = torch.where(ratings.isnan(), 0.0, errors).square().sum() / count
            loss.backward()
            total += loss.item()
            tokens += ids.numel()
            real += int(mask.sum())
        optimizer.step()
        return {"loss": total, "computed_tokens": tokens, "unshared_tokens": real, "examples": len(examples)}

    return turn


def turn_of(name: str, folder: Path, options: argparse.Namespace):
    if name == "steerjax":
        return our_turns(folder, options.turns + 1, options)
    if name == "trainer":
        import trainer

        return trainer.peer_turns(folder, options.peer_batch)
    return peer_turns(folder, name == "grouped", options.peer_batch)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser, 8)
    add = parser.add_argument
    add("--layers", type=int, default=6)
    add("--devices", type=int, default=1, help="virtual CPU devices of steerjax, on the data axis")
    add("--rows", type=int, default=4, help="packed rows of a step of steerjax")
    add("--micro-batches", type=int, default=4)
    add("--peer-batch", type=int, default=8, help="texts that a peer computes at once")
    add("--chunk", type=int, default=256)
    add("--only", default=",".join(PEERS), help="some of the peers, with commas")
    o = parser.parse_args()
    if o.worker:
        name, folder = o.worker[0], Path(o.worker[1])
        serve(turn_of(name, folder, o))
        return
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        first_layers(o.model, folder / "start", o.layers)
        commands = workers(__file__, o.only.split(",") if o.only else (), o, KEYS, scratch)
        found = in_turn(commands, o.turns, {})
    settings = {key: vars(o)[key] for key in ("layers", *KEYS)}
    report("training", found, "steerjax", "unshared tokens", "unshared_tokens", settings)
    for name in found.keys() - {"steerjax", "trainer"}:  # the Trainer's steps have other examples
        apart = max(
            abs(a["loss"] - b["loss"]) for a, b in zip(found["steerjax"]["turns"], found[name]["turns"], strict=True)
        )
        print(f"losses of {len(found[name]['turns'])} steps: {name} differs by at most {apart:.1e}")


if __name__ == "__main__":
    main()
