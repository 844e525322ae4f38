"""The attentions of a GPU, side by side: are they equal, what does each cost, and which blocks suit ours.

    python benchmarks/attention_gpu.py

Three tables. Errors: of outputs and gradients in bfloat16 beside `causal_attention` in float32, as a share of the
largest value. Times: a forward pass, and one with its backward pass, of one layer of SmolLM2-135M, Llama-3.2-1B and
Llama-3-8B on 16384 tokens, as rows of one prompt and responses of 240 tokens and as one text; `cudnn, no mask` is
cuDNN without the bias that carries the mask, right for the one text alone. Tiles: each of our kernels, with several
blocks. TFLOP/s count allowed pairs. What the device cannot do is a line in the table, not an end.
"""

from __future__ import annotations

import argparse
import functools
import time
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np

from steerjax.models.attention import triton
from steerjax.models.attention.kernels import cudnn_attention, cudnn_bias
from steerjax.models.attention.mask import allowed, causal_attention
from steerjax.models.attention.triton import Tile, Tiles, choose_tiles, triton_attention, triton_plan

MODELS = {"135M": (9, 3, 64), "1B": (32, 8, 64), "8B": (32, 8, 128)}  # query heads, key-value heads, head size
LENGTHS, TOKENS, RESPONSE = (2048, 4096, 8192), 16384, 240
FORWARD = (Tile(128, 64, 8, 3), Tile(128, 64, 4, 3), Tile(64, 64, 4, 3), Tile(128, 128, 8, 2), Tile(128, 32, 4, 4))
BACKWARD = (Tile(128, 64, 8, 2), Tile(64, 64, 4, 2), Tile(64, 64, 4, 3), Tile(128, 32, 8, 3), Tile(64, 128, 8, 2))


def tree(B: int, T: int) -> np.ndarray:
    """`until` of rows of a prompt of T / 8 tokens and responses to it."""
    ends = np.append(np.arange(T // 8 + RESPONSE, T, RESPONSE), T)
    until = np.concatenate([np.full(T // 8, T), np.repeat(ends, np.diff(ends, prepend=T // 8))])
    return np.tile(until.astype(np.int32), (B, 1))


def arrays(B: int, T: int, model: str, dtype=jnp.bfloat16):
    N, K, H = MODELS[model]
    keys = jax.random.split(jax.random.key(0), 4)
    return [jax.random.normal(key, (B, T, heads, H), dtype) for key, heads in zip(keys, (N, K, K, N), strict=True)]


def in_triton(q, k, v, until, plan):
    return triton_attention(q, k, v, until, None, plan, choose_tiles(q.dtype))


def in_cudnn(q, k, v, until, bias):
    return cudnn_attention(q, k, v, bias)


def without_mask(q, k, v, until, plan):
    return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="cudnn")


# An attention, and what it makes of `until` once for all layers.
ATTENTIONS = {
    "triton": (in_triton, lambda until: triton_plan(until, choose_tiles(jnp.bfloat16))),
    "cudnn": (in_cudnn, lambda until: cudnn_bias(allowed(until))),
    "cudnn, no mask": (without_mask, lambda until: None),
}


def both(attention):
    """Output, and gradients of q, k and v."""

    def run(q, k, v, weights, until, plan):
        out, back = jax.vjp(lambda q, k, v: attention(q, k, v, until, plan), q, k, v)
        return out, *back(weights)

    return run


def forward(attention):
    return lambda q, k, v, weights, until, plan: attention(q, k, v, until, plan)


def said(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:150]}"


def print_errors(model: str, T: int = 1024) -> None:
    q, k, v, weights = arrays(2, T, model)
    until = jnp.asarray(np.concatenate([tree(1, T), np.full((1, T), T, np.int32)]))
    wide = [x.astype(jnp.float32) for x in (q, k, v, weights)]
    with jax.default_matmul_precision("highest"):
        exact = jax.jit(both(lambda q, k, v, until, plan: causal_attention(q, k, v, until)))(*wide, until, None)
    for name, (attention, plan) in list(ATTENTIONS.items())[:2]:
        for dtype in (jnp.bfloat16, jnp.float32) if name == "triton" else (jnp.bfloat16,):
            plans = triton_plan(until, choose_tiles(dtype)) if name == "triton" else plan(until)
            try:
                found = jax.jit(both(attention))(*(x.astype(dtype) for x in wide), until, plans)
                errors = [float(jnp.abs(a - b).max() / jnp.abs(b).max()) for a, b in zip(found, exact, strict=True)]
                text = ", ".join(f"{n} {e:.1e}" for n, e in zip(("out", "dq", "dk", "dv"), errors, strict=True))
            except Exception as error:
                text = said(error)
            print(f"{model:5} {name:8} {jnp.dtype(dtype).name:9} {text}", flush=True)


def compile_all(jobs: dict, threads: int = 14) -> dict:
    """name -> (function, arguments) as name -> (compiled or exception, arguments): lowered here, compiled at once."""

    def compiled(lowered):
        try:
            return lowered if isinstance(lowered, Exception) else lowered.compile()
        except Exception as error:
            return error

    lowered = {}
    for name, (function, arguments) in jobs.items():
        try:
            lowered[name] = jax.jit(function).lower(*arguments)
        except Exception as error:
            lowered[name] = error
    with ThreadPoolExecutor(threads) as pool:
        return dict(zip(lowered, pool.map(compiled, lowered.values()), strict=True))


def milliseconds(run, *arguments, least: float = 0.04) -> float:
    """The mean of enough runs, the best of three times."""
    jax.block_until_ready(run(*arguments))
    times, repeats = [], 3
    while len(times) < 3:
        start = time.perf_counter()
        for _ in range(repeats):
            out = run(*arguments)
        jax.block_until_ready(out)
        seconds = time.perf_counter() - start
        if seconds < least:
            repeats = int(repeats * min(10, 1.2 * least / seconds)) + 1
        else:
            times.append(seconds / repeats)
    return 1e3 * min(times)


def timed(run, *arguments) -> float | str:
    try:
        return said(run) if isinstance(run, Exception) else milliseconds(run, *arguments)
    except Exception as error:
        return said(error)


def teraflops(model: str, until: np.ndarray, products: int, ms: float) -> float:
    N, _, H = MODELS[model]
    pairs = int((until - np.arange(until.shape[1])).sum())
    return 2 * products * pairs * N * H / ms / 1e9


def print_times(model: str, T: int) -> None:
    B = TOKENS // T
    heads = arrays(B, T, model)
    untils = {"tree": tree(B, T), "one text": np.full((B, T), T, np.int32)}
    jobs = {}
    for name, (attention, plan) in ATTENTIONS.items():
        arguments = *heads, jnp.asarray(untils["tree"]), jax.jit(plan)(untils["tree"])
        jobs[name, 2] = forward(attention), arguments  # products of matrices
        jobs[name, 7] = both(attention), arguments
    runs = compile_all(jobs)
    for kind, until in untils.items():
        for name, (_, plan) in ATTENTIONS.items():
            arguments = *heads, jnp.asarray(until), jax.jit(plan)(until)
            cells = [(products, timed(runs[name, products], *arguments)) for products in (2, 7)]
            text = "  ".join(
                x if isinstance(x, str) else f"{x:8.3f} ms {teraflops(model, until, products, x):5.0f} TFLOP/s"
                for products, x in cells
            )
            print(f"{model:5} {T:5} {kind:9} {name:15} {text}", flush=True)


def print_tiles(model: str, T: int) -> None:
    heads, until = arrays(TOKENS // T, T, model), tree(TOKENS // T, T)
    q, k, v, weights = heads
    rows, base = (jnp.asarray(until), None), choose_tiles(q.dtype)
    out, saved = jax.jit(functools.partial(triton.forward, tiles=base, interpret=False))(
        q, k, v, rows, triton_plan(rows[0], base)
    )
    lse, overlap = saved[-1], triton.overlaps(out, weights)
    jobs = {}
    for which, tiles, products in (("forward", FORWARD, 2), ("queries", BACKWARD, 3), ("keys", BACKWARD, 4)):
        for tile in tiles:
            plan = getattr(triton_plan(rows[0], Tiles(*(tile,) * 3)), which)
            arguments = (q, k, v, rows, plan) if which == "forward" else (q, k, v, rows, plan, weights, lse, overlap)
            function = functools.partial(getattr(triton, f"{which}_pass"), tile=tile, interpret=False)
            jobs[which, tile, products] = function, arguments
    runs = compile_all(jobs)
    for (which, tile, products), (_, arguments) in jobs.items():
        x = timed(runs[which, tile, products], *arguments)
        text = x if isinstance(x, str) else f"{x:8.3f} ms {teraflops(model, until, products, x):5.0f} TFLOP/s"
        print(f"{model:5} {T:5} {which:8} {tuple(tile)!s:17} {text}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=150, help="no new table line after so many")
    arguments = parser.parse_args()
    start = time.perf_counter()
    parts = [(print_errors, model) for model in ("8B", "135M")]
    parts += [(print_times, model, T) for T, model in ((4096, "8B"), (4096, "135M"), (4096, "1B"))]
    parts += [(print_tiles, model, 4096) for model in ("8B", "1B")]
    parts += [(print_times, model, T) for T in (8192, 2048) for model in ("8B", "1B", "135M")]
    print(jax.devices()[0].device_kind, "jax", jax.__version__, flush=True)
    for part, *what in parts:
        if time.perf_counter() - start > arguments.seconds:
            print("left out:", part.__name__, *what)
            continue
        part(*what)
        print(f"# {part.__name__} {what}: at {time.perf_counter() - start:.0f} s", flush=True)


if __name__ == "__main__":
    main()
