"""Heads that share their reads, against sorting in Python."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from butler_jax.selection import SelectionConfig, share_counts
from butler_jax.selection.allocation import allocate
from pallas_kernels import BARRED, ordered_image
from tests.selection.definitions import choose_by_scores


def shared_choice(scores, barred, counts, floor):
    """{(head, unit)} of one row, by sorting all heads together."""
    heads, units = scores.shape
    order = sorted(
        ((k, u) for k in range(heads) for u in range(units) if not barred[k, u]),
        key=lambda place: (-scores[place], place),
    )
    own = {
        k: [u for head, u in order if head == k][: int(np.ceil(np.float32(floor) * counts[k]))] for k in range(heads)
    }
    first = [place for place in order if place[1] in own[place[0]]]
    rest = [place for place in order if place not in first]
    return set((first + rest)[: int(counts.sum())])


@pytest.mark.slow
@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from([(1, 7), (2, 1), (4, 40)]), st.sampled_from([0.0, 0.2, 1.0]))
def test_heads_share_the_sum_of_their_counts(seed, shape, floor):
    heads, units = shape
    random = np.random.default_rng(seed)
    scores = random.integers(-3, 4, (heads, units)).astype(np.float32)  # many are equal
    barred = random.random((heads, units)) < 0.2
    counts = np.minimum(random.integers(0, units + 1, heads), (~barred).sum(axis=1)).astype(np.int32)
    image = jnp.where(jnp.asarray(barred), BARRED, ordered_image(jnp.asarray(scores)))[None]
    config = SelectionConfig(allocation="per_layer", floor=floor)
    found = np.asarray(allocate(image, jnp.asarray(counts)[None], config))[0]
    assert set(map(tuple, np.argwhere(found))) == shared_choice(scores, barred, counts, floor)


@pytest.mark.slow
@pytest.mark.parametrize("unit", [1, 4])
def test_decoding_reads_as_many_units_in_all_as_separate_heads_would(unit):
    scores = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, 64)), jnp.float32)
    lengths, tokens = jnp.asarray([64, 30]), jnp.asarray([16, 10])
    config = SelectionConfig(sinks=2, recent=3, unit=unit, allocation="per_layer")
    counts = share_counts(scores, lengths, tokens, config)
    each = choose_by_scores(scores, lengths, tokens, 64 // unit, SelectionConfig(sinks=2, recent=3, unit=unit))
    np.testing.assert_array_equal(counts.sum(axis=1), each.valid.sum(axis=(1, 2)))
    assert (np.ptp(np.asarray(counts), axis=1) > 0).any()
    shared = choose_by_scores(scores, lengths, tokens, 64 // unit, config, counts=counts)
    np.testing.assert_array_equal(shared.valid.sum(axis=2), counts)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (dict(allocation="by_luck"), "unknown allocation 'by_luck'; known: per_head, per_layer, tolerance, top_p"),
        (dict(tolerance=0.1), "a tolerance goes with the allocations tolerance and top_p, the allocation is per_head"),
        (dict(allocation="tolerance", tolerance=-1.0), "must be at least 0"),
        (dict(allocation="per_layer", floor=1.5), "floor is a share"),
        (dict(allocation="per_layer", threshold=((0.0,),)), "thresholds go with the allocation per_head"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        SelectionConfig(**given)
