"""What the host does before and beside the steps: rows read, checked, tokenised, grown into trees, packed, and fed.

    python benchmarks/host.py [--rows 1000000] [--tokenizer SMOLLM2 --template chatml]

Rows are the packaged HelpSteer's, each text made another one by a number; they are written to a temporary folder that
goes at the end. Each stage is one of training's own functions, timed alone: seconds, of a processor too (which other
programs slow less), and the memory held after it. Then steps of a model of 2 layers are timed, in turn, with one batch
that is there and with a batch that is fed anew; what feeding adds to a step is what the step waits for the host.
Writes results/host.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
from prepared import Steps, Task, make_task
from turns import RESULTS, held_gib, machine, peak_gib

from steerjax.data.loading import load_conversations, shared_prompts, split_by_prompt
from steerjax.data.packing import epoch_rows, packing_statistics
from steerjax.data.readers import iter_rows
from steerjax.data.trees import grow
from steerjax.errors import DataError
from steerjax.objectives.objective import TRAIN


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--rows", type=int, default=1_000_000)
    add("--tokenizer", default="embedded", help="a folder, or the packaged one")
    add("--template", default="extra_id")
    add("--row-length", type=int, default=2048)
    add("--rows-a-step", type=int, default=4)
    add("--turns", type=int, default=5, help="pairs of steps, after one that compiles")
    o = parser.parse_args()
    task = make_task(
        chat={"tokenizer": o.tokenizer, "template": o.template},
        batch={"rows": o.rows_a_step, "row_length": o.row_length},
        model={"hidden_size": 128, "intermediate_size": 256, "num_layers": 2, "num_heads": 2},
    )
    schema, renderer, objectives = task.schema, task.renderer, task.objectives
    stages: dict[str, dict[str, float]] = {}

    def timed(name: str, stage: Callable):
        wall, used = time.perf_counter(), time.process_time()
        found = stage()
        wall, used = time.perf_counter() - wall, time.process_time() - used
        stages[name] = {"seconds": wall, "processor_seconds": used, "rows_a_second": o.rows / wall, "gib": held_gib()}
        print(f"{name:28}{wall:10.2f} s{used:10.2f} of a processor{o.rows / wall:12,.0f} rows/s"
              f"{held_gib():8.2f} GiB held", flush=True)  # fmt: skip
        return found

    with tempfile.TemporaryDirectory() as folder:
        file = write_rows(Path(folder) / "rows.jsonl", o.rows)
        timed("read JSONL", lambda: sum(1 for _ in iter_rows(file)))
        conversations = timed("read and check", lambda: load_conversations([file], schema).conversations)
    parts = timed("split by prompt", lambda: split_by_prompt(conversations, 0.1, 0))
    timed("look for shared prompts", lambda: shared_prompts(*parts))
    parts = ()
    examples, left_out = timed("render and tokenise", lambda: learnt(conversations, objectives[0], renderer))
    trees = timed("grow trees", lambda: grow(examples))
    tokens = sum(len(example.tokens) for example in examples)
    examples.clear()
    rows = timed("pack an epoch", lambda: epoch_rows(trees, o.row_length, 0, 0))
    packed = packing_statistics(trees, rows, o.row_length)
    whole = sum(stages[name]["seconds"] for name in stages if name != "read JSONL")
    peak = peak_gib()
    print(f"{'all of these':28}{whole:10.2f} s{'':25}{o.rows / whole:12,.0f} rows/s{peak:8.2f} GiB at most")
    print(f"{tokens:,} tokens, {packed.tokens:,} in {len(rows):,} rows; {left_out} rows too long")
    for objective in objectives:
        for part in objective.data.values():  # the benchmark trains no validation
            part.rows = part.rows or [(0.0,) * len(schema)]
        objective.check_data()
    feeding = feed(task, trees, rows, o.turns)
    print("a step: {fixed:.1f} ms with one batch, {fed:.1f} with feeding; feeding alone {feed:.1f} ms, "
          "{tokens_a_second:,.0f} tokens/s".format(**feeding))  # fmt: skip
    value = {
        "benchmark": "host", "machine": machine(), "settings": vars(o), "stages": stages, "seconds": whole,
        "rows_a_second": o.rows / whole, "peak_gib": peak, "tokens": tokens, "packed_tokens": packed.tokens,
        "feeding": feeding,
    }  # fmt: skip
    (RESULTS / "host.json").write_text(json.dumps(value, indent=1, sort_keys=True) + "\n")


def write_rows(file: Path, count: int) -> str:
    """So many rows: the packaged ones, and again with other texts."""
    rows = [row for _, row in iter_rows("embedded:helpsteer")]
    with file.open("w") as out:
        for number in range(count):
            turn, place = divmod(number, len(rows))
            row = rows[place]
            if turn:
                row = row | {"prompt": f"({turn}) {row['prompt']}", "response": f"{row['response']} ({turn})"}
            out.write(json.dumps(row) + "\n")
    return str(file)


def learnt(conversations: list, objective, renderer) -> tuple[list, int]:
    """As `make_input` does: the examples, and how many rows are left out."""
    found, left_out = [], 0
    conversations.reverse()
    while conversations:
        conversation = conversations.pop()
        renderer.broken(conversation)
        try:
            found += objective.examples(conversation, TRAIN)
        except DataError:
            left_out += 1
    return found, left_out


def feed(task: Task, trees, rows, turns: int) -> dict[str, float]:
    """Milliseconds of steps that are dispatched one ahead, as the loop does, and of feeding alone."""
    step, size = Steps(task, trees), task.experiment.batch.rows
    count = max(1, min(4, len(rows) // size))
    batches = [rows[i * size : (i + 1) * size] for i in range(count)]
    fixed = step.feed(batches[0])

    def steps(batch: Callable) -> float:
        begun, pending = time.perf_counter(), None
        for each in batches:
            before, pending = pending, step.dispatch(batch(each))
            jax.device_get(before)
        jax.device_get(pending)
        return (time.perf_counter() - begun) / count * 1e3

    steps(step.feed)
    pairs = [(steps(lambda _: fixed), steps(step.feed)) for _ in range(turns)]
    begun = time.perf_counter()
    for each in batches:
        jax.block_until_ready(step.feed(each))
    alone = (time.perf_counter() - begun) / count
    added = [fed / one - 1 for one, fed in pairs]
    return {
        "fixed": statistics.median(one for one, _ in pairs), "fed": statistics.median(fed for _, fed in pairs),
        "added": {"median": statistics.median(added), "least": min(added), "greatest": max(added)},
        "feed": alone * 1e3, "tokens_a_second": float(np.prod((size, task.experiment.batch.row_length)) / alone),
    }  # fmt: skip


if __name__ == "__main__":
    main()
