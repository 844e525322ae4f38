"""Evaluation suites, a module each (`suite.py` says what one is), and outputs side by side (`compare.py`)."""

SUITES = {  # module of `evaluation` -> what its report is called
    "attributes": "Predicted ratings against people's",
    "mt_bench": "MT-Bench: two-turn questions, graded by a judge",
    "steerability": "What requested ratings do",
    "reward_bench": "RewardBench",
    "reward_bench_2": "RewardBench 2",
    "rm_bench": "RM-Bench",
    "judge_bench": "JudgeBench",
    "truthfulqa": "TruthfulQA, multiple choice",
}
