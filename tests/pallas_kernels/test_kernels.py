"""Scoring, choosing and attending against definitions written out in float64 numpy, whatever computes them.

"reference" and "xla" run here as they are; the Pallas kernels run interpreted. Tolerances: float32 sums of up to some
hundred terms of size 1 are within 1e-5 of float64; bfloat16 keeps 8 bits, so inputs are exact (the oracle reads the
rounded ones), weights are rounded to 2**-9 and results to 2**-9 of their size, about 2: 2e-2 covers both.
"""

from __future__ import annotations

import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import pallas_kernels as pk

PLAIN = ("reference", "xla")
KERNELS = ("tpu", "gpu")


@functools.cache
def jitted(function, implementation, static):
    """The function of (arrays, named arrays), jitted once for all tests; the kernels are interpreted."""
    interpret = True if implementation in KERNELS else None
    call = functools.partial(function, implementation=implementation, interpret=interpret, **dict(static))
    return jax.jit(lambda arrays, named: call(*arrays, **named))


def run(function, *arrays, implementation, **options):
    """What the function gives, jitted over its arrays."""
    named = {name: value for name, value in options.items() if isinstance(value, (jax.Array, np.ndarray))}
    static = tuple((name, value) for name, value in options.items() if name not in named)
    return jitted(function, implementation, static)(arrays, named)


def normal(seed, *shape, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def wide(array):
    return np.asarray(array.astype(jnp.float32), np.float64)


# --- definitions ----------------------------------------------------------------------------------


def oracle_scores(q_imp, keys, lengths, pooling, first=None):
    """q_imp [B, K, G, R] and keys [B, K, R, S], a token at a time."""
    q_imp, keys = np.asarray(q_imp, np.float64), np.asarray(keys, np.float64)
    batch, heads, group, rank = q_imp.shape
    out = np.full((batch, heads, keys.shape[-1]), -np.inf)
    for b in range(batch):
        begin, end = (0 if first is None else int(first[b])), int(lengths[b])
        for h in range(heads):
            rows = [q_imp[b, h, g] @ keys[b, h, :, begin:end] / rank**0.5 for g in range(group)]
            if pooling == "normalised" and group > 1 and end > begin:
                rows = [row - np.log(np.sum(np.exp(row - row.max()))) - row.max() for row in rows]
            if end > begin:
                out[b, h, begin:end] = np.max(rows, axis=0)
    return out


def oracle_choice(scores, length, count, sinks, recent, unit, first=0, threshold=None):
    """The chosen units of one row as a sorted list: python's sort on what the documentation says."""
    best = {}
    for token in range(first, min(length, len(scores))):
        score = float(scores[token])
        score = -np.inf if np.isnan(score) else score
        age = length - 1 - token
        if age < recent:
            key = (2, -age)
        elif token < sinks:
            key = (1, -token)
        elif threshold is not None and score < threshold:
            continue
        else:
            key = (0, score)
        best[token // unit] = max(best.get(token // unit, key), key)
    order = sorted(best, key=lambda u: (tuple(-part for part in best[u]), u))
    return sorted(order[:count])


def oracle_attention(q, k, v, tokens, scale):
    """q [G, D] over the tokens of k, v [S, D]: (out [G, D], log-sum-exp [G]); 0 and -inf without tokens."""
    if not len(tokens):
        return np.zeros(q.shape), np.full(len(q), -np.inf)
    logits = q @ k[tokens].T * scale
    top = logits.max(axis=1, keepdims=True)
    weights = np.exp(logits - top)
    total = weights.sum(axis=1, keepdims=True)
    return weights @ v[tokens] / total, (top + np.log(total))[:, 0]


def listed(chosen, b, h):
    """The valid indices of a row; checks that they come first, ascend, and that the rest is 0."""
    indices, valid = np.asarray(chosen.indices[b, h]), np.asarray(chosen.valid[b, h])
    count = int(valid.sum())
    assert valid[:count].all() and not indices[count:].any()
    assert (np.diff(indices[:count]) > 0).all()
    return indices[:count].tolist()


def tokens_of(units, unit, begin, end):
    return [t for u in units for t in range(u * unit, (u + 1) * unit) if begin <= t < end]


def check_choice(implementation, scores, lengths, n, **options):
    chosen = run(pk.select_top_k, scores, lengths, implementation=implementation, n=n, **options)
    counts, first, threshold = (options.get(name) for name in ("counts", "first", "threshold"))
    for b in range(scores.shape[0]):
        for h in range(scores.shape[1]):
            expected = oracle_choice(
                np.asarray(scores[b, h]),
                int(lengths[b]),
                n if counts is None else int(np.broadcast_to(np.asarray(counts).T, scores.shape[1::-1]).T[b, h]),
                options.get("sinks", 0),
                options.get("recent", 0),
                options.get("unit", 1),
                0 if first is None else int(first[b]),
                None if threshold is None else float(threshold[h]),
            )
            assert listed(chosen, b, h) == expected


def attention_case(seed, *, batch, heads, group, dim, size, n, unit, dtype=jnp.float32, layers=0, poison=True):
    """Queries, caches that hold NaN wherever nothing may be read, and a random choice of units."""
    rng = np.random.default_rng(seed)
    q = normal(seed, batch, heads * group, dim, dtype=dtype)
    lead = (layers,) if layers else ()
    k, v = (normal(seed + i, *lead, batch, heads, size, dim, dtype=dtype) for i in (1, 2))
    lengths = rng.integers(0, size + 1, batch)
    lengths[0], lengths[-1] = size, (0 if batch > 1 else size)
    units = -(-size // unit)
    indices = np.zeros((batch, heads, n), np.int32)
    valid = np.zeros((batch, heads, n), bool)
    for b in range(batch):
        held = -(-int(lengths[b]) // unit)
        for h in range(heads):
            count = min(n, held, int(rng.integers(0, n + 1)) if h else n)
            indices[b, h, :count] = np.sort(rng.permutation(held)[:count])
            valid[b, h, :count] = True
    assert units >= n
    if poison:
        read = np.zeros((batch, heads, size), bool)
        for b in range(batch):
            for h in range(heads):
                read[b, h, tokens_of(indices[b, h][valid[b, h]], unit, 0, lengths[b])] = True
        hole = jnp.asarray(~read)[..., None]
        k, v = (jnp.where(jnp.broadcast_to(hole, a.shape[-4:]) if not layers else
                          jnp.broadcast_to(hole[None], a.shape), jnp.nan, a) for a in (k, v))  # fmt: skip
    return SimpleNamespace(q=q, k=k, v=v, indices=jnp.asarray(indices), valid=jnp.asarray(valid),
                           lengths=jnp.asarray(lengths, jnp.int32), unit=unit, layers=layers)  # fmt: skip


def check_attention(case, implementation, tolerance, new=None, **options):
    """The result and its residual against the oracle, row by row."""
    named = {} if new is None else {"new_k": new[0], "new_v": new[1]}
    layer = case.layers - 1 if case.layers else None
    out, residual = run(
        pk.masked_topk_decode_attention, case.q, case.k, case.v, case.indices, case.valid, lengths=case.lengths,
        unit=case.unit, layer=layer, return_residual=True, implementation=implementation, **named, **options,
    )  # fmt: skip
    assert out.dtype == case.q.dtype and residual.dtype == jnp.float32
    k, v = (a[layer] if case.layers else a for a in (case.k, case.v))
    batch, heads, size, dim = k.shape
    group = case.q.shape[1] // heads
    q, k, v, out = (wide(a) for a in (case.q, k, v, out))
    for b in range(batch):
        for h in range(heads):
            units = np.asarray(case.indices[b, h])[np.asarray(case.valid[b, h])]
            tokens = tokens_of(units, case.unit, 0, int(case.lengths[b]))
            keys, values = k[b, h], v[b, h]
            if new is not None:
                keys, values = (np.concatenate([a, wide(x)[b, h][None]]) for a, x in ((keys, new[0]), (values, new[1])))
                tokens = [*tokens, size]
            own = slice(h * group, (h + 1) * group)
            expected, lse = oracle_attention(q[b, own], keys, values, tokens, dim**-0.5)
            np.testing.assert_allclose(out[b, own], expected, atol=tolerance)
            np.testing.assert_allclose(residual[b, own], lse, atol=tolerance)


# --- scores ---------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("implementation", ("reference", "xla", pytest.param("gpu", marks=pytest.mark.slow),
                                            pytest.param("tpu", marks=pytest.mark.slow)))  # fmt: skip
def test_keys_of_every_query_head_are_pooled_over_the_group(implementation):
    q, keys, lengths = normal(0, 2, 2, 3, 8), normal(1, 2, 6, 8, 40), jnp.array([40, 17])
    found = run(pk.importance_scores, q, keys, lengths, implementation=implementation)
    single = oracle_scores(
        np.asarray(q).reshape(2, 6, 1, 8), np.asarray(keys), lengths, "maximum"
    )  # each query head alone
    for b in range(2):
        single[b] -= np.log(np.exp(single[b, :, : lengths[b]]).sum(axis=1, keepdims=True))
    np.testing.assert_allclose(found, single.reshape(2, 2, 3, 40).max(axis=2), atol=1e-5)


@pytest.mark.parametrize("implementation", ("reference", "xla", pytest.param("gpu", marks=pytest.mark.slow),
                                            pytest.param("tpu", marks=pytest.mark.slow)))  # fmt: skip
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


# --- selection ------------------------------------------------------------------------------------


@pytest.mark.parametrize("implementation", PLAIN)
@pytest.mark.parametrize("unit", [1, 4])
def test_the_choice_is_the_best_by_score_with_sinks_and_window_first(implementation, unit):
    scores, lengths = normal(2, 3, 2, 70), jnp.array([70, 33, 0])
    options = dict(n=9, sinks=3, recent=5, unit=unit)
    check_choice(implementation, scores, lengths, **options)
    check_choice(implementation, scores, lengths, counts=jnp.array([[1, 2], [7, 0], [3, 3]]), **options)
    check_choice(implementation, scores, lengths, first=jnp.array([2, 20, 0]), **options)
    check_choice(implementation, scores, lengths, threshold=jnp.array([1.0, -0.5]), **options)


@pytest.mark.parametrize("implementation", PLAIN)
def test_ties_go_to_the_earlier_and_the_count_is_exact(implementation):
    scores = jnp.round(normal(3, 2, 2, 90))  # five or six distinct values
    scores = scores.at[0, 0].set(0.0).at[0, 0, 7].set(-0.0)  # all equal
    scores = scores.at[1, 1, :40].set(jnp.nan).at[1, 1, 50:60].set(jnp.inf).at[1, 1, 60:].set(-jnp.inf)
    for n in (1, 20, 90):
        check_choice(implementation, scores, jnp.array([90, 90]), n=n, sinks=1, recent=2)


@pytest.mark.parametrize("implementation", ["xla", "tpu", "gpu"])
def test_a_threshold_of_nothing_lets_nan_pass_as_the_lowest(implementation):
    scores = jnp.asarray([[[jnp.nan, 1.0, jnp.nan, 2.0]]])
    for limit, n in ((-jnp.inf, 4), (-jnp.inf, 3), (1.5, 4)):
        select = functools.partial(run, pk.select_top_k, scores, jnp.asarray([4]), n=n, threshold=jnp.asarray([limit]))
        wanted, found = select(implementation="reference"), select(implementation=implementation)
        np.testing.assert_array_equal(found.indices, wanted.indices)
        np.testing.assert_array_equal(found.valid, wanted.valid)


@pytest.mark.parametrize("distribution", ["normal", "peaked", "ties"])
def test_a_large_choice_without_sorting_is_that_of_a_sort(distribution):
    """Large enough for the sampled bracket and the counts by columns."""
    scores = normal(4, 1, 3, 9_001)
    if distribution == "peaked":
        scores = jnp.exp(8 * scores) - 1e-3
    elif distribution == "ties":
        scores = jnp.round(2 * scores) / 2
    lengths = jnp.array([8_900])
    ours, theirs = (
        run(pk.select_top_k, scores, lengths, n=700, sinks=4, recent=8, implementation=name)
        for name in ("xla", "reference")
    )
    np.testing.assert_array_equal(ours.valid, theirs.valid)
    np.testing.assert_array_equal(ours.indices, theirs.indices)


@pytest.mark.parametrize("implementation", KERNELS)
def test_selection_kernels_choose_the_best(implementation):
    scores = jnp.round(normal(5, 1, 2, 300) * 4) / 4  # with ties
    check_choice(implementation, scores, jnp.array([290]), n=40, sinks=3, recent=5, counts=jnp.array([[40, 7]]))


# --- attention ------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("implementation", ("reference", "xla"))
def test_bfloat16_is_attended_to_its_precision(implementation):
    case = attention_case(9, batch=2, heads=2, group=4, dim=80, size=96, n=30, unit=1, dtype=jnp.bfloat16, layers=2)
    check_attention(case, implementation, 2e-2)


@pytest.mark.parametrize("implementation", PLAIN)
def test_nothing_chosen_gives_zero_and_the_current_token_alone_gives_its_value(implementation):
    q, k, v = normal(0, 2, 4, 8), normal(1, 2, 2, 20, 8), normal(2, 2, 2, 20, 8)
    none = jnp.zeros((2, 2, 0), jnp.int32)
    attend = functools.partial(pk.masked_topk_decode_attention, implementation=implementation, return_residual=True)
    out, residual = attend(q, k, v, none)
    assert not out.any() and bool(jnp.all(residual == -jnp.inf))
    out, _ = attend(q, k, v, none, new_k=k[:, :, 0], new_v=v[:, :, 0])
    np.testing.assert_allclose(out.reshape(2, 2, 2, 8), jnp.broadcast_to(v[:, :, :1], (2, 2, 2, 8)), atol=1e-6)


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


# --- the whole ------------------------------------------------------------------------------------


@pytest.mark.parametrize("implementation", PLAIN)
def test_the_whole_is_its_parts_and_everything_chosen_is_dense(implementation):
    batch, heads, group, dim, size = 2, 2, 2, 16, 48
    q, k, v = normal(0, batch, heads * group, dim), *(normal(i, batch, heads, size, dim) for i in (1, 2))
    q_imp, keys = normal(3, batch, heads, group, 8), normal(4, batch, heads, 8, size)
    lengths = jnp.array([48, 29])
    out, chosen = run(
        pk.sparse_decode_attention, q, k, v, q_imp, keys, lengths, n=12, sinks=2, recent=3,
        return_selection=True, implementation=implementation,
    )  # fmt: skip
    scores = oracle_scores(q_imp, keys, lengths, "normalised")
    dense = run(pk.sparse_decode_attention, q, k, v, q_imp, keys, lengths, n=size, implementation=implementation)
    for b in range(batch):
        for h in range(heads):
            units = listed(chosen, b, h)
            assert units == oracle_choice(scores[b, h], int(lengths[b]), 12, 2, 3, 1)
            own = slice(h * group, (h + 1) * group)
            for found, tokens in ((out, units), (dense, list(range(int(lengths[b]))))):
                expected, _ = oracle_attention(wide(q)[b, own], wide(k)[b, h], wide(v)[b, h], tokens, dim**-0.5)
                np.testing.assert_allclose(found[b, own], expected, atol=1e-5)


def test_the_whole_computes_its_scores_once():
    """Not in every pass of the selection, which is what XLA made of lengths it knows: twice the work at this size."""
    size, n, lengths = 8192, 512, jnp.array([8192])
    shapes = dict(q=(1, 8, 64), k=(1, 2, size, 64), v=(1, 2, size, 64), q_imp=(1, 2, 4, 16), k_imp=(1, 2, 16, size))
    shapes = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}

    def flops(function, *names):
        return jax.jit(function).lower(*(shapes[name] for name in names)).compile().cost_analysis()["flops"]

    shapes |= dict(scores=jax.ShapeDtypeStruct((1, 2, size), jnp.float32))
    score = functools.partial(pk.importance_scores, lengths=lengths, pooling="maximum", implementation="xla")
    whole = functools.partial(
        pk.sparse_decode_attention, lengths=lengths, n=n, pooling="maximum", implementation="xla"
    )  # fmt: skip
    once = flops(score, "q_imp", "k_imp")
    select = flops(lambda s: pk.select_top_k(s, lengths, n, implementation="xla"), "scores")
    everything = flops(whole, "q", "k", "v", "q_imp", "k_imp")
    attend = 4 * 8 * n * 64
    # The compiler's count takes the one score that a condition looks at for all of them.
    assert everything < 2 * once + select + 1.5 * attend


@pytest.mark.slow
@settings(max_examples=30, deadline=None, derandomize=True, database=None)
@given(
    batch=st.integers(1, 2), heads=st.integers(1, 2), group=st.integers(1, 3), dim=st.sampled_from([3, 16]),
    size=st.integers(1, 40), unit=st.sampled_from([1, 2, 8]), seed=st.integers(0, 9), share=st.floats(0, 1),
)  # fmt: skip
def test_any_shape_chooses_and_attends_like_the_reference(batch, heads, group, dim, size, unit, seed, share):
    rng = np.random.default_rng(seed)
    lengths = jnp.asarray(rng.integers(0, size + 1, batch), jnp.int32)
    n = int(share * -(-size // unit))
    arrays = (
        normal(seed, batch, heads * group, dim), *(normal(seed + i, batch, heads, size, dim) for i in (1, 2)),
        normal(seed + 3, batch, heads, group, 4), normal(seed + 4, batch, heads, 4, size), lengths,
    )  # fmt: skip
    options = dict(n=n, sinks=int(rng.integers(0, 4)), recent=int(rng.integers(0, 5)), unit=unit,
                   return_residual=True, return_selection=True)  # fmt: skip
    ours, theirs = (
        run(pk.sparse_decode_attention, *arrays, implementation=name, **options) for name in ("xla", "reference")
    )
    np.testing.assert_array_equal(ours[2].indices, theirs[2].indices)
    np.testing.assert_array_equal(ours[2].valid, theirs[2].valid)
    np.testing.assert_allclose(ours[0], theirs[0], atol=1e-5)
    np.testing.assert_allclose(ours[1], theirs[1], atol=1e-5)


# --- bad input ------------------------------------------------------------------------------------


def whole(**changed):
    """A good call of the whole with some arguments changed, traced and not run."""
    arguments = dict(
        q=jnp.zeros((1, 4, 8)), k=jnp.zeros((1, 2, 32, 8)), v=jnp.zeros((1, 2, 32, 8)), q_imp=jnp.zeros((1, 2, 2, 4)),
        k_imp=jnp.zeros((1, 2, 4, 32)), lengths=jnp.array([5]), n=4,
    )  # fmt: skip
    return jax.eval_shape(lambda: pk.sparse_decode_attention(**(arguments | changed)))


@pytest.mark.parametrize(
    "changed, message",
    [
        (dict(sinks=1.5), "sinks must be a whole number, 0 or more, got 1.5"),
        (dict(recent=True), "recent must be a whole number, 0 or more, got True"),
        (dict(n=33), "n = 33 is more than the cache's 32 tokens; lower the budget to 32"),
        (dict(n=3, unit=16), "more than the cache's 2 units of 16 tokens"),
        (dict(n=-1), "n must be 0 or more"),
        (dict(n=2.5), "must be a static integer"),
        (dict(unit=3), "unit must be a power of two"),
        (dict(sinks=-1), "sinks must be a whole number, 0 or more"),
        (dict(pooling="mean"), "unknown pooling 'mean'; use one of normalised, maximum"),
        (dict(implementation="cuda"), "unknown implementation 'cuda'; use None or one of reference, xla, tpu, gpu"),
        (dict(implementation="tpu", unit=16, n=1), 'needs a TPU, the platform is cpu; use "xla"'),
        (dict(implementation="gpu"), 'needs a GPU, the platform is cpu; use "xla"'),
        (dict(implementation="tpu", interpret=True), "units of 16 tokens or more, got unit=1"),
        (dict(lengths=jnp.array([5, 5])), r"lengths must have shape \(1,\), got \(2,\)"),
        (dict(lengths=jnp.array([5.0])), "lengths must be integers"),
        (dict(k=jnp.zeros((1, 2, 31, 8))), "same number of tokens S"),
        (dict(v=jnp.zeros((1, 2, 32, 9))), "must have one shape"),
        (dict(q=jnp.zeros((1, 5, 8))), "5 query heads cannot share 2 KV heads"),
        (dict(q=jnp.zeros((1, 4, 9))), "k has head dimension 8 and q 9"),
        (dict(layer=0), "pass layer=|drop layer="),
        (dict(k_imp=jnp.zeros((1, 2, 4, 32), jnp.int8)), "int8 k_imp needs its scales"),
        (dict(new_k=jnp.zeros((1, 2, 8))), "come together or not at all"),
        (dict(counts=jnp.zeros((3,), jnp.int32)), "counts must have shape"),
    ],
)
def test_bad_input_says_what_is_wrong(changed, message):
    with pytest.raises(ValueError, match=message):
        whole(**changed)


def test_a_page_needs_lengths_and_the_tpu_whole_pages():
    k = jnp.zeros((1, 2, 40, 8))
    indices = jnp.zeros((1, 2, 1), jnp.int32)
    with pytest.raises(ValueError, match="need lengths"):
        pk.masked_topk_decode_attention(jnp.zeros((1, 4, 8)), k, k, indices, unit=16)
    with pytest.raises(ValueError, match="not a multiple of unit=16; raise the capacity to 48"):
        pk.masked_topk_decode_attention(
            jnp.zeros((1, 4, 8)), k, k, indices, unit=16, lengths=jnp.array([40]), implementation="tpu", interpret=True
        )
