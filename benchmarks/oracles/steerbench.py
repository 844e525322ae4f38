"""STEERBENCH's measures against its repository's own code, on random vectors; prints the largest differences.

python benchmarks/oracles/steerbench.py DIR    (src/steerability of github.com/tchang1997/steerability)

`steerability_metrics.py` runs alone: of its package only the reader of judgments is missing, which the measures do not
call. Its `get_orthogonality` bins the request even where the rest is continuous; the continuous ones, of which the
paper's formulas speak, are `rewards.py`'s.
"""

import ast
import sys
import types
from pathlib import Path

import numpy as np
import pandas as pd

from steerjax.evaluation.steerbench import MEASURES, binned, continuous, measures


def binning(folder: Path) -> types.ModuleType:
    for name in ("steerability", "steerability.utils", "steerability.utils.probe_utils"):
        sys.modules[name] = types.ModuleType(name)
    sys.modules["steerability.utils.probe_utils"].get_grounded_subset = None
    module = types.ModuleType("steerability_metrics")
    exec(compile((folder / "steerability_metrics.py").read_text(), module.__name__, "exec"), module.__dict__)
    return module


def rewards(folder: Path, output: dict[str, np.ndarray]) -> dict:
    """The functions of `rewards.py` over texts that are measured already."""
    wanted = ("scalar_rejection", "scalar_projection", "orthogonality_wrapper", "miscalibration_wrapper")
    tree = ast.parse((folder / "rewards.py").read_text())
    tree.body = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name in wanted]
    names = {"np": np, "prepare_completions_for_goalspace": lambda texts: texts, "get_mappings": lambda *_: output}
    exec(compile(tree, "rewards", "exec"), names)
    return names


def vectors(count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """source, output, target [count, 4]: some on the ends, some goals not asked for, some texts unmoved or exact."""
    random = np.random.default_rng(seed)
    source = np.clip(random.uniform(-0.2, 1.2, (count, 4)), 0, 1)
    target = np.clip(source + random.uniform(-0.7, 0.7, (count, 4)), 0, 1)
    output = np.clip(source + random.uniform(-0.5, 0.5, (count, 4)), 0, 1)
    output[::7], output[1::7] = source[::7], target[1::7]
    target[random.random((count, 4)) < 0.3] = np.nan
    target[2::7] = np.nan
    return source, output, target


def main(folder: Path) -> None:
    metrics, (source, output, target) = binning(folder), vectors(5000)
    goals, parts = metrics.DEFAULT_STEERING_GOALS, {"source": source, "output": output, "target": target}

    def named(part: str, values: np.ndarray) -> dict[str, np.ndarray]:
        return {f"{part}_{goal}": values[:, i] for i, goal in enumerate(goals)}

    frame = pd.DataFrame({k: v for part in parts for k, v in named(part, parts[part]).items()}
                         | named("delta", target - source))  # fmt: skip
    own = rewards(folder, {goal: output[:, i] for i, goal in enumerate(goals)})
    asked = {"model_name": [""], "steering_goals": goals, "normalize_ortho": True, "normalize_miscal": True}
    asked |= named("source", source) | named("target", np.where(np.isnan(target), source, target))
    official = {
        continuous: (metrics.get_steering_error(frame, cut_points=None), -own["miscalibration_wrapper"](None, **asked),
                     -own["orthogonality_wrapper"](None, **asked)),
        binned: [of(frame) for of in (metrics.get_steering_error, metrics.get_miscalibration,
                                      metrics.get_orthogonality)],
    }  # fmt: skip
    for movement, expected in official.items():
        found = measures(movement(source, output, target))
        for measure, value in zip(MEASURES, expected, strict=True):
            difference = np.abs(found[measure] - np.asarray(value)).max()
            print(f"{movement.__name__:10} {measure:14} {difference:.1e} of {len(source)}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
