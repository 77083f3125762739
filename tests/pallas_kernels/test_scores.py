"""Scores of the cached tokens, whatever computes them, against their definition."""

from __future__ import annotations

import functools

import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels as pk
from pallas_kernels.gpu import scores as gpu_scores
from pallas_kernels.xla import scores as cpu_scores
from tests.pallas_kernels.definitions import KERNELS, PLAIN, interpreted, normal, oracle_scores, run, wide


@pytest.mark.parametrize("implementation", PLAIN)
@pytest.mark.parametrize("pooling", ["normalised", "maximum"])
@pytest.mark.parametrize("group", [1, 3])
def test_scores_follow_their_definition(implementation, pooling, group):
    q, keys = normal(0, 3, 2, group, 8), normal(1, 3, 2, 8, 50)
    lengths, first = jnp.array([50, 0, 31]), jnp.array([0, 0, 9])
    for start in (None, first):
        found = run(pk.importance_scores, q, keys, lengths, pooling=pooling, first=start, implementation=implementation)
        assert found.dtype == jnp.float32
        np.testing.assert_allclose(found, oracle_scores(q, keys, lengths, pooling, start), atol=1e-5)


@pytest.mark.parametrize("implementation", KERNELS)
def test_score_kernels_follow_the_definition(implementation):
    q, keys = normal(0, 2, 2, 3, 8), normal(1, 2, 2, 2, 8, 200)
    lengths, first = jnp.array([200, 131]), jnp.array([0, 9])
    for pooling in ("normalised", "maximum"):
        found = run(
            pk.importance_scores, q, keys, lengths, pooling=pooling, first=first, layer=1, implementation=implementation
        )
        np.testing.assert_allclose(found, oracle_scores(q, keys[1], lengths, pooling, first), atol=1e-5)


def test_a_long_cache_is_scored_as_a_short_one():
    """Long enough for several chunks of the log-sum-exp, the last of them overlapping."""
    q, keys, lengths = normal(0, 1, 8, 4, 4), normal(1, 1, 8, 4, 20_011), jnp.array([19_000])
    found = run(pk.importance_scores, q, keys, lengths, implementation="xla")
    np.testing.assert_allclose(found, oracle_scores(q, keys, lengths, "normalised"), atol=2e-5)


WAYS = {
    "kept": dict(KEPT=2**30, FUSED=0),
    "computed twice": dict(KEPT=0, FUSED=2**30),
    "by chunks": dict(KEPT=0, FUSED=0),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.int8], ids=lambda dtype: dtype.__name__)
@pytest.mark.parametrize("size", [255, 1037])
def test_every_way_of_the_cpu_follows_the_definition(monkeypatch, size, dtype, way):
    """Small tiles make many chunks, also where the last overlaps the one before it. A NaN counts as -inf."""
    for name, value in {**WAYS[way], "TILE": 256}.items():
        monkeypatch.setattr(cpu_scores, name, value)
    q, keys = normal(0, 2, 2, 3, 8, dtype=dtype if dtype == jnp.bfloat16 else jnp.float32), normal(1, 3, 2, 2, 8, size)
    if dtype == jnp.int8:
        keys, scales = pk.quantise_k_imp(keys)
        exact = wide(keys) * np.asarray(scales, np.float64)[..., None, None]
    else:
        keys, scales = keys.at[1, 0, :, 3, 20].set(jnp.nan).astype(dtype), None
        exact = wide(keys)
    lengths, first = jnp.array([size, size - 9]), jnp.array([0, 11])
    for pooling in ("normalised", "maximum"):
        found = pk.importance_scores(
            q,
            keys,
            lengths,
            scales=None if scales is None else scales[1],
            pooling=pooling,
            first=first,
            layer=1,
            implementation="xla",
        )
        expected = oracle_scores(wide(q), exact[1], lengths, pooling, first)
        if scales is None:  # the first row without the token that has a NaN
            others = oracle_scores(wide(q)[:1], np.delete(exact[1, :1], 20, axis=-1), lengths[:1] - 1, pooling)
            expected[0] = np.insert(others[0], 20, -np.inf, axis=-1)
        np.testing.assert_allclose(found, expected, atol=2e-5)


@pytest.mark.parametrize("implementation", (*PLAIN, *KERNELS))
def test_parts_of_the_keys_score_as_the_whole_under_its_totals(implementation):
    q, keys = normal(0, 3, 2, 3, 8), normal(1, 3, 2, 8, 200)
    lengths, first = np.array([200, 0, 31]), np.array([0, 0, 9])
    parts = [
        (keys[..., at : at + 100], jnp.asarray(np.clip(lengths - at, 0, 100)), jnp.asarray(np.clip(first - at, 0, 100)))
        for at in (0, 100)
    ]
    score = functools.partial(run, pk.importance_scores, implementation=implementation)
    total = functools.partial(run, pk.importance_totals, implementation=implementation)
    totals = functools.reduce(jnp.logaddexp, [total(q, part, held, first=start) for part, held, start in parts])
    found = [score(q, part, held, first=start, totals=totals) for part, held, start in parts]
    expected = oracle_scores(q, keys, lengths, "normalised", first)
    np.testing.assert_allclose(jnp.concatenate(found, axis=-1), expected, atol=1e-5)
    assert np.isneginf(totals[1]).all()  # that row sees nothing


@pytest.mark.parametrize(
    "implementation",
    ("reference", "xla", pytest.param("gpu", marks=pytest.mark.slow), pytest.param("tpu", marks=pytest.mark.slow)),
)
def test_keys_of_every_query_head_are_pooled_over_the_group(implementation):
    q, keys, lengths = normal(0, 2, 2, 3, 8), normal(1, 2, 6, 8, 40), jnp.array([40, 17])
    found = run(pk.importance_scores, q, keys, lengths, implementation=implementation)
    single = oracle_scores(
        np.asarray(q).reshape(2, 6, 1, 8), np.asarray(keys), lengths, "maximum"
    )  # each query head alone
    for b in range(2):
        single[b] -= np.log(np.exp(single[b, :, : lengths[b]]).sum(axis=1, keepdims=True))
    np.testing.assert_allclose(found, single.reshape(2, 2, 3, 40).max(axis=2), atol=1e-5)


@pytest.mark.parametrize(
    "implementation",
    ("reference", "xla", pytest.param("gpu", marks=pytest.mark.slow), pytest.param("tpu", marks=pytest.mark.slow)),
)
def test_int8_keys_score_as_their_dequantised_values(implementation):
    q, keys, lengths = normal(0, 2, 2, 3, 8), normal(1, 2, 2, 8, 40), jnp.array([40, 17])
    small, scales = pk.quantise_k_imp(keys)
    assert small.dtype == jnp.int8 and scales.shape == (2, 2)
    np.testing.assert_allclose(wide(small) * scales[..., None, None], keys, atol=float(scales.max()) / 2 + 1e-6)
    found = run(pk.importance_scores, q, small, lengths, scales=scales, implementation=implementation)
    expected = oracle_scores(q, wide(small) * np.asarray(scales, np.float64)[..., None, None], lengths, "normalised")
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_new_score_keys_are_quantised_at_the_scale_of_the_old():
    keys = normal(0, 2, 4, 30)
    _, scales = pk.quantise_k_imp(keys)
    again, same = pk.quantise_k_imp(10 * keys[..., :3], scales)
    np.testing.assert_array_equal(same, scales)
    assert int(jnp.max(jnp.abs(again))) == 127  # saturates instead of wrapping round
    np.testing.assert_array_equal(pk.quantise_k_imp(jnp.zeros((2, 4, 5)))[0], 0)


def test_int8_keys_with_offsets_beyond_32_bits_are_read_layer_by_layer(monkeypatch):
    """On GPU, where arrays of 2 to 4 GiB have signed offsets of 32 bits. The border is lowered here."""
    q_imp, lengths = normal(1, 1, 2, 3, 8), jnp.array([90])
    keys, scales = pk.quantise_k_imp(normal(2, 3, 1, 2, 8, 90))
    how = dict(scales=scales[1, 0], layer=1)
    expected = pk.importance_scores(q_imp, keys, lengths, implementation="reference", **how)
    monkeypatch.setattr(gpu_scores, "ADDRESSED", keys.size - 1)
    found = pk.importance_scores(q_imp, keys, lengths, implementation="gpu", interpret=interpreted("gpu"), **how)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    monkeypatch.setattr(gpu_scores, "ADDRESSED", keys[0].size - 1)
    with pytest.raises(ValueError, match="which GPU kernels cannot address; split the batch"):
        pk.importance_scores(q_imp, keys[1], lengths, scales=scales[1, 0], implementation="gpu", interpret=True)
