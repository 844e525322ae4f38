"""Programs on one machine in turn, A B A B ...: what else the machine does is done to all of them.

Each has a process of its own, and perhaps an environment. A worker gets ready, then does one turn for every line that
it reads, while the others sleep, and answers with a line of JSON that holds `seconds`. The first turn of each warms up.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).with_name("results")
# vLLM in one process, that calls nobody and leaves standard output alone.
_VLLM = {
    "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "2", "VLLM_LOGGING_STREAM": "ext://sys.stderr",
}  # fmt: skip
# On a GPU several programs share the memory, and what one used is measured.
_SHARED = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
_PACKAGES = ("jax", "flax", "torch", "transformers", "trl", "vllm")


def serve(turn: Callable[[], Mapping]) -> None:
    """The worker's side: what `turn` found, timed, for every line of standard input."""
    out, sys.stdout = sys.stdout, sys.stderr
    versions = {name: _version(name) for name in _PACKAGES if _version(name)}
    print(json.dumps({"versions": versions}), file=out, flush=True)
    for _ in sys.stdin:
        begun = time.perf_counter()
        found = turn()
        seconds = time.perf_counter() - begun
        peak = _gpu_peak_gib() or peak_gib()
        print(json.dumps({"seconds": seconds, "peak_gib": peak, **found}), file=out, flush=True)


def add_options(parser: argparse.ArgumentParser, turns: int) -> None:
    """Those of every comparison."""
    add = parser.add_argument
    add("--model", type=Path, help="a folder with SmolLM2-135M")
    add("--peer", default=sys.executable, metavar="PYTHON", help="that has torch and transformers")
    add("--turns", type=int, default=turns, help="after one that warms up")
    add("--worker", nargs=2, metavar=("NAME", "FOLDER"), help=argparse.SUPPRESS)


def workers(script: str, peers: Sequence[str], o: argparse.Namespace, keys: Sequence[str], folder: str) -> dict:
    """The commands of `steerjax` and its peers, each with these options and a folder that they share."""
    given = [f"--{key.replace('_', '-')}={vars(o)[key]}" for key in keys]
    pythons = {"steerjax": sys.executable} | dict.fromkeys(peers, o.peer)
    return {name: [python, script, *given, "--worker", name, folder] for name, python in pythons.items()}


def peak_gib() -> float:
    """What this process ever held in memory at once."""
    return _status_gib("VmHWM")


def _gpu_peak_gib() -> float:
    """The same of a GPU's memory, by whichever library works there; 0 without one."""
    jax, torch = (sys.modules.get(name) for name in ("jax", "torch"))
    if jax and jax.default_backend() == "gpu":
        return jax.local_devices()[0].memory_stats()["peak_bytes_in_use"] / 2**30
    return torch.cuda.max_memory_allocated() / 2**30 if torch and torch.cuda.is_available() else 0.0


def held_gib() -> float:
    """What this process holds in memory."""
    return _status_gib("VmRSS")


def _status_gib(key: str) -> float:
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status[key].split()[0]) / 2**20


def in_turn(workers: Mapping[str, Sequence[str]], turns: int, environment: Mapping[str, str]) -> dict[str, dict]:
    """Of each command what it says of itself and its turns, the first left out."""
    path = os.pathsep.join([str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | _VLLM | _SHARED | {"PYTHONPATH": path, **environment}
    running, found = {}, {}
    try:
        for name, command in workers.items():  # one gets ready after the other: a later one may read what it wrote
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "env": environment}
            running[name] = subprocess.Popen(command, **pipes)
            found[name] = json.loads(_line(name, running[name])) | {"turns": []}
        for turn in range(turns + 1):
            for name, process in running.items():
                process.stdin.write("\n")
                process.stdin.flush()
                found[name]["turns"].append(json.loads(_line(name, process)))
                print(f"turn {turn}/{turns}, {name}: {found[name]['turns'][-1]['seconds']:.2f} s", file=sys.stderr)
        for one in found.values():
            one["warm_up"] = one["turns"].pop(0)
        return found
    finally:
        for process in running.values():
            process.kill()


def _line(name: str, process: subprocess.Popen) -> str:
    line = process.stdout.readline()
    if not line:
        sys.exit(f"the worker {name} ended")
    return line


def rates(turns: Sequence[Mapping], count: float | str) -> list[float]:
    """What each turn does in a second: `count`, or what it says itself under that name."""
    return [(turn[count] if isinstance(count, str) else count) / turn["seconds"] for turn in turns]


def ratios(found: Mapping[str, dict], ours: str, count: float | str = 1.0) -> dict[str, dict[str, float]]:
    """How many times faster than each other one `ours` is: of the pairs of turns the median, least and greatest."""
    mine = rates(found[ours]["turns"], count)
    said = {}
    for name in found.keys() - {ours}:
        each = [own / rate for rate, own in zip(rates(found[name]["turns"], count), mine, strict=True)]
        said[name] = {"median": statistics.median(each), "least": min(each), "greatest": max(each)}
    return said


def report(
    benchmark: str, found: Mapping[str, dict], ours: str, unit: str, count: float | str, settings: Mapping
) -> None:
    """Prints the table, and writes results/BENCHMARK.json, on a GPU BENCHMARK_gpu.json. `count` of `unit` are done in a
    turn, see `rates`."""
    over = ratios(found, ours, count)
    print(f"{'':28}{unit + '/s':>14}{'seconds a turn':>22}{'peak GiB':>10}   {ours} is")
    for name, one in found.items():
        seconds = [turn["seconds"] for turn in one["turns"]]
        middle = statistics.median(seconds)
        times = f"{middle:.2f} [{min(seconds):.2f}, {max(seconds):.2f}]"
        said = (
            f"{(r := over[name])['median']:.2f} [{r['least']:.2f}, {r['greatest']:.2f}] times" if name in over else ""
        )
        peak = max(turn["peak_gib"] for turn in one["turns"])
        rate = statistics.median(rates(one["turns"], count))
        print(f"{name:28}{rate:14.2f}{times:>22}{peak:10.2f}   {said}")
    RESULTS.mkdir(exist_ok=True)
    benchmark += "_gpu" if _gpu() else ""
    value = {
        "benchmark": benchmark, "machine": machine(), "settings": settings, "unit": unit, "a turn": count,
        "ratios": over, "found": found,
    }  # fmt: skip
    (RESULTS / f"{benchmark}.json").write_text(json.dumps(value, indent=1, sort_keys=True) + "\n")


def machine() -> dict:
    """Facts of the machine, without its name."""
    info = Path("/proc/cpuinfo")
    models = [line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
    cpu = models[0] if models else platform.machine()
    found = {"cpu": cpu, "cores": os.cpu_count(), "load": os.getloadavg()[0], "python": platform.python_version()}
    return found | ({"gpu": gpu} if (gpu := _gpu()) else {})


def _gpu() -> str:
    """The name of the GPU; "" where there is none."""
    if not shutil.which("nvidia-smi"):
        return ""
    ask = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    return subprocess.run(ask, capture_output=True, text=True, check=False).stdout.strip()


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
