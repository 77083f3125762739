"""The choice of the newest token of each row, page by page, against a form in Python."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from butler_jax.selection import SelectionConfig, budget_table, room_for
from tests.selection.definitions import CASES, IDS, choose_by_scores, paged_choice


@pytest.mark.parametrize("fields", CASES, ids=IDS)
@pytest.mark.parametrize("sliding", [None, 11])
def test_pages_thresholds_and_neighbours_equal_form_in_python(fields, sliding):
    config, S = SelectionConfig(**fields), 37
    random = np.random.default_rng(3)
    lengths = np.arange(1, S + 1, dtype=np.int32)
    scores = (random.integers(-6, 7, (S, 2, S)) / 7).astype(np.float32)  # many ties
    first = np.zeros_like(lengths) if sliding is None else np.maximum(lengths - sliding, 0)
    table = budget_table(config, S)
    tokens = table[lengths - first]
    threshold = None if config.threshold is None else jnp.asarray([config.threshold[1]] * S)
    room = room_for(config, S, int(tokens.max()))
    pick = jax.jit(choose_by_scores, static_argnames=("room", "config"))
    indices, valid = map(np.asarray, pick(scores, lengths, tokens, room, config, threshold=threshold, first=first))
    for row, head in np.ndindex(S, 2):
        limit = None if config.threshold is None else config.threshold[1][head]
        wanted = paged_choice(scores[row, head], lengths[row], tokens[row], config, limit, first[row])
        assert len(wanted) <= max(tokens[row], 1)
        units = indices[row, head][valid[row, head]]
        assert (np.diff(units) > 0).all() and not indices[row, head][~valid[row, head]].any()
        own = {j for u in units for j in range(u * config.unit, (u + 1) * config.unit)}
        assert own & set(range(first[row], lengths[row])) == wanted


@pytest.mark.parametrize("implementation", ["reference", "xla"])
@pytest.mark.parametrize("sliding", [None, 11])
@pytest.mark.parametrize("fields", [dict(), dict(unit=4), dict(unit=2, threshold=((0.0, 0.0), (0.3, -0.5)))])
def test_implementations_choose_the_same(fields, sliding, implementation):
    config, S = SelectionConfig(budget=0.5, sinks=2, recent=5, **fields), 40
    random = np.random.default_rng(1)
    lengths = np.asarray([40, 1, 17, 23, 5, 32], np.int32)
    scores = jnp.asarray((random.integers(-3, 4, (6, 2, S)) / 7).astype(np.float32))
    first = None if sliding is None else jnp.asarray(np.maximum(lengths - sliding, 0))
    tokens = jnp.asarray(budget_table(config, S)[lengths - (0 if first is None else np.asarray(first))])
    threshold = None if config.threshold is None else jnp.asarray([config.threshold[1]] * 6)
    room = room_for(config, S, 20)
    options = dict(threshold=threshold, first=first, implementation=implementation)
    indices, valid = map(np.asarray, choose_by_scores(scores, jnp.asarray(lengths), tokens, room, config, **options))
    for row, head in np.ndindex(6, 2):
        start = 0 if first is None else int(first[row])
        limit = None if threshold is None else config.threshold[1][head]
        wanted = paged_choice(np.asarray(scores)[row, head], lengths[row], int(tokens[row]), config, limit, start)
        units = indices[row, head][valid[row, head]]
        assert (np.diff(units) > 0).all() and not indices[row, head][~valid[row, head]].any()
        own = {j for u in units for j in range(u * config.unit, (u + 1) * config.unit)}
        assert own & set(range(start, lengths[row])) == wanted
