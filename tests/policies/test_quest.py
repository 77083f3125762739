"""The bounds of a page against its keys."""

from __future__ import annotations

import numpy as np
import pytest

from butler_jax.policies import make_policy
from butler_jax.selection.config import SelectionConfig
from tests.policies.chunks import B, C


@pytest.mark.parametrize("page", [1, 4, 16])
def test_quest_bounds_every_logit_of_a_page_and_no_later_key(chunk, page):
    """The bound is that of the keys of the page up to the row, and no logit among them is above it."""
    scores = np.asarray(make_policy("quest", page=page).scores(chunk))
    q, k, logits = (np.asarray(a, np.float64) for a in (chunk.q, chunk.k, chunk.logits))
    for b, c in np.ndindex(B, C):
        own, start = int(chunk.rows.own[b, c]), int(chunk.rows.start[b, c])
        for s in range(start, own + 1):
            first = s - (s - start) % page
            keys = k[b, :, first : min(first + page, own + 1)]
            wanted = np.maximum(q[b, :, :, c] * keys.min(1)[:, None], q[b, :, :, c] * keys.max(1)[:, None]).sum(-1)
            np.testing.assert_allclose(scores[b, :, :, c, s], wanted, atol=1e-5)  # sums of 8 products of size 1
            assert (scores[b, :, :, c, s] >= logits[b, :, :, c, s] - 1e-5).all()


def test_quest_chooses_its_pages_whole():
    config = make_policy("quest", page=8).selection(SelectionConfig(budget=0.5, unit=1))
    assert config == SelectionConfig(budget=0.5, unit=8)
    with pytest.raises(ValueError, match="page of quest must be a power of two"):
        make_policy("quest", page=12)
