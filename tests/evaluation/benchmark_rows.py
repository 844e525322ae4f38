"""Rows as the suites of reward-model benchmarks keep them, with made-up scores among which many are equal."""

import zlib

from steerjax.evaluation import judge_bench, reward_bench, reward_bench_2, rm_bench

SUITES = {suite.__name__.rpartition(".")[2]: suite for suite in (reward_bench, reward_bench_2, rm_bench, judge_bench)}


def scored(kept: dict, completions: int) -> dict:
    """`coarse` has few values, `fine` hardly two alike; of every second prompt of Ties the right answers score more."""
    scores = [zlib.crc32(f"{sorted(kept.items())} {place}".encode()) % 10007 for place in range(completions)]
    if kept.get("subset") == "Ties" and int(kept["id"].split(":")[1]) % 2:
        scores[: kept["num_correct"]] = [10007 + score // 5 for score in scores[: kept["num_correct"]]]
    made = {"coarse": [score // 2001 / 2 - 1 for score in scores], "fine": [score / 10007 for score in scores]}
    return kept | {"scores": made, "characters": [score % 50 for score in scores]}


def made_rows(suite: str) -> list[dict]:
    """Of a whole benchmark in small: every section has rows."""
    return [scored(kept, completions) for kept, completions in _KEPT[suite]()]


def _reward_bench():
    for place, subset in enumerate(subset for section in reward_bench.SECTIONS.values() for subset in section):
        for number in range(5 + place % 4):
            yield {"id": f"{number}", "subset": subset}, 2


def _reward_bench_2():
    for place, subset in enumerate(reward_bench_2.SUBSETS[:-1]):
        for number in range(11 + place):
            yield {"id": f"{number}", "subset": subset, "num_correct": 1}, 4
    for number in range(14):
        yield {"id": f"ref:{number}", "subset": "Ties", "num_correct": 1}, 3
        yield {"id": f"tied:{number}", "subset": "Ties", "num_correct": 2 + number % 2}, 4 + number % 2


def _rm_bench():
    for place, domain in enumerate(("chat", "math", "code", "safety-refuse", "safety-response")):
        for number in range(6 + place):
            yield {"id": f"{number}", "domain": domain}, 6


def _judge_bench():
    for place, source in enumerate(("mmlu-pro-math", "livebench-reasoning", "livebench-math", "livecodebench", "x")):
        for number in range(9 + place):
            yield {"id": f"{source} {number}", "source": source, "label": judge_bench.LABELS[number % 2]}, 2


_KEPT = {
    "reward_bench": _reward_bench,
    "reward_bench_2": _reward_bench_2,
    "rm_bench": _rm_bench,
    "judge_bench": _judge_bench,
}
