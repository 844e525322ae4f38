"""Collectives are read off a compiled text, with the turns of the loops around them."""

from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from steerjax.planning.hlo import work

pytestmark = pytest.mark.short

# Compiled for 8 CPU devices, mesh (data 2, fsdp 4): three layers in a scan, each gathers float32 [32, 32] over fsdp;
# then a permute of [8, 32] over data, a reduce-scatter to [2, 32] over fsdp, an all-reduce of a scalar over all.
TEXT = (Path(__file__).parent / "scan_on_8_devices.hlo.txt").read_text()


def test_kinds_times_and_bytes():
    found = {c.kind: c for c in work(TEXT, 8).collectives}
    assert len(work(TEXT, 8).collectives) == len(found) == 4
    gather = found["all-gather"]
    assert (gather.shape, gather.group, gather.times, gather.exact) == ((32, 32), 4, 3, True)
    assert gather.bytes == 32 * 32 * 4
    assert gather.received == 3 * gather.bytes * 3 / 4
    assert found["reduce-scatter"].received == 3 * 2 * 32 * 4
    assert found["collective-permute"].received == 8 * 32 * 4
    assert (found["all-reduce"].group, found["all-reduce"].received) == (8, 2 * 4 * 7 / 8)


def test_a_loop_of_unknown_length_counts_once_and_says_so():
    unknown = TEXT.replace('"known_trip_count":{"n":"3"}', "")
    assert unknown != TEXT
    gather = next(c for c in work(unknown, 8).collectives if c.kind == "all-gather")
    assert (gather.times, gather.exact) == (1, False)


TPU = """
%add (a: f32[], b: f32[]) -> f32[] {
  ROOT %sum = f32[] add(%a, %b)
}

%piece.1 (p: bf16[256,8]) -> bf16[4096,8] {
  %ag.1 = bf16[4096,8]{1,0:T(8,128)(2,1)S(1)} all-gather(%p), channel_id=5, replica_groups=mesh['x'=16] {'x'}
}

%piece.2 (p: bf16[256,8]) -> bf16[4096,8] {
  %ag.2 = bf16[4096,8]{1,0:T(8,128)(2,1)S(1)} all-gather(%p), channel_id=5, replica_groups=mesh['x'=16] {'x'}
}

%cond (c: (u32[], f32[8,8])) -> pred[] {
  %bound = u32[]{:T(128)} constant(9)
  %c = (u32[], f32[8,8]) parameter(0)
  %count = u32[]{:T(128)} get-tuple-element(%c), index=0
  ROOT %less = pred[]{:T(512)} compare(%count, %bound), direction=LT
}

%body (c: (u32[], f32[8,8])) -> (u32[], f32[8,8]) {
  %two = u32[]{:T(128)} constant(2)
  %c = (u32[], f32[8,8]) parameter(0)
  %count = u32[]{:T(128)} get-tuple-element(%c), index=0
  %x = f32[8,8]{1,0} get-tuple-element(%c), index=1
  %start = (f32[8,8]{1,0}, f32[8,8]{1,0}, u32[]{:S(2)}, u32[]{:S(2)}) collective-permute-start(%x), channel_id=7
  %done = f32[8,8]{1,0} collective-permute-done(%start)
  %next = u32[]{:T(128)} add(%count, %two)
  ROOT %out = (u32[]{:T(128)}, f32[8,8]{1,0}) tuple(%next, %done)
}

ENTRY %main (p: bf16[256,8]) -> f32[8,8] {
  %f1 = bf16[4096,8]{1,0} fusion(%p), kind=kCustom, calls=%piece.1
  %f2 = bf16[4096,8]{1,0} fusion(%p), kind=kCustom, calls=%piece.2
  %loop = (u32[], f32[8,8]{1,0}) while(%init), condition=%cond, body=%body
  %ags = ((f32[2,4]{1,0}, bf16[4]{0}), (f32[8,4]{1,0}, bf16[16]{0})) all-gather-start(%a), replica_groups=[4,4]<=[16]
  %rss = ((f32[32,4]{1,0}), f32[8,4]{1,0}) reduce-scatter-start(%a), replica_groups={{0,1,2,3}}, to_apply=%add
  %ar = f32[64]{0} all-reduce(%c), replica_groups={}, to_apply=%add
  %alone = f32[64]{0} all-reduce(%c), replica_groups=[16,1]<=[16], to_apply=%add
}
"""


def test_what_a_tpu_program_adds():
    """Pieces of one collective, loops in strides, asynchronous starts, groups of one, three ways to write groups."""
    found = work(TPU, 16).collectives
    assert [(c.kind, c.group, c.times, c.bytes) for c in found] == [
        ("all-gather", 4, 1, 8 * 4 * 4 + 16 * 2),
        ("reduce-scatter", 4, 1, 8 * 4 * 4),
        ("all-reduce", 16, 1, 64 * 4),
        ("all-gather", 16, 1, 4096 * 8 * 2),
        ("collective-permute", 16, 5, 8 * 8 * 4),
    ]


def test_matrix_products_and_what_is_computed_again():
    """Layers in a loop, remat, a gradient: XLA's own count takes the loop once."""
    layers, x = jnp.ones((5, 64, 64)), jnp.ones((16, 64))
    once = 2 * 16 * 64 * 64

    def loss(layers, x):
        layer = jax.checkpoint(lambda x, w: (jnp.sin(jnp.sin(x @ w) @ w), None), prevent_cse=False)
        return jax.lax.scan(layer, x, layers)[0].sum()

    compiled = jax.jit(jax.grad(loss)).lower(layers, x).compile()
    found = work(compiled.as_text(), 1)
    assert (found.flops, found.recomputed) == (5 * once * (2 + 2 + 4), 5 * once * 2)
    assert found.exact
    assert found.collectives == []
    assert compiled.cost_analysis()["flops"] < 0.3 * found.flops


def test_memory_traffic_is_as_xla_counts_it_where_there_is_no_loop():
    def step(w, x, i):
        return jnp.sin(x @ w[i]).sum(axis=0), w.at[i].add(1.0)

    w, x = jnp.ones((8, 64, 64)), jnp.ones((16, 64))
    compiled = jax.jit(step, donate_argnums=0).lower(w, x, 3).compile()
    assert work(compiled.as_text(), 1).bytes == pytest.approx(compiled.cost_analysis()["bytes accessed"], rel=0.1)


CONVOLUTIONS = """
ENTRY %main (a: bf16[8,16], b: bf16[16,4]) -> bf16[8,4] {
  %a = bf16[8,16]{1,0} parameter(0)
  %b = bf16[16,4]{1,0} parameter(1)
  %c = bf16[2,8,16]{2,1,0} parameter(2)
  %d = bf16[2,16,4]{2,1,0:T(8,128)S(1)} parameter(3)
  %plain = bf16[8,4]{1,0} convolution(%a, %b), dim_labels=bf_io->bf
  %windowed = bf16[1,8,4]{2,1,0} convolution(%c, %d), window={size=2}, dim_labels=0bf_0io->0bf
  ROOT %batched = bf16[2,8,4]{2,1,0} convolution(%c, %d), window={size=2 stride=1 pad=1_1 rhs_reversal=1}, dim_labels=0bf_0io->0bf
}
"""  # noqa: E501


def test_a_tpus_convolutions():
    """Padding is not computed with: of 3 x 2 pairs of places in the last, were it 3 long, 4 are; here 2 long, 3."""
    found = work(CONVOLUTIONS, 1)
    one = 2 * 8 * 16 * 4
    assert found.flops == one * (1 + 2 + 3)
    read, small, large = 8 * 16 * 2 + 16 * 4 * 2, 8 * 4 * 2, 2 * 8 * 16 * 2
    assert found.bytes == read + small + (large + small) + (large + 2 * small), "what lies in S(1) is not moved"
