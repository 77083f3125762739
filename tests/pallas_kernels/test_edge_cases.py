"""Kernels of empty rows, and of numbers that are not finite."""

from __future__ import annotations

from functools import partial

import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels as pk
from tests.edge_cases import INF, NAN, normal
from tests.marked import slow
from tests.pallas_kernels.definitions import KERNELS, PLAIN, run


@pytest.mark.parametrize("implementation", [*PLAIN, *map(slow, KERNELS)])
def test_empty_rows_and_budgets_choose_nothing(implementation):
    scores, lengths = normal(0, 3, 2, 20), jnp.asarray([20, 0, 1])
    pick = partial(run, pk.select_top_k, scores, lengths, implementation=implementation, sinks=4, recent=8)
    assert np.asarray(pick(n=20).valid).sum(axis=-1).tolist() == [[20, 20], [0, 0], [1, 1]]
    assert not np.asarray(pick(n=20, counts=jnp.asarray([0, 5, 0])).valid).any()
    assert pick(n=0).indices.shape == (3, 2, 0)
    newest = pick(n=1)  # of a budget below sinks and recent, the newest
    assert np.asarray(newest.indices)[[0, 2], :, 0].tolist() == [[19, 19], [0, 0]]


@pytest.mark.parametrize("implementation", [*PLAIN, *KERNELS])
@pytest.mark.parametrize("pooling", ["maximum", "normalised"])
def test_a_product_that_is_no_number_is_last_and_infinity_first(implementation, pooling):
    q, keys = jnp.abs(normal(0, 1, 1, 2, 4)) + 0.1, normal(1, 1, 1, 4, 9)
    score = partial(run, pk.importance_scores, implementation=implementation, pooling=pooling)
    found = np.asarray(score(q, keys.at[0, 0, 1, 3].set(NAN), jnp.asarray([9])))[0, 0]
    others = np.delete(np.arange(9), 3)
    alone = np.asarray(score(q, keys[..., others], jnp.asarray([8])))[0, 0]
    assert found[3] == -INF
    np.testing.assert_allclose(found[others], alone, atol=1e-5)  # the others as if it were not there; float32 sums
    q, keys = q[..., :1], keys[:, :, :1]  # of rank 1: no sums, which matrix products take in ways that make NaN of inf
    found = np.asarray(score(q, keys.at[0, 0, 0, 3].set(INF), jnp.asarray([9])))[0, 0]
    assert found[3] == INF and np.isfinite(found[others]).all()
    assert (np.asarray(score(q, jnp.full_like(keys, -INF), jnp.asarray([9]))) == -INF).all()


@pytest.mark.parametrize("implementation", [*PLAIN, *KERNELS])
def test_a_row_of_length_0_has_no_scores_and_leaves_the_others_alone(implementation):
    q, keys = normal(0, 2, 2, 2, 4), normal(1, 2, 2, 4, 1)
    found = np.asarray(run(pk.importance_scores, q, keys, jnp.asarray([0, 1]), implementation=implementation))
    assert (found[0] == -INF).all()
    np.testing.assert_allclose(found[1], 0, atol=1e-6)  # one token: its own log-sum-exp off


@pytest.mark.parametrize("implementation", [*PLAIN, *map(slow, KERNELS)])
def test_decode_attention_of_logits_that_are_not_finite(implementation):
    k, v = jnp.abs(normal(1, 3, 1, 16, 16)) + 0.1, normal(2, 3, 1, 16, 16)
    q = jnp.ones((3, 1, 16)).at[0].set(-1e34).at[1].set(3e38)  # as good as -inf, +inf, ordinary
    pages = jnp.zeros((3, 1, 1), jnp.int32), jnp.ones((3, 1, 1), bool)
    attend = partial(
        run,
        pk.masked_topk_decode_attention,
        q,
        9 * k,
        v,
        *pages,
        implementation=implementation,
        unit=16,
        return_residual=True,
        scale=1.0,
    )
    out, residual = map(np.asarray, attend(lengths=jnp.asarray([16, 16, 16])))
    assert not out[0].any() and residual[0] == -INF
    assert np.isnan(out[1]).all() and np.isnan(residual[1]).all()
    logits = np.asarray(9 * k, np.float64)[2, 0].sum(axis=-1)
    weights = np.exp(logits - logits.max())
    np.testing.assert_allclose(out[2, 0], weights @ np.asarray(v, np.float64)[2, 0] / weights.sum(), atol=1e-5)
    out, residual = map(np.asarray, attend(lengths=jnp.asarray([0, 0, 0])))
    assert not out.any() and (residual == -INF).all()
