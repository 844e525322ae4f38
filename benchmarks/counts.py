"""Counts that no change may make worse unseen: tokens, FLOPs, memory, compilations. A test runs this.

    python benchmarks/counts.py            # exit status 1 if one is worse than in counts.json
    python benchmarks/counts.py --write    # after a change that made one better, or worse for a reason

* tokens: of a HelpSteer example (the packaged rows), in packed rows, written whole, and in batches of 8 padded to their
  longest, with tokens that are computed and are padding counted.
* flops: matrix products of a step or forward over its model FLOPs, on real packed rows. Loops are counted as often as
  these rows' masks make them turn (flop_count.py), which XLA's own count does not do.
* memory: temporary bytes of the compiled train step for one CPU device.
* compilations: programs that a command compiles, small ones too.

Two small Llamas: what is counted does not depend on what a model has learnt.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_backend_optimization_level=0"  # of LLVM: what is counted comes before it

import jax
import numpy as np
from flop_count import counted

from steerjax.annotate import main as annotate
from steerjax.chat.render import make_renderer
from steerjax.config import default_config, resolve
from steerjax.data.packing import packing_statistics
from steerjax.generate import main as generate
from steerjax.models.flops import training_flops
from steerjax.parallel.mesh import make_mesh
from steerjax.planning.compile import compile_step, plannable
from steerjax.training.config import Experiment
from steerjax.training.input import make_feeder, make_input
from steerjax.training.program import Program, make_objectives
from steerjax.training.step import forward
from steerjax.training.train import train

STORED = Path(__file__).with_name("counts.json")
# How much worse a count may be: FLOPs and bytes differ a little between versions of jax.
MARGINS = {"tokens": 1.0, "flops": 1.01, "memory": 1.03, "compilations": 1.0}
WIDTHS = {"hidden_size": 256, "intermediate_size": 768, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2}
TINY = {"hidden_size": 32, "intermediate_size": 64, "num_layers": 2, "num_heads": 2, "num_kv_heads": 1}
# Prompts of one batch and of several, a few tokens to some hundred.
PROMPTS = ("a river", "a river and a very old stone " * 3, "trees", "winds " * 60, "what it knows " * 90, "x")


def experiment(kind: str, **groups) -> Experiment:
    """A recipe for the packaged rows with the changes of each group."""
    config = default_config()
    config.objectives = ("regression",) if kind == "reward" else ("sft",)
    config.model.update(WIDTHS)
    config.batch.update(rows=4, row_length=2560)
    for group, changes in groups.items():
        config[group].update(changes)
    return resolve(config.to_dict())


class Setup:
    """What `train` makes of an experiment before its first step."""

    def __init__(self, e: Experiment):
        e = plannable(e, 1)
        self.experiment, schema, self.mesh = e, e.data.make_schema(), make_mesh(e.mesh)
        objectives = make_objectives(e, schema, make_renderer(e.chat, schema))
        self.data = make_input(e, objectives, make_renderer(e.chat, schema))
        self.plan = self.data.plan
        feed = make_feeder(self.plan.trees, objectives, e.batch.row_length, self.mesh, e.batch.micro_batches)
        self.program = Program(e, schema, objectives, self.mesh, feed, e.train.steps)
        self.rows = self.plan.step_rows(0)
        self.batch = feed(self.rows)


def tokens() -> dict[str, float]:
    setup = Setup(experiment("reward"))
    trees, length = setup.plan.trees, setup.experiment.batch.row_length
    packed = packing_statistics(trees, setup.plan.epoch(0), length)
    lengths = [len(example.tokens) for tree in trees for example in tree.examples]
    batches = [lengths[at : at + 8] for at in range(0, len(lengths), 8)]
    each = {
        "packed": packed.tokens,
        "packed, with padding": packed.rows * length,
        "whole": sum(lengths),
        "whole, with padding": sum(len(batch) * max(batch) for batch in batches),
    }
    return {name: round(number / packed.examples, 2) for name, number in each.items()}


def flops() -> dict[str, float]:
    """Of the step for back ends and remat, and of the forward, over model FLOPs."""
    found = {}
    for attention, remat in (("chunked", "none"), ("blockwise", "none"), ("blockwise", "full")):
        s = Setup(experiment("reward", compute={"attention": attention, "remat": remat, "unroll": 1}))
        model = s.program.step_facts(s.rows, s.plan.trees)["flops"]
        state, params = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), (s.program.abstract, s.program.whole))
        found[f"step, {attention}, remat {remat}"] = counted(s.program.train_step, state, s.batch) / model
        if (attention, remat) == ("blockwise", "none"):
            batch = jax.tree.map(lambda x: x[0], s.batch)
            once = counted(lambda params, b, s=s: forward(s.program.module, params, b, 0)[1], params, batch)
            found[f"forward, {attention}"] = once / (model / 3)
    return {name: round(ratio, 4) for name, ratio in found.items()}


def memory() -> dict[str, int]:
    """Of 4 rows of 512 tokens."""
    found = {}
    for kind, remat, micro_batches in (
        ("reward", "none", 1), ("reward", "full", 1), ("reward", "none", 2), ("chat", "none", 1), ("chat", "full", 2),
    ):  # fmt: skip
        batch = {"row_length": 512, "micro_batches": micro_batches}
        e = experiment(kind, batch=batch, compute={"remat": remat, "attention_chunk": 128})
        name = f"{kind}, remat {remat}, {micro_batches} micro-batches"
        found[name] = int(compile_step(plannable(e, 1), jax.devices()).parts["temp"])
    return found


def compilations() -> dict[str, int]:
    """Of `train` (six steps, three evaluations, two checkpoints), `annotate` and `generate`."""
    events: list[str] = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, seconds, **_: events.append(event) if event.endswith("backend_compile_duration") else None
    )
    found = {}

    def run(name: str, command, *arguments) -> None:
        jax.clear_caches()
        events.clear()
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            command(*arguments)
        found[name] = len(events)

    with tempfile.TemporaryDirectory() as name:
        folder, short = Path(name), {"steps": 6, "evaluate_every": 2, "checkpoint_every": 3, "plots": False}
        for kind in ("reward", "chat"):
            e = experiment(kind, model=TINY, train=short, optimizer={"warmup_steps": 1})
            run(f"train, {kind}", train, e, folder / kind)
        rows = ({"turns": [{"role": "user", "content": text}, {"role": "assistant", "content": text}]}
                for text in PROMPTS * 8)  # fmt: skip
        (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in PROMPTS))
        for name, command, *options in (
            ("annotate", annotate, "--model", "reward", "--input", "rows.jsonl", "--chunk-rows=16"),
            ("generate", generate, "--model", "chat", "--input", "prompts.jsonl", "--max-new-tokens=8",
             "--batch-size=2"),
        ):  # fmt: skip
            given = [str(folder / option) if "." in option or option in ("reward", "chat") else option
                     for option in options]  # fmt: skip
            run(name, command, [*given, "--output", str(folder / f"{name}.out.jsonl")])
    return found


def worse(new: dict, old: dict) -> list[str]:
    """What is worse than it was by more than its margin, or is not there."""
    said = []
    for group, counts in old.items():
        for name, before in counts.items():
            now = new[group].get(name)
            if now is None or now > before * MARGINS[group]:
                said.append(f"{group}, {name}: {now}, was {before}")
    return said


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write counts.json")
    write = parser.parse_args().write
    jax.config.update("jax_enable_compilation_cache", False)
    new = {"tokens": tokens(), "flops": flops(), "memory": memory(), "compilations": compilations()}
    text = json.dumps(new, indent=1) + "\n"
    print(text, end="")
    if write:
        STORED.write_text(text)
        return 0
    said = worse(new, json.loads(STORED.read_text()))
    print("\n".join(said), file=sys.stderr)
    return 1 if said else 0


if __name__ == "__main__":
    sys.exit(main())
