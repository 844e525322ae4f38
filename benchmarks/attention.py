"""What a token costs in a long packed row, beside a short one, on this machine.

    python benchmarks/attention.py

The same number of tokens as rows of 512 (a prompt of 256 and one response) and as a row of 4096 (the prompt and 16
responses of 240): seconds of a forward and backward pass of a few layers of SmolLM2's widths, and of the attention
alone. Prints the medians and the ratio long : short, which would be near 1 for a model without attention and 8 for
attention that computes all that is not in the future.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
from flax.core import meta

from steerjax.models.attention import make_plan, self_attention
from steerjax.models.config import LlamaConfig
from steerjax.models.llama import Compute, Llama

WIDTHS = {"hidden_size": 576, "intermediate_size": 1536, "num_heads": 9, "num_kv_heads": 3, "vocab_size": 1024}
PROMPT, TOKENS = 256, 4096
ROWS = {"512": (8, [256]), "4096": (1, [240] * 16)}  # rows, lengths of the branches


def until_and_positions(rows: int, branches: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Of rows of one prompt each, with branches of these lengths: int32 [rows, T]."""
    ends = PROMPT + np.cumsum(branches)
    until = np.concatenate([np.full(PROMPT, ends[-1]), np.repeat(ends, branches)])
    positions = np.concatenate([np.arange(PROMPT), *(PROMPT + np.arange(length) for length in branches)])
    return np.tile(until.astype(np.int32), (rows, 1)), np.tile(positions.astype(np.int32), (rows, 1))


def model_pass(attention: str, layers: int, until: np.ndarray, positions: np.ndarray):
    """A forward and backward pass without arguments."""
    model = Llama(LlamaConfig(num_layers=layers, **WIDTHS), Compute(attention=attention))
    tokens = np.random.default_rng(0).integers(0, WIDTHS["vocab_size"], positions.shape)
    params = meta.unbox(jax.jit(functools.partial(model.init, method="initialize"))(jax.random.key(0)))
    step = jax.jit(jax.grad(lambda params: model.apply(params, tokens, positions, until, method="hidden").sum()))
    return lambda: step(params)


def attention_pass(attention: str, until: np.ndarray):
    """The attention of one layer, forward and backward, without arguments."""
    N, K = WIDTHS["num_heads"], WIDTHS["num_kv_heads"]
    random = np.random.default_rng(0)
    q, k, v = (jnp.asarray(random.normal(size=(*until.shape, heads, 64)), jnp.float32) for heads in (N, K, K))

    @jax.jit
    def step(q, k, v):
        plan = make_plan(attention, jnp.asarray(until), 256, q.dtype)
        return jax.grad(lambda *qkv: self_attention(*qkv, plan).sum(), argnums=(0, 1, 2))(q, k, v)

    return lambda: step(q, k, v)


def medians(passes: dict[str, object], repeats: int) -> dict[str, float]:
    """Seconds; taken in turns, so that a busy machine is busy for all."""
    seconds = {name: [] for name in passes}
    for turn in range(repeats + 1):
        for name, run in passes.items():
            start = time.perf_counter()
            jax.block_until_ready(run())
            if turn:  # the first compiles
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(times) for name, times in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--attention", default="blockwise", help="a back end of steerjax/models/attention/backends.py")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    rows = {name: until_and_positions(*shape) for name, shape in ROWS.items()}
    kinds = {
        f"{arguments.layers} layers": lambda x: model_pass(arguments.attention, arguments.layers, *x),
        "attention": lambda x: attention_pass(arguments.attention, x[0]),
    }
    for kind, make in kinds.items():
        seconds = medians({name: make(x) for name, x in rows.items()}, arguments.repeats)
        each = ", ".join(f"rows of {name}: {1e6 * s / TOKENS:.1f} us a token" for name, s in seconds.items())
        print(f"{arguments.attention}, {kind}: {each}; ratio {seconds['4096'] / seconds['512']:.2f}", flush=True)


if __name__ == "__main__":
    main()
