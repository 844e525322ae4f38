"""FLOPs of the matrix products that a function computes, loops as often as they turn.

XLA's own count (`compiled.cost_analysis()`) takes a loop's body once, and blockwise attention turns as often as a mask
says. Here the function's jaxpr runs with a counter in the carry of every loop; XLA drops what no loop's bounds need.
The jaxpr of a step holds what remat computes again.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

_CALLS = ("jit", "checkpoint", "remat2", "closed_call", "custom_jvp_call", "custom_vjp_call")


def counted(function: Callable, *arguments) -> float:
    """The FLOPs of `function(*arguments)`, in matrix products: 2 a multiplication and addition. No mesh is set."""
    jaxpr = jax.make_jaxpr(function)(*arguments)

    @jax.jit
    def count(leaves):
        return _run(jaxpr.jaxpr, jaxpr.consts, leaves)[0]

    return float(count(jax.tree.leaves(arguments)))


def _run(jaxpr: Jaxpr, consts, inputs):
    """(FLOPs, outputs) of a jaxpr."""
    values = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *inputs], strict=True))
    total = jnp.float32(0)
    for eqn in jaxpr.eqns:
        read = [v.val if isinstance(v, Literal) else values[v] for v in eqn.invars]
        flops, outputs = _equation(eqn, read)
        total += flops
        values.update(zip(eqn.outvars, outputs, strict=True))
    return total, [v.val if isinstance(v, Literal) else values[v] for v in jaxpr.outvars]


def _equation(eqn, read):
    name, p = eqn.primitive.name, eqn.params
    if name == "dot_general":
        (left, _), _ = p["dimension_numbers"]
        flops = 2.0 * eqn.outvars[0].aval.size * math.prod(read[0].shape[axis] for axis in left)
        return flops, [eqn.primitive.bind(*read, **p)]
    if name == "while":
        return _while(p, read)
    if name == "scan":
        return _scan(p, read)
    if name == "cond":
        branches = [lambda *xs, b=b: _run(b.jaxpr, b.consts, xs) for b in p["branches"]]
        return jax.lax.switch(read[0], branches, *read[1:])
    if name not in _CALLS:
        outputs = eqn.primitive.bind(*read, **p)
        return 0.0, outputs if eqn.primitive.multiple_results else [outputs]
    inner = next(value for value in p.values() if isinstance(value, ClosedJaxpr | Jaxpr))
    return _run(inner.jaxpr, inner.consts, read) if isinstance(inner, ClosedJaxpr) else _run(inner, (), read)


def _while(p, read):
    condition, body, n, m = p["cond_jaxpr"], p["body_jaxpr"], p["cond_nconsts"], p["body_nconsts"]
    of_condition, of_body, start = read[:n], read[n : n + m], read[n + m :]

    def turn(carry):
        flops, outputs = _run(body.jaxpr, body.consts, [*of_body, *carry[1]])
        return carry[0] + flops, outputs

    def goes_on(carry):
        return _run(condition.jaxpr, condition.consts, [*of_condition, *carry[1]])[1][0]

    return jax.lax.while_loop(goes_on, turn, (jnp.float32(0), start))


def _scan(p, read):
    inner, n, m = p["jaxpr"], p["num_consts"], p["num_carry"]
    consts, start, xs = read[:n], read[n : n + m], read[n + m :]

    def turn(carry, x):
        flops, outputs = _run(inner.jaxpr, inner.consts, [*consts, *carry[1], *x])
        return (carry[0] + flops, outputs[:m]), outputs[m:]

    (flops, last), ys = jax.lax.scan(turn, (jnp.float32(0), start), xs, p["length"], p["reverse"])
    return flops, [*last, *ys]
