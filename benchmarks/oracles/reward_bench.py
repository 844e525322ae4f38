"""The figures of the reward-model suites beside those of the benchmarks' own code, on the scores in rows.jsonl.

    python benchmarks/oracles/reward_bench.py make --suite reward_bench_2 --folder DIR     made-up scores, with ties
    ORACLE benchmarks/oracles/reward_bench.py check --folder DIR [--code FILE]

DIR of `check` is what `make`, or `steerjax evaluate --suite NAME --output DIR`, has left. ORACLE is the Python of an
environment with `rewardbench` (0.1.4: torch, rewardbench==0.1.4, "trl<0.20"), which knows nothing of steerjax. --code
is the file with the official function where that package has it not: of reward_bench_2 the repository's
rewardbench/utils.py (0.1.5, whose Ties formula is ours), of rm_bench scripts/utils.py, of judge_bench utils/metrics.py.
Only its functions are executed. Exit status 1: a figure differs by more than 1e-12.
"""

from __future__ import annotations

import argparse
import ast
import collections
import json
import math
import sys
import typing
from pathlib import Path

import numpy as np


def make(suite: str, folder: Path) -> None:
    from tests.evaluation.benchmark_rows import SUITES, made_rows

    rows, module = made_rows(suite), SUITES[suite]
    figures = {name: {"value": float(value)} for name, (value, _) in module.measure(module.columns(rows)).items()}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "results.json").write_text(json.dumps({"suite": suite, "figures": figures}))


def functions(path: Path) -> dict:
    """The functions of a module, without its imports."""
    tree = ast.parse(path.read_text())
    tree.body = [ast.parse("from __future__ import annotations").body[0]] + [
        node for node in tree.body if isinstance(node, ast.FunctionDef)
    ]
    names = {"np": np, "defaultdict": collections.defaultdict, **{n: getattr(typing, n) for n in ("List", "Dict")}}
    exec(compile(ast.fix_missing_locations(tree), str(path), "exec"), names)
    return names


def reward_bench(rows: list[dict], name: str, code: Path | None) -> dict[str, float]:
    from rewardbench.constants import EXAMPLE_COUNTS, SUBSET_MAPPING
    from rewardbench.utils import calculate_scores_per_section

    right = collections.defaultdict(list)
    for row in rows:
        chosen, rejected = row["scores"][name]
        right[row["subset"]].append(1 if chosen > rejected else 0)
    by_subset = {subset: sum(values) / len(values) for subset, values in right.items()}
    sections = calculate_scores_per_section(EXAMPLE_COUNTS, SUBSET_MAPPING, by_subset)
    there = {section for section, subsets in SUBSET_MAPPING.items() if set(subsets) & set(by_subset)}
    found = {section: value for section, value in sections.items() if section in there}  # 0 without rows
    return found | ({"mean": float(np.mean([*sections.values()]))} if len(there) == len(sections) else {})


def reward_bench_2(rows: list[dict], name: str, code: Path | None) -> dict[str, float]:
    import rewardbench
    from datasets import Dataset, disable_progress_bars

    disable_progress_bars()
    official = functions(code)["process_single_model"] if code else rewardbench.process_single_model
    flat = [
        {"text": "", "scores": score, "subset": row["subset"], "id": row["id"], "num_correct": row["num_correct"]}
        for row in rows
        for score in row["scores"][name]
    ]
    counts = [len(row["scores"][name]) for row in rows]
    rerolled = rewardbench.reroll_and_score_dataset(Dataset.from_list(flat), counts)
    found = {}
    for subset in dict.fromkeys(row["subset"] for row in rows):
        part = rerolled.filter(lambda row, subset=subset: row["subset"] == subset)
        found[subset] = official(part)[1] if subset == "Ties" else sum(part["results"]) / len(part)
    return found | ({"mean": float(np.mean([*found.values()]))} if len(found) == 6 else {})


def rm_bench(rows: list[dict], name: str, code: Path) -> dict[str, float]:
    official, scored = functions(code)["compute_accuracy"], []
    for row in rows:
        scores = row["scores"][name]
        scored.append({"domain": row["domain"], "score_chosen": scores[:3], "score_rejected": scores[3:]})
    found = {}
    for domain in ("chat", "math", "code", "safety"):
        part = [{k: v for k, v in one.items() if k != "domain"} for one in scored if one["domain"].startswith(domain)]
        if part:
            found |= {f"{domain}/{level.removesuffix('_acc')}": value for level, value in official(part).items()}
    if len(found) == 12:
        names = {"hard_acc": "hard", "normal_acc": "normal", "easy_acc": "easy", "total_avg_acc": "Overall"}
        found |= {names.get(key, key): value for key, value in official(scored).items()}
    return found


def judge_bench(rows: list[dict], name: str, code: Path) -> dict[str, float]:
    official, pairs = functions(code)["compute_final_metrics"], []
    for row in rows:
        a, b = row["scores"][name]
        judged = [{"decision": "A>B" if a > b else "B>A"}]
        pairs.append({"source": row["source"], "label": row["label"], "judgments": judged})
    sources = {"Knowledge": "mmlu-pro", "Reasoning": "livebench-reasoning", "Math": "livebench-math"}
    found = {}
    for category, begin in (sources | {"Coding": "livecodebench", "Overall": ""}).items():
        if any(pair["source"].startswith(begin) for pair in pairs):
            found[category] = official(pairs, False, lambda pair, begin=begin: pair["source"].startswith(begin)) / 100
    return found


def check(folder: Path, code: Path | None) -> bool:
    """Prints ours and theirs; whether they are the same, and theirs are all that we have of a section."""
    said = json.loads((folder / "results.json").read_text())
    rows = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
    rows = [row for row in rows if "skipped" not in row]
    names, largest = list(rows[0]["scores"]), 0.0
    for row in rows:
        row["scores"]["longer wins"] = row["characters"]
    for name in (*names, "longer wins"):
        prefix = "" if len(names) == 1 and name in names else f"{name}/"
        for figure, theirs in globals()[said["suite"]](rows, name, code).items():
            ours = said["figures"][prefix + figure]["value"]
            ours, theirs = math.nan if ours is None else ours, float(theirs)
            print(f"{prefix + figure:40} {ours!r:22} {theirs!r:22}")
            differs = abs(ours - theirs) if not (math.isnan(ours) and math.isnan(theirs)) else 0.0
            largest = math.inf if math.isnan(differs) else max(largest, differs)
    print(f"largest difference {largest:.3g}")
    return largest <= 1e-12


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("do", choices=("make", "check"))
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--suite", choices=("reward_bench", "reward_bench_2", "rm_bench", "judge_bench"))
    parser.add_argument("--code", type=Path)
    options = parser.parse_args()
    if options.do == "make":
        make(options.suite, options.folder)
    else:
        sys.exit(not check(options.folder, options.code))
