"""What a train step makes of a machine: tokens a second, model FLOPs over its peak (MFU), memory.

    python benchmarks/mfu.py [--shapes 135M,1B,8B] [--attention auto,chunked] [--steps 10]

The step is that of `train`: a reward model with random weights, on packed rows of HelpSteer (the packaged ones), in the
dtype of the machine (bfloat16 but on a CPU). `8B` has 8 of Llama 3 8B's 32 layers, as many as one device of 80 GB
trains with AdamW; `8B adapters` is all of it, with rank 32 on every projection and the base in bfloat16. The others
have their layers unrolled: out of a loop, nothing is copied into stacks and out of them. Each case has a process of its
own. MFU is over the vendor's peak (steerjax/models/flops.py), and beside it stands what a product of two matrices of
8192 x 8192 reaches. Recomputation counts as no work. Writes results/mfu.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time

from turns import RESULTS, machine

LENGTH = 4096
_8B = {"hidden_size": 4096, "intermediate_size": 14336, "num_heads": 32, "num_kv_heads": 8, "vocab_size": 128256,
       "tie_word_embeddings": False}  # fmt: skip
# Of a case: changes of the groups of the config. Rows are of LENGTH tokens.
SHAPES = {
    "135M": {
        "model": {"hidden_size": 576, "intermediate_size": 1536, "num_layers": 30, "num_heads": 9, "num_kv_heads": 3,
                  "vocab_size": 49152},
        "batch": {"rows": 16, "micro_batches": 2},
        "compute": {"unroll": 30},
    },
    "1B": {
        "model": {"hidden_size": 2048, "intermediate_size": 8192, "num_layers": 16, "num_heads": 32, "num_kv_heads": 8,
                  "vocab_size": 128256},
        "batch": {"rows": 16, "micro_batches": 4},
        "compute": {"unroll": 16},
    },
    "8B": {
        "model": _8B | {"num_layers": 8},
        "batch": {"rows": 16, "micro_batches": 8},
        "compute": {"unroll": 8},
    },
    "8B adapters": {
        "model": _8B | {"num_layers": 32, "lora": {"rank": 32, "alpha": 64.0, "base_dtype": "bfloat16"}},
        "batch": {"rows": 16, "micro_batches": 8},
        "compute": {"remat": "full"},
    },
}  # fmt: skip


def measured(shape: str, attention: str, steps: int) -> dict:
    """One case, in this process."""
    import jax
    from prepared import Steps, make_task

    from steerjax.models.flops import peak_flops

    case = {group: dict(changes) for group, changes in SHAPES[shape].items()}
    case["batch"] = {"row_length": LENGTH} | case["batch"]
    case["compute"] = {"attention": attention} | case.get("compute", {})
    task = make_task(optimizer={"warmup_steps": 0}, **case)
    plan = task.input().plan
    step, device = Steps(task, plan.trees), jax.devices()[0]
    rows = plan.step_rows(0)  # the packaged rows fill one or two steps
    begun = time.perf_counter()
    step(rows)
    first = time.perf_counter() - begun
    step(rows)
    facts, batch, seconds = step.facts(rows), step.feed(rows), []
    for _ in range(steps):
        begun = time.perf_counter()
        loss = float(step.dispatch(batch)["loss"])
        seconds.append(time.perf_counter() - begun)
    middle, peak = statistics.median(seconds), peak_flops(device.device_kind)
    stats = device.memory_stats() or {}
    return {
        "shape": shape, "attention": step.program.attention.name, "dtype": step.program.module.compute.dtype.name,
        "device": device.device_kind, "devices": step.mesh.size, "first_step": first, "seconds": seconds,
        "tokens_a_second": facts["tokens"] / middle, "unshared_tokens_a_second": facts["unshared_tokens"] / middle,
        "examples_a_second": facts["examples"] / middle, "tflops": facts["flops"] / middle / step.mesh.size / 1e12,
        "mfu": facts["flops"] / middle / step.mesh.size / peak if peak else None, "loss": loss,
        "peak_gib": stats.get("peak_bytes_in_use", 0) / 2**30, "jax": jax.__version__,
    }  # fmt: skip


def product_tflops() -> float:
    """Of two square matrices of 8192 in bfloat16, of 1024 in float32 on a CPU."""
    import jax
    import jax.numpy as jnp

    cpu = jax.default_backend() == "cpu"
    size, dtype = (1024, jnp.float32) if cpu else (8192, jnp.bfloat16)
    x, y = (jax.random.normal(jax.random.key(seed), (size, size), dtype) for seed in range(2))
    times = 10
    product = jax.jit(lambda x, y: jax.lax.fori_loop(0, times, lambda _, x: x @ y / size**0.5, x))
    seconds = []
    for _ in range(6):
        begun = time.perf_counter()
        jax.block_until_ready(product(x, y))
        seconds.append(time.perf_counter() - begun)
    return times * 2 * size**3 / statistics.median(seconds[1:]) / 1e12


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--shapes", default=",".join(SHAPES), help="with commas")
    add("--attention", default="auto", help="back ends, with commas")
    add("--steps", type=int, default=10)
    add("--worker", nargs=2, help=argparse.SUPPRESS)
    o = parser.parse_args()
    if o.worker:
        found = product_tflops() if o.worker[0] == "product" else measured(*o.worker, o.steps)
        print(json.dumps(found))
        return

    def of(*worker: str):
        done = subprocess.run([sys.executable, __file__, f"--steps={o.steps}", "--worker", *worker],
                              stdout=subprocess.PIPE, text=True, check=False)  # fmt: skip
        return json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else None

    product, found = of("product", ""), []
    print(f"a product of two matrices: {product:.0f} TFLOP/s")
    for shape in o.shapes.split(","):
        for attention in o.attention.split(","):
            if case := of(shape, attention):
                found.append(case)
            show(case, shape, attention, product)
            value = {"benchmark": "mfu", "machine": machine(), "row_length": LENGTH, "product_tflops": product}
            (RESULTS / "mfu.json").write_text(json.dumps(value | {"found": found}, indent=1) + "\n")


def show(case: dict | None, shape: str, attention: str, product: float) -> None:
    """Prints a line."""
    if case is None:
        print(f"{shape:12} {attention:10} failed", flush=True)
        return
    mfu = f"{case['mfu']:.1%}" if case["mfu"] else "-"
    print(f"{shape:12} {case['attention']:10} {statistics.median(case['seconds']) * 1e3:9.1f} ms a step "
          f"{case['tokens_a_second']:10,.0f} tokens/s (as if unshared {case['unshared_tokens_a_second']:10,.0f}) "
          f"{case['tflops']:7.1f} TFLOP/s, MFU {mfu}, of a product {case['tflops'] / product:.1%}, "
          f"{case['peak_gib']:.1f} GiB, first step {case['first_step']:.1f} s", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
