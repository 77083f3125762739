"""The choice of units, whatever makes it, against Python's sort."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels as pk
from pallas_kernels import top_mask
from tests.marked import long, slow
from tests.pallas_kernels.definitions import KERNELS, PLAIN, check_choice, normal, run


@pytest.mark.parametrize("size", [37, 4500])  # without a sample, and with one
def test_a_mask_is_that_of_a_sort(size):
    scores = jnp.round(normal(11, 2, 3, 2, size) * 50) / 50
    count = jnp.asarray(np.random.default_rng(12).integers(0, size + 1, (2, 3, 2)), jnp.int32)
    mask = np.asarray(jax.jit(pk.top_mask)(pk.ordered_image(scores), count))
    rank = np.argsort(np.argsort(-np.asarray(scores), axis=-1, kind="stable"), axis=-1)
    np.testing.assert_array_equal(mask, rank < np.asarray(count)[..., None])


def test_ties_go_to_the_earlier_token():
    image = jnp.asarray([[5, 7, 5, 5, 1, 5]], jnp.int32)
    for count, wanted in ((0, []), (1, [1]), (2, [0, 1]), (4, [0, 1, 2, 3]), (6, range(6))):
        mask = pk.top_mask(image, jnp.asarray([count]))
        assert list(np.flatnonzero(mask[0])) == list(wanted)


@pytest.mark.parametrize("implementation", PLAIN)
@pytest.mark.parametrize("unit", [long(1), 4])
def test_the_choice_is_the_best_by_score_with_sinks_and_recent_first(implementation, unit):
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


@pytest.mark.parametrize(
    ("implementation", "size"),
    [
        ("xla", 131_073),  # a sample of it does not fill its columns
        slow("gpu", 131_073),
        slow("tpu", 131_073),
        slow("tpu", 262_145),  # XLA's selection
        slow("xla", 999_999),
        *(long("xla", size) for size in (131_071, 140_000, 262_145)),
        *(long(name, 999_999) for name in ("reference", "gpu")),
    ],
)
def test_any_size_is_taken(implementation, size):
    scores = normal(size, 1, 1, size)
    scores = scores.at[0, 0, -2].set(9.0)  # the best is near the end
    found = run(pk.select_top_k, scores, jnp.array([size]), n=600, implementation=implementation)
    best = np.argsort(-np.asarray(scores)[0, 0], kind="stable")[:600]
    np.testing.assert_array_equal(found.indices[0, 0], np.sort(best))


@pytest.mark.parametrize("implementation", ["xla", long("reference"), *map(slow, KERNELS)])
def test_a_planted_key_is_found_among_262144_and_ties_go_to_the_earlier(implementation):
    """One key lies along the query, four have the same score below it, and all others are nearly orthogonal."""
    size, place, equal = 262_144, 201_357, [7, 99_999, 150_000, 262_000]
    q_imp, k_imp = normal(6, 1, 1, 1, 8), 0.1 * normal(7, 1, 1, 8, size)
    k_imp = k_imp.at[..., place].set(4 * q_imp[:, :, 0])
    k_imp = k_imp.at[..., jnp.asarray(equal)].set(2 * q_imp[:, :, 0, :, None])
    lengths = jnp.asarray([size])
    scores = run(pk.importance_scores, q_imp, k_imp, lengths, pooling="maximum", implementation=implementation)
    for n, wanted in ((1, [place]), (3, [7, 99_999, place]), (4, [7, 99_999, 150_000, place])):
        found = run(pk.select_top_k, scores, lengths, n=4, counts=jnp.asarray([n]), implementation=implementation)
        assert found.indices[0, 0, :n].tolist() == wanted and int(found.valid.sum()) == n


@pytest.mark.parametrize("implementation", KERNELS)
def test_selection_kernels_choose_the_best(implementation):
    scores = jnp.round(normal(5, 1, 2, 300) * 4) / 4  # with ties
    check_choice(implementation, scores, jnp.array([290]), n=40, sinks=3, recent=5, counts=jnp.array([[40, 7]]))


@pytest.mark.parametrize("implementation", PLAIN)
def test_nothing_is_below_a_threshold_that_is_nan(implementation):
    found = run(
        pk.select_top_k,
        normal(0, 1, 1, 20),
        jnp.array([20]),
        n=5,
        threshold=jnp.array([jnp.nan]),
        implementation=implementation,
    )
    assert found.valid.all()


@pytest.mark.slow
def test_columns_of_more_entries_than_int16_counts_are_counted():
    image = jnp.asarray(np.random.default_rng(0).integers(0, 2**31 - 2, (1, 2**23), np.int32))
    assert int(jnp.sum(jax.jit(top_mask)(image, jnp.array([2**23 - 1000])))) == 2**23 - 1000
