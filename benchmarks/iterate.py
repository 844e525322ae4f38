"""A SteerLM 2.0 iteration on a small model, undisturbed and killed twice: the same files and parameters.

    python benchmarks/iterate.py --model SMOLLM2 [--folder FOLDER]

A reward model (24 steps) and a chat model with label lines (16) are trained from it on the packaged rows, then
`steerjax iterate` runs with 16 prompts, 4 answers each and 12 steps; then again, killed (SIGKILL) while it samples and
while it trains. Writes results/iterate.json. About 12 minutes on two cores. With --folder, trained models stay there.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from turns import RESULTS, machine

from steerjax.bundle.reader import CheckpointReader
from steerjax.report.records import write_json

THINGS = ("a prime", "an atom", "a noun", "gravity", "an island", "rust", "a verb", "ice", "a comet", "yeast",
          "a fossil", "a rhyme", "glass", "an echo", "a delta", "steam")  # fmt: skip
STAGES = ("samples", "rated", "log_sampled", "log_prior", "groups")


def options(**values) -> list[str]:
    return [f"--config.{key.replace('__', '.')}={value}" for key, value in values.items()]


QUIET = options(train__plots=False, train__trackers="", data__on_bad_row="skip", batch__row_length=512)
SHORT = options(optimizer__warmup_steps=1, train__evaluate_every=0, train__checkpoint_every=0)


def steerjax(*words: str) -> list[str]:
    return [sys.executable, "-m", "steerjax", *words, *QUIET]


def killed(command: list[str], log: Path, there: Callable[[], bool]) -> None:
    """Started, and killed when it has come so far."""
    with log.open("w") as out, subprocess.Popen(command, stdout=out, stderr=out) as process:
        while not there():
            if process.poll() is not None:
                raise SystemExit(f"it ended early: {log}")
            time.sleep(0.1)
        process.kill()


def content(folder: Path) -> dict[str, bytes]:
    """Files of the stages, the result, and the parameters of the last checkpoint."""
    found = {name: (folder / f"{name}.jsonl").read_bytes() for name in STAGES}
    found["result"] = (folder / "result.json").read_bytes()
    reader = CheckpointReader(max((folder / "run/checkpoints").iterdir(), key=lambda step: int(step.name)))
    return found | {path: reader.read(path, ...).tobytes() for path in reader.shapes}


def measured(folder: Path, model: str) -> dict:
    source = [f"--config.model.source={model}"]
    rm, sft, prompts = folder / "rm", folder / "sft", folder / "prompts.jsonl"
    for command in (
        steerjax("train", "--config=rm_smollm2", *source, *SHORT, *options(train__steps=24), f"--workdir={rm}"),
        steerjax("train", "--config=sft_smollm2", *source, *SHORT, f"--workdir={sft}",
                 *options(train__steps=16, optimizer__learning_rate=1e-4)),
    ):  # fmt: skip
        subprocess.run(command, check=True)
    asking = "In one short sentence of at most ten words: what is {}?"
    prompts.write_text("".join(json.dumps({"prompt": asking.format(thing)}) + "\n" for thing in THINGS))

    def iterate(workdir: Path) -> list[str]:
        return steerjax(
            "iterate", "--config=sft_steerlm2", f"--workdir={workdir}", f"--prompts={prompts}", f"--reward-model={rm}",
            "--attributes=helpfulness=4,correctness=4,coherence=4,complexity=2,verbosity=2", "--iterations=1",
            "--samples=4", "--max-new-tokens=64",
            *options(model__source=sft, data__validation_fraction=0.25, batch__rows=4, batch__micro_batches=1,
                     train__steps=12, train__checkpoint_every=2, train__evaluate_every=2),
        )  # fmt: skip

    subprocess.run(iterate(folder / "whole"), check=True)
    one = folder / "killed" / "iteration-1"
    begun = one / "samples.jsonl.partial"
    killed(iterate(folder / "killed"), folder / "1.log",
           lambda: begun.exists() and begun.read_bytes().count(b"\n") >= 20)  # fmt: skip
    killed(iterate(folder / "killed"), folder / "2.log", (one / "run" / "checkpoints" / "2").exists)
    subprocess.run(iterate(folder / "killed"), check=True)
    whole, resumed = content(folder / "whole" / "iteration-1"), content(one)
    steps = map(json.loads, (folder / "whole/iteration-1/run/metrics.jsonl").read_text().splitlines())
    distances = [step["distance"] for step in steps if step["split"] == "train"]
    return {
        "compared": len(whole),
        "differ": sorted(name for name in whole.keys() | resumed.keys() if whole.get(name) != resumed.get(name)),
        "distance in training": [distances[0], distances[-1]],
        "result": json.loads(whole["result"]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a folder with SmolLM2-135M-Instruct")
    parser.add_argument("--folder", type=Path, help="default: one that goes at the end")
    o = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        found = {"machine": machine(), **measured((o.folder or Path(scratch)).resolve(), o.model)}
    write_json(RESULTS / "iterate.json", found)
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
