"""The bracket closes around the threshold of a row, whatever the images are, in few trials."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.bench.assumptions import Assumptions
from pallas_kernels.choice import BARRED, TOP, ordered_image
from pallas_kernels.threshold import close_bracket, span_bracket

UNITS = 32768


def pooled_scores(pooling: str, seed: int = 0) -> np.ndarray:
    """Normal scores of four query heads, pooled."""
    scores = np.random.default_rng(seed).normal(size=(4, UNITS))
    if pooling == "normalised":
        scores -= np.log(np.sum(np.exp(scores), axis=1, keepdims=True))
    return np.max(scores, axis=0)


@jax.jit
def search(image, target, slack=0):
    return close_bracket(lambda trial: jnp.sum(image >= trial), span_bracket(image, target), target, slack=slack)


def images() -> dict[str, np.ndarray]:
    scores = pooled_scores("normalised")
    plain = np.asarray(ordered_image(jnp.asarray(scores, jnp.float32)))
    marked, barred, infinite, both = plain.copy(), plain.copy(), scores.copy(), pooled_scores("maximum")
    marked[:12] = TOP - np.arange(12)
    barred[::3] = BARRED
    infinite[::5], infinite[7] = -np.inf, np.inf
    ties, zeros = np.round(scores), np.zeros(UNITS)
    others = dict(ties=ties, zeros=zeros, infinite=infinite, both_signs=both - np.mean(both))
    others = {name: np.asarray(ordered_image(jnp.asarray(one, jnp.float32))) for name, one in others.items()}
    return dict(plain=plain, marked=marked, barred=barred) | others


@pytest.mark.parametrize("target", [0, 1, 5, 12, 13, 2048, 20000])
def test_the_threshold_is_that_of_a_sort(target):
    for name, image in images().items():
        found = search(image, jnp.int32(target))
        limit, high = int(found.low), int(found.high)
        assert int(found.reached) == np.sum(image >= limit) * (target > 0), name
        if target == 0:
            assert limit == TOP, name
        elif np.sum(image >= limit) != target:  # ties: one more step would lose some that are wanted
            assert limit == np.sort(image)[-target] and high == limit + 1, name


def test_all_that_may_be_chosen_are_found():
    for name, image in images().items():
        held = int(np.sum(image > BARRED))
        assert int(search(image, jnp.int32(held)).low) == np.min(image[image > BARRED]), name


def test_a_slack_is_kept():
    for name, image in images().items():
        found = search(image, jnp.int32(2000), jnp.int32(100))
        reached = np.sum(image >= int(found.low))
        assert 2000 <= reached <= 2100 or name in ("ties", "zeros"), name


@pytest.mark.parametrize("pooling", ["normalised", "maximum"])
def test_a_search_takes_as_many_trials_as_the_model_assumes(pooling):
    rows = [ordered_image(jnp.asarray(pooled_scores(pooling, seed), jnp.float32)) for seed in range(12)]
    trials = [int(search(row, jnp.int32(UNITS // 16)).trials) for row in rows]
    assert np.mean(trials) == pytest.approx(Assumptions().values()["trials"], abs=1.5) and max(trials) < 20
