"""The choice where scores are equal, infinite or NaN, and where there is nothing to choose from."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels as pk
from butler_jax.selection import Rows, SelectionConfig, room_for
from tests.edge_cases import INF, NAN, normal
from tests.marked import long, slow
from tests.pallas_kernels.definitions import KERNELS, PLAIN
from tests.selection.definitions import choose_by_scores, select

SPECIAL = [3.0, -INF, INF, NAN, 2.0, INF, 1.0, 2.0, -INF, NAN, 0.0, -1.0]


CHOICES = [  # scores, sinks, recent, tokens asked, tokens chosen
    ([0.5] * 12, 2, 3, 8, [0, 1, 2, 3, 4, 9, 10, 11]),
    ([-INF] * 12, 2, 3, 8, [0, 1, 2, 3, 4, 9, 10, 11]),
    ([NAN] * 12, 2, 3, 8, [0, 1, 2, 3, 4, 9, 10, 11]),
    (SPECIAL, 0, 1, 2, [2, 11]),
    (SPECIAL, 0, 1, 5, [0, 2, 4, 5, 11]),
    (SPECIAL, 0, 1, 10, [0, 1, 2, 3, 4, 5, 6, 7, 10, 11]),  # the earlier of -inf and NaN
    (SPECIAL, 0, 1, 12, range(12)),
    (SPECIAL, 9, 9, 12, range(12)),
    (SPECIAL, 0, 1, 1, [11]),
    ([7.0], 4, 8, 1, [0]),
]


@pytest.mark.parametrize("implementation", [long(None), *PLAIN, *map(slow, KERNELS)])
def test_special_scores_have_an_order(implementation):
    """Through `choose`, and by the kernels themselves; each case is worked out by hand."""
    for scores, sinks, recent, count, wanted in CHOICES:
        row = jnp.asarray(scores, jnp.float32)[None, None]
        lengths, config = jnp.asarray([len(scores)]), SelectionConfig(budget=1.0, sinks=sinks, recent=recent)
        if implementation in KERNELS:
            options = dict(sinks=sinks, recent=recent, implementation=implementation, interpret=True)
            chosen = jax.jit(partial(pk.select_top_k, n=count, **options))(row, lengths)
        else:
            pick = jax.jit(partial(choose_by_scores, room=count, config=config, implementation=implementation))
            chosen = pick(row, lengths, jnp.asarray([count]))
        indices, valid = (np.asarray(a)[0, 0] for a in chosen)
        assert indices[valid].tolist() == list(wanted), (scores, count)


@pytest.mark.parametrize(("scores", "sinks", "recent", "count", "wanted"), CHOICES)
def test_special_scores_have_the_same_order_in_a_whole_pass(scores, sinks, recent, count, wanted):
    size = len(scores)
    config = SelectionConfig(budget=max(count, sinks + recent), sinks=sinks, recent=recent)
    own = jnp.full((1, 1), size - 1)
    mask = select(
        jnp.asarray(scores, jnp.float32)[None, None, None],
        jnp.ones((1, 1, 1, size), bool),
        Rows(own, jnp.zeros_like(own)),
        config,
    )
    assert np.flatnonzero(mask).tolist() == list(wanted)


@pytest.mark.parametrize("length", [1, 2, 11, 12, 13])
@pytest.mark.parametrize("budget", [1e-9, 12, 64, 1.0])
def test_rows_up_to_sinks_and_window_attend_everything(length, budget):
    config = SelectionConfig(budget=budget)
    pick = partial(choose_by_scores, room=room_for(config, 16, 13), config=config)
    tokens = min(length, {12: 12, 1e-9: 12}.get(budget, 64))
    chosen = pick(normal(0, 1, 2, 16), jnp.asarray([length]), jnp.asarray([tokens]))
    assert np.asarray(chosen.valid).sum(axis=-1).tolist() == [[tokens] * 2]
