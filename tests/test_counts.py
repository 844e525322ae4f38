"""Tokens, FLOPs, memory and compilations are no worse than benchmarks/counts.json says (benchmarks/counts.py)."""

import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest


@pytest.mark.slow
def test_no_count_is_worse_than_stored(repository):
    """In a process of its own: what a process has compiled is not compiled again."""
    done = subprocess.run([sys.executable, "benchmarks/counts.py"], cwd=repository, capture_output=True, text=True)
    cure = "\ncure: what made it worse; or, with the reason in the commit, `python benchmarks/counts.py --write`"
    assert done.returncode == 0, done.stderr + cure
    assert json.loads(done.stdout).keys() == {"tokens", "flops", "memory", "compilations"}


@pytest.fixture
def benchmark(repository, monkeypatch):
    """Modules of benchmarks/ by name."""
    monkeypatch.syspath_prepend(repository / "benchmarks")
    return __import__


def test_loops_count_as_often_as_they_turn(benchmark):
    counted, x = benchmark("flop_count").counted, jnp.ones((4, 4))
    once = 2 * 4**3

    def step(x, turns):
        x = jax.lax.fori_loop(0, turns, lambda i, x: x @ x, x)  # the bound is data
        x, _ = jax.lax.scan(lambda x, _: (jax.checkpoint(jnp.dot)(x, x), None), x, None, 3)
        return jax.lax.cond(turns > 2, lambda x: x @ x @ x, lambda x: x, x)

    assert counted(step, x, 5) == once * (5 + 3 + 2)
    assert counted(step, x, 1) == once * (1 + 3)
    gradient = jax.grad(lambda x: jnp.sum(jax.checkpoint(lambda x: jnp.sin(x @ x) @ x)(x)))
    assert counted(gradient, x) == once * (2 + 1 + 4)  # forward, sin's argument again, backward


def test_what_is_worse_is_named(benchmark):
    old = {"tokens": {"packed": 10.0}, "flops": {"step": 1.5}, "memory": {"a": 100}, "compilations": {"train": 4}}
    worse = benchmark("counts").worse
    assert worse(old, old) == []
    better = {"tokens": {"packed": 9.0}, "flops": {"step": 1.51}, "memory": {"a": 102}, "compilations": {"train": 3}}
    assert worse(better, old) == [], "within the margins"
    for group, name in (("tokens", "packed"), ("flops", "step"), ("memory", "a"), ("compilations", "train")):
        (said,) = worse(old | {group: {name: old[group][name] * 1.5}}, old)
        assert said.startswith(f"{group}, {name}: ")
    assert worse(old | {"memory": {}}, old) == ["memory, a: None, was 100"]
