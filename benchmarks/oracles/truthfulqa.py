"""Our TruthfulQA rows beside lm-evaluation-harness's samples of the same model, choice by choice.

    python -m steerjax evaluate --suite truthfulqa --model DIR --data mc_task.json --output OURS
    lm_eval run --model hf --model_args pretrained=DIR,dtype=float32 --tasks truthfulqa_mc1,truthfulqa_mc2 \
        --device cpu --log_samples --output_path THEIRS
    python benchmarks/oracles/truthfulqa.py OURS THEIRS

lm-eval 0.4.13 needs an environment of its own. Questions that only one side has are left out. With --up_to_a_constant,
which is for --prompt few_shot against --apply_chat_template, a question's log-likelihoods may differ by one number: the
harness counts the white space that ends the template's header as a part of every choice.
"""

import argparse
import json
from pathlib import Path

import numpy as np

LIKELIHOOD, SCORE = 1e-3, 0.002  # differences that are let pass


def their_samples(folder: Path, task: str) -> dict[str, dict]:
    """The newest samples of a task, by question."""
    files = sorted(folder.rglob(f"samples_*{task}_*.jsonl"), key=lambda path: path.name)
    samples = [json.loads(line) for line in files[-1].read_text(encoding="utf-8").splitlines()]
    return {sample["doc"]["question"]: sample for sample in samples}


def compare(ours: Path, theirs: Path, constant: bool) -> bool:
    rows = {row["question"]: row for row in map(json.loads, (ours / "rows.jsonl").read_text("utf-8").splitlines())}
    good = True
    for name in ("mc1", "mc2"):
        samples = their_samples(theirs, f"truthfulqa_{name}")
        shared = [question for question in samples if question in rows]
        differences, offsets, greedy, scores = [], [], 0, []
        for question in shared:
            sample = samples[question]
            mine = {choice["text"]: choice for choice in rows[question]["choices"]}
            answers = [(float(value), flag == "True") for ((value, flag),) in sample["resps"]]
            mine = [mine[text] for text in sample["doc"][f"{name}_targets"]["choices"]]
            difference = np.array([a["log_likelihood"] - b for a, (b, _) in zip(mine, answers, strict=True)])
            offsets.append(np.median(difference))
            differences += (difference - constant * offsets[-1]).tolist()
            greedy += sum(a["greedy"] != b for a, (_, b) in zip(mine, answers, strict=True))
            scores.append((rows[question][name], sample["acc"]))
        scores, worst = np.array(scores), np.abs(differences).max()
        means = scores.mean(axis=0)
        good &= bool(worst <= LIKELIHOOD and abs(means[0] - means[1]) <= SCORE)
        print(f"{name}: {len(shared)} questions, {len(differences)} choices")
        print(f"  ours {means[0]:.6f}, harness {means[1]:.6f}, difference {means[0] - means[1]:+.2e}")
        print(f"  largest difference of a question's score {np.abs(scores[:, 0] - scores[:, 1]).max():.2e}")
        print(f"  largest difference of a log-likelihood {worst:.2e}; 'greedy' differs {greedy} times")
        if constant:
            print(f"  after a constant for each question, {np.min(offsets):+.4f} to {np.max(offsets):+.4f}")
    return good


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ours", type=Path)
    parser.add_argument("theirs", type=Path)
    parser.add_argument("--up_to_a_constant", action="store_true")
    options = parser.parse_args()
    raise SystemExit(not compare(options.ours, options.theirs, options.up_to_a_constant))
