"""How a train step grows with layers, width, row length and rows: time, and memory as compiled.

    python benchmarks/scaling.py [--rounds 5]

The step is that of `train` (a reward model, AdamW, float32) from a common middle: 4 layers, width 256, 4 rows of 1024
tokens. One thing at a time is changed. A row is filled with texts of 256 tokens, or holds one text (`row length, one
text`). All steps are timed in turn, --rounds times; medians count. Writes results/scaling.json and results/scaling.png,
relative to the middle, with the slopes of least-squares lines through the logarithms, and the model FLOPs.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from typing import NamedTuple

import numpy as np
from turns import RESULTS, machine

SHORT = 256  # tokens of a text
VOCABULARY = 512  # ids that occur


class Point(NamedTuple):
    """What a step is made of."""

    layers: int = 4
    width: int = 256  # with a head for every 64, a key-value head for every 128, and thrice as wide in between
    length: int = 1024
    rows: int = 4
    text: int = SHORT  # tokens; 0 is the row's length


AXES = {
    "layers": [Point(layers=n) for n in (1, 2, 4, 8, 16)],
    "width": [Point(width=n) for n in (128, 256, 512, 1024)],
    "row length": [Point(length=n) for n in (256, 512, 1024, 2048, 4096)],
    "row length, one text": [Point(length=n, text=0) for n in (256, 512, 1024, 2048, 4096)],
    "rows": [Point(rows=n) for n in (1, 2, 4, 8, 16)],
}


def size(axis: str, point: Point) -> int:
    """What the axis changes."""
    return getattr(point, {"row length": "length", "row length, one text": "length"}.get(axis, axis))


def make_step(point: Point):
    """A function that does one step and returns its seconds; bytes as compiled; model FLOPs."""
    from prepared import Steps, make_task

    from steerjax.data.packing import pack
    from steerjax.data.trees import grow
    from steerjax.objectives.objective import TRAIN, VALIDATION

    width = point.width
    task = make_task(
        model={"num_layers": point.layers, "hidden_size": width, "intermediate_size": 3 * width,
               "num_heads": width // 64, "num_kv_heads": width // 128},
        batch={"rows": point.rows, "row_length": point.length},
        optimizer={"warmup_steps": 0},
    )  # fmt: skip
    objectives, schema = task.objectives, task.schema
    random, examples = np.random.default_rng(0), []
    for _ in range(point.rows * point.length // (point.text or point.length)):
        tokens = random.integers(3, VOCABULARY, point.text or point.length, np.int32)
        ratings = {name: float(random.integers(5)) for name in schema.names}
        examples.append(objectives[0].example(TRAIN, tokens, len(tokens), ratings))
    objectives[0].example(VALIDATION, tokens, len(tokens), ratings)
    objectives[0].check_data()
    trees = grow(examples)
    rows = pack(trees, point.length)
    steps = Steps(task, trees)
    batch = steps.feed(rows)
    stats = steps.compile(batch).memory_analysis()

    def step() -> float:
        begun = time.perf_counter()
        float(steps.dispatch(batch)["loss"])
        return time.perf_counter() - begun

    used = stats.argument_size_in_bytes + stats.output_size_in_bytes - stats.alias_size_in_bytes
    return step, used + stats.temp_size_in_bytes, steps.facts(rows)["flops"]


def slope(sizes, values) -> float:
    """Of a line through the logarithms."""
    return float(np.polyfit(np.log(sizes), np.log(values), 1)[0])


def measure(rounds: int) -> dict[str, list[dict]]:
    """Each axis's points, with medians."""
    points = list(dict.fromkeys(point for each in AXES.values() for point in each))
    made = {}
    for number, point in enumerate(points, 1):
        print(f"compiling {number}/{len(points)}: {point}", file=sys.stderr)
        made[point] = make_step(point)
        made[point][0]()  # warms up
    seconds = {point: [] for point in points}
    for number in range(rounds):
        print(f"round {number + 1}/{rounds}", file=sys.stderr)
        for point, (step, _, _) in made.items():
            seconds[point].append(step())

    def said(axis: str, point: Point) -> dict:
        _, used, flops = made[point]
        times = {"seconds": statistics.median(seconds[point]), "least": min(seconds[point])}
        return {"size": size(axis, point), **times, "bytes": used, "flops": flops}

    return {axis: [said(axis, point) for point in each] for axis, each in AXES.items()}


def draw(found: dict[str, list[dict]]) -> None:
    """results/scaling.png"""
    from steerjax.report.plots import BLUE, GREY, INK, ORANGE, new_figure

    panels = [["layers"], ["width"], ["row length", "row length, one text"], ["rows"]]
    (middle,) = (one for one in found["layers"] if one["size"] == Point().layers)
    title = f"A train step, relative to {middle['seconds'] * 1e3:.0f} ms and {middle['bytes'] / 2**20:.0f} MiB"
    with new_figure(RESULTS / "scaling.png", 10.0, 8.4, title) as figure:
        for axes, names in zip(figure.subplots(2, 2).ravel(), panels, strict=True):
            for name in names:
                alone = name.endswith("one text")
                sizes = [one["size"] for one in found[name]]
                more = ", one text" if alone else ""
                for key, word, color in (
                    ("seconds", "time", BLUE),
                    ("bytes", "memory", ORANGE),
                    ("flops", "FLOPs", GREY),
                ):
                    values = np.array([one[key] for one in found[name]]) / middle[key]
                    color = INK if alone and key == "seconds" else color
                    style = "--" if key == "flops" else ("s-" if alone else "o-")
                    if alone and key == "bytes":
                        continue
                    label = f"{word}{more}, slope {slope(sizes, values):.2f}"
                    axes.plot(sizes, values, style, color=color, label=label, fillstyle="none" if alone else "full")
            axes.set(xscale="log", yscale="log", xlabel=names[0], title=names[0])
            axes.set_xticks(sizes, sizes)
            axes.minorticks_off()
            axes.legend(fontsize=8.5)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    found = measure(parser.parse_args().rounds)
    for axis, each in found.items():
        sizes = [one["size"] for one in each]
        slopes = {key: slope(sizes, [one[key] for one in each]) for key in ("seconds", "bytes", "flops")}
        said = ", ".join(f"{key} {value:.2f}" for key, value in slopes.items())
        print(f"{axis:>22}  slopes: {said}")
    RESULTS.mkdir(exist_ok=True)
    value = {"benchmark": "scaling", "machine": machine(), "middle": Point()._asdict(), "found": found}
    (RESULTS / "scaling.json").write_text(json.dumps(value, indent=1) + "\n")
    draw(found)


if __name__ == "__main__":
    main()
