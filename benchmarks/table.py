"""The table of README.md from results/*.json.

python benchmarks/table.py
"""

from __future__ import annotations

import json

from turns import REPOSITORY, RESULTS

README = REPOSITORY / "benchmarks" / "README.md"
BEGIN, END = "<!-- table.py -->\n", "<!-- end -->\n"
_TRAINING, _ANNOTATION = "training.py --model SMOLLM2", "annotation.py --model SMOLLM2 --prompts 5 --only padded,sorted"
_SFT, _DECODING = "sft.py --model SMOLLM2", "decoding.py --model SMOLLM2 --batch"
_OASST = "sft.py --model SMOLLM2 --oasst TREES.jsonl --only trl,unshared"
# results, worker, command, what it is, goal
ROWS = (
    ("training", "padded", _TRAINING, "transformers in PyTorch, batches of 8, padded", "6"),
    ("training", "grouped", _TRAINING, "the same, sorted by length", "2.5"),
    ("training", "trainer", _TRAINING, "transformers' Trainer, grouped by length", ""),
    ("annotation", "padded", _ANNOTATION, "transformers, batches of 8, padded", "4"),
    ("annotation", "sorted", _ANNOTATION, "the same, sorted by length", "2.5"),
    ("annotation_vllm", "vllm", "annotation.py --model SMOLLM2 --vllm PYTHON --only vllm", "vLLM, prefixes cached", ""),
    ("sft_helpsteer", "trl", _SFT, "TRL's SFTTrainer, packed (`bfd`)", "1.3"),
    ("sft_helpsteer", "padded", _SFT, "a loop in PyTorch, batches of 8, logits of trained tokens alone", ""),
    ("sft_helpsteer", "unshared", _SFT, "steerjax, prompts not shared", ""),
    ("sft_oasst", "trl", _OASST, "TRL's SFTTrainer, packed (`bfd`), all threads of the trees", ""),
    ("sft_oasst", "unshared", _OASST, "steerjax, each thread written whole", ""),
    ("decoding_1", "transformers", f"{_DECODING} 1", "transformers' `generate`", "1.2"),
    ("decoding_8", "transformers", f"{_DECODING} 8 --vllm PYTHON", "transformers' `generate`", "1.5"),
    ("decoding_8", "vllm", f"{_DECODING} 8 --vllm PYTHON", "vLLM", ""),
    ("decoding_8_stop", "transformers", f"{_DECODING} 8 --prompts 24 --stop 1", "`generate`, answers may end", ""),
    ("decoding_32", "transformers", f"{_DECODING} 32", "transformers' `generate`", "1.5"),
    ("decoding_8_samples", "apart", f"{_DECODING} 8 --samples 8 --tokens 32", "8 answers to a prompt, each alone", "2"),
)  # fmt: skip


def table_text() -> str:
    """One line for each comparison that has a result."""
    lines = ["| command | beside | goal | steerjax is | GiB, ours and theirs |", "|---|---|---|---|---|"]
    for name, worker, command, beside, goal in ROWS:
        result = json.loads((RESULTS / f"{name}.json").read_text()) if (RESULTS / f"{name}.json").exists() else {}
        if worker not in result.get("ratios", {}):
            continue
        ratio = result["ratios"][worker]
        peaks = [max(turn["peak_gib"] for turn in result["found"][one]["turns"]) for one in ("steerjax", worker)]
        median, least, greatest = (f"{ratio[key]:.2f}" for key in ("median", "least", "greatest"))
        times = f"[{median} times](results/{name}.json) as fast, {least} to {greatest}"
        memory = f"{peaks[0]:.2f}, {peaks[1]:.2f}"
        lines.append(f"| `python benchmarks/{command}` | {beside} | {goal} | {times} | {memory} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    before, _, rest = README.read_text().partition(BEGIN)
    README.write_text(before + BEGIN + table_text() + END + rest.partition(END)[2])


if __name__ == "__main__":
    main()
