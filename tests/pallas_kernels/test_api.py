"""The three operations in one call."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import pallas_kernels as pk
from tests.pallas_kernels.definitions import (
    KERNELS,
    PLAIN,
    interpreted,
    listed,
    normal,
    oracle_attention,
    oracle_choice,
    oracle_scores,
    run,
    wide,
)


@pytest.mark.parametrize("implementation", [*PLAIN, *KERNELS])
def test_numpy_arrays_and_numbers_are_taken(implementation):
    """The numbers are static, and kernels are compiled for Python's own."""
    arrays = dict(q=normal(0, 1, 2, 16), k=normal(1, 1, 1, 64, 16), v=normal(2, 1, 1, 64, 16))
    arrays |= dict(q_imp=normal(3, 1, 1, 2, 8), k_imp=normal(4, 1, 1, 8, 64), lengths=jnp.asarray([60]))
    numbers = dict(n=2, sinks=1, recent=2, unit=16)
    how = dict(implementation=implementation, interpret=interpreted(implementation))
    wanted = pk.sparse_decode_attention(**arrays, **numbers, **how)
    arrays = {name: np.asarray(array) for name, array in arrays.items()}
    found = pk.sparse_decode_attention(**arrays, **{name: np.int64(n) for name, n in numbers.items()}, **how)
    np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize("implementation", PLAIN)
def test_the_whole_is_its_parts_and_everything_chosen_is_dense(implementation):
    batch, heads, group, dim, size = 2, 2, 2, 16, 48
    q, k, v = normal(0, batch, heads * group, dim), *(normal(i, batch, heads, size, dim) for i in (1, 2))
    q_imp, keys = normal(3, batch, heads, group, 8), normal(4, batch, heads, 8, size)
    lengths = jnp.array([48, 29])
    out, chosen = run(
        pk.sparse_decode_attention,
        q,
        k,
        v,
        q_imp,
        keys,
        lengths,
        n=12,
        sinks=2,
        recent=3,
        return_selection=True,
        implementation=implementation,
    )
    scores = oracle_scores(q_imp, keys, lengths - 3, "normalised", jnp.array([2, 2]))  # as in training
    dense = run(pk.sparse_decode_attention, q, k, v, q_imp, keys, lengths, n=size, implementation=implementation)
    for b in range(batch):
        for h in range(heads):
            units = listed(chosen, b, h)
            assert units == oracle_choice(scores[b, h], int(lengths[b]), 12, 2, 3, 1)
            own = slice(h * group, (h + 1) * group)
            for found, tokens in ((out, units), (dense, list(range(int(lengths[b]))))):
                expected, _ = oracle_attention(wide(q)[b, own], wide(k)[b, h], wide(v)[b, h], tokens, dim**-0.5)
                np.testing.assert_allclose(found[b, own], expected, atol=1e-5)


@pytest.mark.parametrize("implementation", (*PLAIN, *KERNELS))
def test_the_whole_chooses_as_a_decode_step_does(implementation):
    """With large keys of sinks and recent tokens, which log-sum-exps leave out, an offset, and units."""
    unit = 2 if implementation in PLAIN else 16
    q, k, v = normal(0, 2, 6, 16), normal(1, 2, 2, 192, 16), normal(2, 2, 2, 192, 16)
    q_imp, k_imp, offset = normal(3, 2, 2, 3, 8), normal(4, 2, 2, 8, 192), normal(5, 2, 2, 3)
    k_imp = k_imp.at[..., :3].mul(20).at[..., 126:].mul(20)
    how = dict(n=5, sinks=3, recent=5, unit=unit, offset=offset, implementation=implementation)
    lengths = jnp.array([131, 131])
    _, found = run(pk.sparse_decode_attention, q, k, v, q_imp, k_imp, lengths, return_selection=True, **how)
    wanted = run(pk.choose_by_importance, q_imp, k_imp, lengths, **how | dict(implementation="reference"))
    np.testing.assert_array_equal(found.indices, wanted.indices)


def test_the_whole_computes_its_scores_once():
    """Not in every pass of the selection, which is what XLA made of lengths it knows: twice the work at this size."""
    size, n, lengths = 8192, 512, jnp.array([8192])
    shapes = dict(q=(1, 8, 64), k=(1, 2, size, 64), v=(1, 2, size, 64), q_imp=(1, 2, 4, 16), k_imp=(1, 2, 16, size))
    shapes = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}

    def flops(function, *names):
        return jax.jit(function).lower(*(shapes[name] for name in names)).compile().cost_analysis()["flops"]

    shapes |= dict(scores=jax.ShapeDtypeStruct((1, 2, size), jnp.float32))
    score = functools.partial(pk.importance_scores, lengths=lengths, pooling="maximum", implementation="xla")
    whole = functools.partial(pk.sparse_decode_attention, lengths=lengths, n=n, pooling="maximum", implementation="xla")
    once = flops(score, "q_imp", "k_imp")
    select = flops(lambda s: pk.select_top_k(s, lengths, n, implementation="xla"), "scores")
    everything = flops(whole, "q", "k", "v", "q_imp", "k_imp")
    attend = 4 * 8 * n * 64
    # The compiler's count takes the one score that a condition looks at for all of them.
    assert everything < 2 * once + select + 1.5 * attend


@pytest.mark.slow
@settings(max_examples=30, deadline=None, derandomize=True, database=None)
@given(
    batch=st.integers(1, 2),
    heads=st.integers(1, 2),
    group=st.integers(1, 3),
    dim=st.sampled_from([3, 16]),
    size=st.integers(1, 40),
    unit=st.sampled_from([1, 2, 8]),
    seed=st.integers(0, 9),
    share=st.floats(0, 1),
)
def test_any_shape_chooses_and_attends_like_the_reference(batch, heads, group, dim, size, unit, seed, share):
    rng = np.random.default_rng(seed)
    lengths = jnp.asarray(rng.integers(0, size + 1, batch), jnp.int32)
    n = int(share * -(-size // unit))
    arrays = (
        normal(seed, batch, heads * group, dim),
        *(normal(seed + i, batch, heads, size, dim) for i in (1, 2)),
        normal(seed + 3, batch, heads, group, 4),
        normal(seed + 4, batch, heads, 4, size),
        lengths,
    )
    options = dict(
        n=n,
        sinks=int(rng.integers(0, 4)),
        recent=int(rng.integers(0, 5)),
        unit=unit,
        return_residual=True,
        return_selection=True,
    )
    ours, theirs = (
        run(pk.sparse_decode_attention, *arrays, implementation=name, **options) for name in ("xla", "reference")
    )
    np.testing.assert_array_equal(ours[2].indices, theirs[2].indices)
    np.testing.assert_array_equal(ours[2].valid, theirs[2].valid)
    np.testing.assert_allclose(ours[0], theirs[0], atol=1e-5)
    np.testing.assert_allclose(ours[1], theirs[1], atol=1e-5)
