"""Counts that no change may make worse unseen: tokens, FLOPs, memory, compilations. CI runs this.

    python benchmarks/counts.py            # exit status 1 if one is worse than in counts.json
    python benchmarks/counts.py --write    # after a change that made one better, or worse for a reason

* tokens: of a HelpSteer example (the packaged rows) in packed rows and written whole; with padding, whole examples are
  in batches of 8.
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
from pathlib import Path

if __name__ == "__main__":  # of LLVM no optimization: what is counted comes before it
    os.environ |= {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_backend_optimization_level=0"}

import jax
import numpy as np
from flop_count import counted

from steerjax.annotate import main as annotate
from steerjax.chat.render import make_renderer
from steerjax.config import default_config, resolve
from steerjax.data.batch import BatchPlan
from steerjax.data.packing import packing_statistics
from steerjax.generate import main as generate
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


def reward(remat: str) -> Experiment:
    return experiment("reward", compute={"attention": "blockwise", "remat": remat})


class Setup:
    """What `train` makes of an experiment before its first step."""

    def __init__(self, e: Experiment):
        e = plannable(e, 1)
        schema, mesh = e.data.make_schema(), make_mesh(e.mesh)
        objectives = make_objectives(e, schema, renderer := make_renderer(e.chat, schema))
        self.plan = make_input(e, objectives, renderer).plan
        self.rows = self.plan.step_rows(0)
        feed = make_feeder(self.plan.trees, objectives, e.batch.row_length, mesh, e.batch.micro_batches)
        self.program, self.batch = Program(e, schema, objectives, mesh, feed, e.train.steps), feed(self.rows)


def tokens(plan: BatchPlan) -> dict[str, float]:
    packed = packing_statistics(plan.trees, plan.epoch(0), plan.row_length)
    lengths = [len(example.tokens) for tree in plan.trees for example in tree.examples]
    batches = [lengths[at : at + 8] for at in range(0, len(lengths), 8)]
    each = {
        "packed": packed.tokens,
        "packed, with padding": packed.rows * plan.row_length,
        "whole": sum(lengths),
        "whole, with padding": sum(len(batch) * max(batch) for batch in batches),
    }
    return {name: round(number / packed.examples, 2) for name, number in each.items()}


def flops(none: Setup) -> dict[str, float]:
    """Of steps and a forward with blockwise attention, over model FLOPs; `none` is without remat."""
    found = {}
    for remat in ("none", "dots", "full"):
        s = none if remat == "none" else Setup(reward(remat))
        model = s.program.step_facts(s.rows, s.plan.trees)["flops"]
        state, params = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), (s.program.abstract, s.program.whole))
        found[f"step, remat {remat}"] = counted(s.program.train_step, state, s.batch) / model
        if remat == "none":
            batch = jax.tree.map(lambda x: x[0], s.batch)
            once = counted(lambda params, b, s=s: forward(s.program.module, params, b, 0)[1], params, batch)
            found["forward"] = once / (model / 3)
    return {name: round(ratio, 4) for name, ratio in found.items()}


def memory() -> dict[str, int]:
    """Of 4 rows of 512 tokens."""
    found = {}
    for kind, remat, micro_batches in (("reward", "full", 2), ("chat", "dots", 1)):
        batch = {"row_length": 512, "micro_batches": micro_batches}
        e = experiment(kind, batch=batch, compute={"remat": remat, "attention_chunk": 128})
        name = f"{kind}, remat {remat}, micro-batches {micro_batches}"
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
        folder = Path(name)
        ratings = dict.fromkeys(("helpfulness", "correctness", "coherence", "complexity", "verbosity"), 2)
        rows = ({"turns": [{"role": "user", "content": f"{n} {text}"},
                           {"role": "assistant", "content": text, "ratings": ratings}]}
                for n in range(8) for text in PROMPTS)  # fmt: skip
        (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        groups = {
            "data": {"train": (str(folder / "rows.jsonl"),)},
            "model": TINY,
            "batch": {"row_length": 1024},
            "compute": {"attention": "chunked", "attention_chunk": 1024},
            "optimizer": {"warmup_steps": 1},
            "train": {"steps": 6, "evaluate_every": 2, "checkpoint_every": 3, "plots": False},
        }
        for kind in ("reward", "chat"):
            run(f"train, {kind}", train, experiment(kind, **groups), folder / kind)
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
    none = Setup(reward("none"))
    new = {"tokens": tokens(none.plan), "flops": flops(none), "memory": memory(), "compilations": compilations()}
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
