"""Attention over chosen units, whatever computes it, against its definition."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels as pk
from tests.marked import slow
from tests.pallas_kernels.definitions import (
    KERNELS,
    PLAIN,
    attention_case,
    check_attention,
    interpreted,
    normal,
    oracle_attention,
    run,
    tokens_of,
    wide,
)


@pytest.mark.parametrize("implementation", PLAIN)
@pytest.mark.parametrize("unit, size", [(1, 61), (4, 64), (4, 61)])
def test_attention_reads_the_chosen_and_nothing_else(implementation, unit, size):
    """Whatever must not be read is NaN in these caches."""
    case = attention_case(6, batch=3, heads=2, group=3, dim=16, size=size, n=7, unit=unit)
    check_attention(case, implementation, 1e-5)
    new = normal(7, 3, 2, 16), normal(8, 3, 2, 16)
    check_attention(case, implementation, 1e-5, new=new)


@pytest.mark.parametrize("implementation", KERNELS)
def test_attention_kernels_read_the_chosen_and_nothing_else(implementation):
    case = attention_case(6, batch=2, heads=2, group=3, dim=64, size=160, n=10, unit=16, layers=2)
    check_attention(case, implementation, 1e-5, new=(normal(7, 2, 2, 64), normal(8, 2, 2, 64)))


@pytest.mark.parametrize("unit", [4, 16, *map(slow, (1, 2, 8, 32))])
def test_tiles_on_tpu_are_seen_whole_in_part_and_not_at_all(unit):
    case = attention_case(8, batch=4, heads=2, group=3, dim=64, size=2400 // unit * unit, n=1800 // unit, unit=unit)
    case.lengths = case.lengths.at[2].set(1601)
    check_attention(case, "tpu", 1e-5)


@pytest.mark.parametrize("implementation", (*PLAIN, *KERNELS))
def test_rows_begin_within_a_page_and_end_where_their_sequence_does(implementation):
    """Of four sequences, with logits far below 0: nothing else may count, not even as 0."""
    unit, batch, heads, size = 16, 4, 2, 96
    q, k, v = 30 + normal(0, batch, 6, 64), normal(1, batch, heads, size, 64) - 3, normal(2, batch, heads, size, 64)
    lengths, first = jnp.array([96, 17, 50, 33]), jnp.array([0, 5, 37, 20])
    chosen = jnp.broadcast_to(jnp.arange(6, dtype=jnp.int32), (batch, heads, 6))
    how = dict(unit=unit, lengths=lengths, first=first, return_residual=True, implementation=implementation)
    out, residual = run(pk.masked_topk_decode_attention, q, k, v, chosen, **how)
    for b, h in np.ndindex(batch, heads):
        own = slice(3 * h, 3 * h + 3)
        tokens = range(int(first[b]), int(lengths[b]))
        expected, total = oracle_attention(wide(q)[b, own], wide(k)[b, h], wide(v)[b, h], list(tokens), 1 / 8)
        assert total.max() < -100
        np.testing.assert_allclose(out[b, own], expected, atol=2e-4)  # float32 logits of several hundred
        np.testing.assert_allclose(residual[b, own], total, rtol=1e-5)


@pytest.mark.parametrize("implementation", ("reference", "xla"))
def test_bfloat16_is_attended_to_its_precision(implementation):
    case = attention_case(9, batch=2, heads=2, group=4, dim=80, size=96, n=30, unit=1, dtype=jnp.bfloat16, layers=2)
    check_attention(case, implementation, 2e-2)


@pytest.mark.parametrize("implementation", PLAIN)
def test_a_layer_outside_is_taken_as_a_slice_takes_it(implementation):
    """A layer on the device is not known before the call."""
    q, k, v = normal(0, 1, 2, 8), normal(1, 3, 1, 1, 20, 8), normal(2, 3, 1, 1, 20, 8)
    attend = functools.partial(pk.masked_topk_decode_attention, implementation=implementation)
    chosen = jnp.arange(5, dtype=jnp.int32).reshape(1, 1, 5)
    for layer, inside in ((-1, 2), (7, 2), (1, 1)):
        found = attend(q, k, v, chosen, layer=jnp.asarray(layer))
        np.testing.assert_allclose(found, attend(q, k[inside], v[inside], chosen), atol=1e-6)


@pytest.mark.parametrize("implementation", PLAIN)
def test_nothing_chosen_gives_zero_and_the_current_token_alone_gives_its_value(implementation):
    q, k, v = normal(0, 2, 4, 8), normal(1, 2, 2, 20, 8), normal(2, 2, 2, 20, 8)
    none = jnp.zeros((2, 2, 0), jnp.int32)
    attend = functools.partial(pk.masked_topk_decode_attention, implementation=implementation, return_residual=True)
    out, residual = attend(q, k, v, none)
    assert not out.any() and bool(jnp.all(residual == -jnp.inf))
    out, _ = attend(q, k, v, none, new_k=k[:, :, 0], new_v=v[:, :, 0])
    np.testing.assert_allclose(out.reshape(2, 2, 2, 8), jnp.broadcast_to(v[:, :, :1], (2, 2, 2, 8)), atol=1e-6)


@pytest.mark.parametrize("layers", [0, 2])
@pytest.mark.parametrize("implementation", ["reference", "xla", *KERNELS])
def test_a_span_counts_as_so_many_equal_keys(implementation, layers):
    """Against float64 sums over its keys one by one. What counts nothing is NaN."""
    case = attention_case(12, batch=2, heads=2, group=3, dim=64, size=160, n=6, unit=16, layers=layers)
    counts = np.random.default_rng(3).integers(0, 5, (2, 2, 37))
    counts[:, :, 20:30] = 0
    lead, hole = (layers,) * bool(layers), jnp.asarray(counts == 0)[..., None]
    k, v = (jnp.where(hole, jnp.nan, normal(seed, *lead, 2, 2, 37, 64)) for seed in (5, 6))
    new_k, new_v = normal(7, 2, 2, 64), normal(8, 2, 2, 64)
    how = dict(unit=16, lengths=case.lengths, spans=pk.Spans(k, v, jnp.asarray(counts, jnp.int32)))
    how |= dict(layer=1 if layers else None, new_k=new_k, new_v=new_v, return_residual=True)
    how |= dict(implementation=implementation, interpret=interpreted(implementation))
    out, residual = pk.masked_topk_decode_attention(case.q, case.k, case.v, case.indices, case.valid, **how)
    of_layer = [np.float64(a[1] if layers else a) for a in (case.k, case.v, k, v)]
    for b, h in np.ndindex(2, 2):
        tokens = tokens_of(case.indices[b, h][case.valid[b, h]], 16, 0, case.lengths[b])
        repeated = np.repeat(np.arange(37), counts[b, h])
        keys, values = (
            np.vstack([cache[b, h][tokens], means[b, h][repeated], np.float64(new[b, h])])
            for cache, means, new in zip(of_layer[:2], of_layer[2:], (new_k, new_v), strict=True)
        )
        for g in range(3):
            logits = keys @ np.float64(case.q[b, 3 * h + g]) / 8
            total = np.log(np.exp(logits).sum())
            np.testing.assert_allclose(residual[b, 3 * h + g], total, atol=1e-5)
            np.testing.assert_allclose(out[b, 3 * h + g], np.exp(logits - total) @ values, atol=1e-5)


def test_spans_of_another_cache_are_named():
    k, indices = normal(1, 2, 2, 20, 8), jnp.zeros((2, 2, 1), jnp.int32)
    counts = jnp.ones((2, 2, 5), jnp.int32)
    for spans, message in [
        (
            pk.Spans(k[:, :, :4], k[:, :, :5], counts),
            r"spans.k must be float32 \(2, 2, 5, 8\), as k and the counts, got",
        ),
        (pk.Spans(k[:, :, :5], k[:, :, :5].astype(jnp.bfloat16), counts), "spans.v must be float32 .*, got bfloat16"),
        (pk.Spans(k[:, :, :5], k[:, :, :5], counts[0]), r"spans.counts must have shape \(2, 2, 5\), got \(2, 5\)"),
    ]:
        with pytest.raises(ValueError, match=message):
            pk.masked_topk_decode_attention(normal(0, 2, 4, 8), k, k, indices, spans=spans)


def test_parts_of_a_choice_merge_by_their_residuals():
    case = attention_case(10, batch=1, heads=2, group=2, dim=8, size=40, n=20, unit=1, poison=False)
    attend = functools.partial(
        pk.masked_topk_decode_attention, case.q, case.k, case.v, lengths=case.lengths, return_residual=True
    )
    attend = jax.jit(attend)
    whole, residual = attend(case.indices, case.valid)
    parts = [attend(case.indices[..., s], case.valid[..., s]) for s in (slice(0, 8), slice(8, 20))]
    lse = jnp.logaddexp(parts[0][1], parts[1][1])
    merged = sum(out * jnp.exp(part - lse)[..., None] for out, part in parts)
    np.testing.assert_allclose(merged, whole, atol=1e-5)
    np.testing.assert_allclose(lse, residual, atol=1e-5)


@pytest.mark.parametrize("implementation", PLAIN)
def test_a_soft_cap_bends_the_logits_of_chosen_tokens_and_of_the_new_one(implementation):
    case = attention_case(11, batch=2, heads=2, group=2, dim=8, size=40, n=12, unit=2, poison=False)
    new_k, new_v = normal(5, 2, 2, 8) * 3, normal(6, 2, 2, 8)
    arrays = (case.q, case.k, case.v, case.indices, case.valid)
    options = dict(lengths=case.lengths, unit=2, new_k=new_k, new_v=new_v, return_residual=True, softcap=0.7)
    out, residual = pk.masked_topk_decode_attention(*arrays, implementation=implementation, **options)
    for b, h in np.ndindex(2, 2):
        units = np.asarray(case.indices[b, h])[np.asarray(case.valid[b, h])]
        tokens = (units[:, None] * 2 + np.arange(2)).reshape(-1)
        tokens = tokens[tokens < int(case.lengths[b])]
        keys, values = (np.vstack([a[b, h][tokens], n[b, h]]) for a, n in ((case.k, new_k), (case.v, new_v)))
        for g in range(2):
            logits = 0.7 * np.tanh(keys @ np.asarray(case.q[b, 2 * h + g]) * 8**-0.5 / 0.7)
            total = np.log(np.exp(logits).sum())
            np.testing.assert_allclose(residual[b, 2 * h + g], total, atol=1e-5)
            np.testing.assert_allclose(out[b, 2 * h + g], np.exp(logits - total) @ values, atol=1e-5)


@pytest.mark.parametrize("implementation", KERNELS)
def test_kernels_refuse_a_soft_cap(implementation):
    case = attention_case(11, batch=2, heads=2, group=2, dim=8, size=40, n=12, unit=2, poison=False)
    arrays = (case.q, case.k, case.v, case.indices, case.valid)
    with pytest.raises(ValueError, match=f'"{implementation}" has no soft cap of logits, .* use "xla" or None'):
        pk.masked_topk_decode_attention(
            *arrays, unit=2, lengths=case.lengths, softcap=5.0, implementation=implementation
        )
    with pytest.raises(ValueError, match="softcap must be one finite number, got inf"):
        pk.masked_topk_decode_attention(*arrays, unit=2, lengths=case.lengths, softcap=float("inf"))
