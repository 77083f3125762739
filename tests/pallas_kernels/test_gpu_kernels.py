"""What is special to the GPU kernels: rows beyond their registers, and one call without operations between kernels."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels as pk
from pallas_kernels.gpu import attention
from pallas_kernels.gpu.tiles import Tiles, try_tiles
from tests.marked import long, slow
from tests.pallas_kernels.definitions import interpreted, normal

SMALL = Tiles(score_tokens=128, held=512, candidates=1024, written=256, choosers=8)


def choose(scores, lengths, n, implementation, **options):
    how = dict(implementation=implementation, interpret=interpreted(implementation))
    with try_tiles(SMALL):
        return pk.select_top_k(scores, lengths, n, **how, **options)


SCORES = {
    "normal": normal(0, 2, 2, 3000),
    "rounded": jnp.round(normal(1, 2, 2, 3000)),  # more ties than candidates
    "zero": jnp.zeros((2, 2, 3000)),
    "sorted": jnp.sort(normal(2, 2, 2, 3000)),
    "infinite": normal(3, 2, 2, 3000).at[..., ::3].set(-jnp.inf).at[..., 5].set(jnp.nan),
    "uneven": normal(4, 2, 2, 3000).at[..., 1500:].multiply(1e3),
}
RULES = {
    "plain": dict(n=190),
    "counts": dict(n=3000, counts=jnp.array([[3000, 17], [0, 1]])),
    "first": dict(n=200, first=jnp.array([700, 1201]), sinks=4, recent=30),
    "threshold": dict(n=900, threshold=jnp.array([1.0, 7.0]), sinks=3, recent=5),
}
# Each scores and each rules once: a rounded choice of plain ones is the hardest, and fast.
FAST = [("rounded", "plain")]
SLOWER = [("normal", "counts"), ("uneven", "first"), ("infinite", "threshold"), ("zero", "plain"), ("sorted", "counts")]
OFTEN = {*FAST, *SLOWER}


@pytest.mark.parametrize(
    ("scores", "rules"),
    [
        *FAST,
        *(slow(*one) for one in SLOWER),
        *(long(s, r) for s in SCORES for r in RULES if (s, r) not in FAST + SLOWER),
    ],
)
def test_rows_beyond_the_registers_are_selected_exactly(scores, rules):
    lengths, scores, options = jnp.array([3000, 2500]), SCORES[scores], RULES[rules]
    ours, theirs = (choose(scores, lengths, implementation=name, **options) for name in ("gpu", "reference"))
    np.testing.assert_array_equal(ours.valid, theirs.valid)
    np.testing.assert_array_equal(ours.indices, theirs.indices)


@pytest.mark.slow
def test_candidates_that_miss_the_threshold_do_not_change_the_choice(monkeypatch):
    monkeypatch.setattr("pallas_kernels.gpu.selection.SPREAD", -40.0)  # between two values far from the threshold
    scores, lengths = normal(0, 1, 2, 3000), jnp.array([2900])
    ours, theirs = (choose(scores, lengths, 190, name) for name in ("gpu", "reference"))
    np.testing.assert_array_equal(ours.indices, theirs.indices)


@pytest.mark.parametrize(
    ("unit", "pooling", "shared", "rank"),
    [
        (16, "maximum", True, 40),  # 3 x 40 products for a token are made head by head
        slow(1, "normalised", False, 40),
        slow(256, "normalised", True, 48),  # 3 x 48 are a product of matrices
        *(long(unit, "normalised", True, 40) for unit in (1, 16)),
        *(long(unit, "maximum", False, 48) for unit in (1, 256)),
    ],
)
def test_one_call_is_its_three_operations(unit, pooling, shared, rank):
    batch, heads, group, size, dim = 2, 2, 3, 900, 16
    q, q_imp = normal(0, batch, heads * group, dim), normal(1, batch, heads, group, rank)
    k, v = normal(2, batch, heads, size, dim), normal(3, batch, heads, size, dim)
    k_imp = normal(4, batch, heads if shared else heads * group, rank, size)
    new_k, new_v = normal(5, batch, heads, dim), normal(6, batch, heads, dim)
    options = dict(n=64 // unit + 2, unit=unit, sinks=3, recent=5, pooling=pooling, new_k=new_k, new_v=new_v)
    options |= dict(lengths=jnp.array([900, 555]), first=jnp.array([0, 130]), threshold=jnp.array([-9.0, -8.0]))
    options |= dict(counts=jnp.array([[6, 3], [2, 0]]), return_residual=True, return_selection=True)
    how = dict(interpret=interpreted("gpu"))
    with try_tiles(SMALL):
        ours = pk.sparse_decode_attention(q, k, v, q_imp, k_imp, implementation="gpu", **how, **options)
    theirs = pk.sparse_decode_attention(q, k, v, q_imp, k_imp, implementation="reference", **options)
    for one, other in zip(ours[:2], theirs[:2], strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)
    for one, other in zip(ours[2], theirs[2], strict=True):
        np.testing.assert_array_equal(one, other)


def test_small_tiles_of_many_splits_are_merged_in_turn(monkeypatch):
    """More splits than are merged at a time, of tokens and of spans; the last row has nothing at all."""
    monkeypatch.setattr(attention, "MERGED", 16)
    q, k, v = normal(0, 2, 4, 64), normal(1, 2, 1, 700, 64), normal(2, 2, 1, 700, 64)
    indices = jnp.broadcast_to(jnp.arange(0, 700, 2, dtype=jnp.int32), (2, 1, 350))
    valid = jnp.broadcast_to(jnp.arange(350) < 333, indices.shape).at[1].set(False)
    counts = jnp.broadcast_to(jnp.arange(350, dtype=jnp.int32) % 3, (2, 1, 350)).at[1].set(0)
    options = dict(spans=pk.Spans(k[:, :, :350], v[:, :, :350], counts), return_residual=True)
    with try_tiles(Tiles(least_tokens=16, attend_bytes=4096)):
        ours = pk.masked_topk_decode_attention(
            q, k, v, indices, valid, implementation="gpu", interpret=interpreted("gpu"), **options
        )
    theirs = pk.masked_topk_decode_attention(q, k, v, indices, valid, implementation="reference", **options)
    for one, other in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)
    assert not ours[0][1].any() and bool(jnp.all(ours[1][1] == -jnp.inf))
