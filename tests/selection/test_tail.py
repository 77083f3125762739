"""The tail against a float64 form with loops."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from butler_jax.model import PartialAttention
from butler_jax.policies import make_policy
from butler_jax.selection import SelectionConfig
from butler_jax.selection.masks import Rows
from butler_jax.selection.tail import TailSpans, attend_spans

SIZE, SOFTCAP = 4, 2.0


def starts_of() -> np.ndarray:
    """Where the documents begin of two sequences of 26 tokens: 0, 12 and 19; 0, 3 and 22."""
    found = np.zeros((2, 26), np.int32)
    found[0, 12:], found[0, 19:], found[1, 3:], found[1, 22:] = 12, 19, 3, 22
    return found


def naive(q, k, v, mask, starts, own, first):
    """Attention of a row over the unread keys of spans, and its log-sum-exp."""
    logits, values = [], []
    for begin in range(starts[own], own, SIZE):
        span = np.arange(begin, begin + SIZE)
        unread = int((~mask[span]).sum()) if span[-1] < own and begin >= first else 0
        if unread:
            logit = SOFTCAP * np.tanh(q @ k[span].mean(axis=0) / SOFTCAP)
            logits.append(logit + np.log(unread))
            values.append(v[span].mean(axis=0))
    if not logits:
        return np.zeros(v.shape[-1]), -np.inf
    weights = np.exp(logits)
    return weights @ np.asarray(values) / weights.sum(), np.log(weights.sum())


@pytest.mark.parametrize("window", [None, 11])
def test_the_tail_is_the_attention_over_means_of_unread_keys(window):
    random = np.random.default_rng(0)
    starts, (batch, size), heads, group, dim = starts_of(), (2, 26), 2, 2, 8
    own = np.tile(np.arange(10, 26), (batch, 1))  # the last rows of the sequences
    q = random.normal(size=(batch, heads, group, own.shape[1], dim))
    k, v = random.normal(size=(2, batch, heads, size, dim))
    first = np.take_along_axis(starts, own, axis=1)
    low = first if window is None else np.maximum(first, own - window + 1)
    columns = np.arange(size)
    allowed = (columns <= own[..., None]) & (columns >= low[..., None])
    mask = allowed[:, None] & (random.random((batch, heads * group, own.shape[1], size)) < 0.4)
    spans = TailSpans.find(jnp.asarray(columns), jnp.asarray(starts), SIZE)
    rows = Rows(jnp.asarray(own), jnp.asarray(first))
    unread = spans.unread(jnp.asarray(mask), jnp.asarray(allowed), rows, jnp.asarray(columns))
    means = (spans.means(jnp.asarray(np.float32(a))) for a in (k, v))
    unread = unread.reshape(batch, heads, group, *unread.shape[2:])
    found = attend_spans(jnp.asarray(np.float32(q)), *means, unread, SOFTCAP)
    empty = 0
    for b, h, g, c in np.ndindex(*q.shape[:4]):
        of_head = mask[b, h * group + g, c]
        wanted, total = naive(q[b, h, g, c], k[b, h], v[b, h], of_head, starts[b], own[b, c], low[b, c])
        np.testing.assert_allclose(found.output[b, h, g, c], wanted, atol=2e-6)
        np.testing.assert_allclose(found.lse[b, h, g, c], total, atol=2e-6)
        empty += np.isneginf(total)
    assert 0 < empty < q[..., 0].size / 2


def test_both_sets_of_keys_share_one_softmax():
    random = np.random.default_rng(1)
    logits, values = random.normal(size=9), random.normal(size=(9, 3))
    weights = np.exp(logits)
    parts = []
    for part in (slice(4), slice(4, 9)):
        output, total = weights[part] @ values[part] / weights[part].sum(), weights[part].sum()
        parts.append(PartialAttention(jnp.asarray(np.float32(output)), jnp.asarray(np.float32(np.log(total)))))
    read, others = parts
    np.testing.assert_allclose(read.merge(others).output, weights @ values / weights.sum(), atol=1e-6)
    nothing = PartialAttention(jnp.zeros(3), jnp.asarray(-jnp.inf))
    found = nothing.merge(read)
    np.testing.assert_allclose(found.output, read.output, rtol=1e-6)
    np.testing.assert_allclose(found.lse, read.lse, rtol=1e-6)
    assert nothing.merge(nothing).lse == -jnp.inf and not nothing.merge(nothing).output.any()


def test_settings_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="the tail must be a multiple of the unit 16, got 24"):
        SelectionConfig(unit=16, tail=24)
    with pytest.raises(ValueError, match="tail must be at least 0, got -1"):
        SelectionConfig(tail=-1)
    selection = SelectionConfig(tail=64)
    assert dataclasses.replace(selection, budget=0.1).rule.tail == 64
    with pytest.raises(ValueError, match="the policy h2o keeps nothing of what it drops: leave out the tail"):
        make_policy("h2o").selection(selection)
