"""Scores of the cached tokens, whatever computes them, against their definition."""

from __future__ import annotations

import functools
import itertools

import jax
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


@pytest.mark.parametrize("implementation", (*PLAIN, *KERNELS))
@pytest.mark.parametrize("group", [1, 3])
def test_an_offset_is_added_to_each_query_head_before_they_are_pooled(implementation, group):
    q, keys, offset = normal(0, 3, 2, group, 8), normal(1, 3, 2, 8, 200), normal(2, 3, 2, group)
    lengths, first = jnp.array([200, 0, 31]), jnp.array([0, 0, 9])
    score = functools.partial(run, pk.importance_scores, implementation=implementation)
    totals = run(pk.importance_totals, q, keys, lengths, first=first, implementation=implementation)
    for pooling, given in (("normalised", None), ("maximum", None), ("normalised", totals)):
        found = score(q, keys, lengths, first=first, pooling=pooling, totals=given, offset=offset)
        np.testing.assert_allclose(found, oracle_scores(q, keys, lengths, pooling, first, offset), atol=1e-5)
    out = jnp.full(offset.shape, -jnp.inf).at[..., 0].set(0.0)  # leaves all heads but the first out
    for pooling in ("normalised", "maximum"):
        found = score(q, keys, lengths, first=first, pooling=pooling, offset=out)
        expected = oracle_scores(q[:, :, :1], keys, lengths, pooling, first, out[..., :1])
        np.testing.assert_allclose(found, expected, atol=1e-5)
    with pytest.raises(ValueError, match=r"offset must have shape \(3, 2, .\), got"):
        score(q, keys, lengths, offset=offset[0])


def test_a_long_cache_is_scored_as_a_short_one():
    """Long enough for several chunks of the log-sum-exp, the last of them overlapping."""
    q, keys, lengths = normal(0, 1, 8, 4, 4), normal(1, 1, 8, 4, 20_011), jnp.array([19_000])
    found = run(pk.importance_scores, q, keys, lengths, implementation="xla")
    np.testing.assert_allclose(found, oracle_scores(q, keys, lengths, "normalised"), atol=2e-5)


@pytest.mark.parametrize("keys_of", ["group", "query head"])
@pytest.mark.parametrize("layers", [[2], [2, 0, 3], list(range(9))], ids=str)
@pytest.mark.parametrize("implementation", ["reference", "xla", *KERNELS])
def test_several_layers_are_scored_as_each_of_them(implementation, layers, keys_of):
    """With scales, lengths, first tokens and offsets of their own, and totals that are given."""
    batch, heads, group, count = 2, 2, 3, len(layers)
    key_heads = heads if keys_of == "group" else heads * group
    q = normal(0, batch * count, heads, group, 8)
    keys, scales = pk.quantise_k_imp(normal(1, 9, batch, key_heads, 8, 70))
    lengths = jnp.arange(batch * count) * 5 % 41 + 30
    of_rows = dict(first=lengths // 3, scales=jnp.swapaxes(scales[jnp.array(layers)], 0, 1).reshape(-1, key_heads))
    how = dict(layer=jnp.array(layers), implementation=implementation)
    offset = normal(2, batch * count, heads, group)
    found = run(pk.importance_scores, q, keys, lengths, offset=offset, **of_rows, **how)
    totals = run(pk.importance_totals, q, keys, lengths, **of_rows, **how)
    again = run(pk.importance_scores, q, keys, lengths, totals=totals, **of_rows, **how)
    for place, layer in enumerate(layers):
        own = jax.tree.map(lambda a, place=place: a[place::count], (q, lengths, of_rows))
        single = dict(layer=layer, implementation="reference")
        expected = pk.importance_scores(own[0], keys, own[1], offset=offset[place::count], **own[2], **single)
        np.testing.assert_allclose(found[place::count], expected, atol=1e-5)
        expected = pk.importance_scores(own[0], keys, own[1], **own[2], **single)
        np.testing.assert_allclose(again[place::count], expected, atol=1e-5)
        expected = pk.importance_totals(own[0], keys, own[1], **own[2], **single)
        np.testing.assert_allclose(totals[place::count], expected, atol=1e-5)


def test_layers_that_do_not_fit_are_named():
    q, keys, lengths = normal(0, 4, 2, 3, 8), normal(1, 5, 2, 2, 8, 70), jnp.full(4, 70)
    for layers, message in [
        ([1, 2, 3], r"q_imp has 4 rows; 3 layers of 2 rows need 6"),
        (np.array([1, 5]), "layer 5 is outside the cache's 5 layers"),
        ([], r"layer must be one index, or a vector of them, got shape \(0,\)"),
        ([[1, 2]], r"got shape \(1, 2\)"),
        ([1, 5], "layer 5 is outside the cache's 5 layers"),
        ("1", "layer must be a whole number, got '1'"),
        (1.5, "layer must be a whole number, got 1.5"),
        (True, "layer must be a whole number, got True"),
    ]:
        with pytest.raises(ValueError, match=message):
            pk.importance_scores(q, keys, lengths, layer=layers)
    whole = normal(2, 5, 2, 2, 70, 8)
    with pytest.raises(ValueError, match=r"layer must be one index, got shape \(2,\)"):
        pk.masked_topk_decode_attention(normal(3, 4, 6, 8), whole, whole, jnp.zeros((4, 2, 1), jnp.int32), layer=[1, 2])


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
    for pooling, offset in itertools.product(("normalised", "maximum"), (None, normal(2, 2, 2, 3))):
        found = pk.importance_scores(
            q,
            keys,
            lengths,
            scales=None if scales is None else scales[1],
            pooling=pooling,
            offset=offset,
            first=first,
            layer=1,
            implementation="xla",
        )
        expected = oracle_scores(wide(q), exact[1], lengths, pooling, first, offset)
        if scales is None:  # the first row without the token that has a NaN
            others = oracle_scores(
                wide(q)[:1], np.delete(exact[1, :1], 20, axis=-1), lengths[:1] - 1, pooling, None, offset
            )
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


@pytest.mark.parametrize("implementation", (*PLAIN, *KERNELS))
def test_a_head_with_an_infinite_product_has_an_infinite_total(implementation):
    q, keys = jnp.abs(normal(0, 1, 2, 3, 8)), normal(1, 1, 2, 8, 140)
    keys = keys.at[0, 1, 2, 7].set(jnp.inf)
    totals = run(pk.importance_totals, q, keys, jnp.array([139]), implementation=implementation)
    assert np.isposinf(totals[0, 1]).all()
    if implementation != "tpu":  # there, heads are multiplied together
        assert np.isfinite(totals[0, 0]).all()


def test_what_is_not_finite_is_no_part_of_a_scale():
    keys = normal(0, 2, 2, 8, 50)
    small, scales = pk.quantise_k_imp(keys)
    bad = keys.at[:, 0, 3, 7].set(jnp.inf).at[:, 1, 3, 7].set(jnp.nan)
    found, same = pk.quantise_k_imp(bad)
    np.testing.assert_array_equal(same, scales)
    np.testing.assert_array_equal(found[:, 0, 3, 7], 127)
    np.testing.assert_array_equal(found[:, 1, 3, 7], 0)
    np.testing.assert_array_equal(found.at[..., 3, 7].set(0), small.at[..., 3, 7].set(0))


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
    q_imp, how = jnp.repeat(q_imp, 2, axis=0), dict(scales=scales[::2, 0], layer=np.array([0, 2]))
    expected = pk.importance_scores(q_imp, keys, jnp.repeat(lengths, 2), implementation="reference", **how)
    how |= dict(implementation="gpu", interpret=interpreted("gpu"))
    np.testing.assert_allclose(pk.importance_scores(q_imp, keys, jnp.repeat(lengths, 2), **how), expected, atol=1e-5)
    q_imp = q_imp[:1]
    monkeypatch.setattr(gpu_scores, "ADDRESSED", keys[0].size - 1)
    with pytest.raises(ValueError, match="which GPU kernels cannot address; split the batch"):
        pk.importance_scores(q_imp, keys[1], lengths, scales=scales[1, 0], implementation="gpu", interpret=True)


CHOICES = {
    "normalised": dict(),
    "offset, window": dict(offset=normal(5, 4, 2, 3), first=jnp.array([0, 0, 100, 101])),
    "maximum, threshold": dict(pooling="maximum", threshold=jnp.array([[0.5, 1.0]] * 4)),
    "maximum, offset": dict(pooling="maximum", offset=normal(5, 4, 2, 3)),
    "counts, int8": dict(counts=jnp.array([[3, 1], [2, 3], [0, 3], [3, 3]]), int8=True),
}


@pytest.mark.parametrize("implementation", ("xla", *KERNELS))
@pytest.mark.parametrize("case", CHOICES)
def test_a_choice_by_importance_is_that_of_scores_without_sinks_and_recent_tokens(case, implementation):
    """Two layers of two rows; the kernels choose pages of 16 tokens, and XLA two of 2 tokens."""
    options, unit = dict(CHOICES[case]), 16 if implementation in KERNELS else 2
    size, lengths = 192, jnp.array([192, 192, 131, 130])  # of each row, twice
    q_imp, k_imp, layer = normal(0, 4, 2, 3, 8), normal(1, 3, 2, 2, 8, size), jnp.array([2, 0])
    rules = dict(sinks=3, recent=5, unit=unit)
    scored = {name: options.pop(name) for name in ("pooling", "offset") if name in options}
    if options.pop("int8", False):
        k_imp, scales = pk.quantise_k_imp(k_imp)
        scored["scales"] = jnp.swapaxes(scales[layer], 0, 1).reshape(4, 2)
    found = run(
        *(pk.choose_by_importance, q_imp, k_imp, lengths),
        **dict(n=6, layer=layer, implementation=implementation) | options | rules | scored,
    )
    first = jnp.maximum(options.get("first", jnp.zeros_like(lengths)), 3)
    scores = pk.importance_scores(
        q_imp, k_imp, lengths - 5, layer=layer, first=first, implementation="reference", **scored
    )
    wanted = pk.select_top_k(scores, lengths, 6, implementation="reference", **options, **rules)
    np.testing.assert_array_equal(found.valid, wanted.valid)
    np.testing.assert_array_equal(found.indices, wanted.indices)
