"""The forms that benchmarks/kvpress.py compares, against formulas in numpy; kvpress itself is not needed."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.kvpress import overlap, steps
from benchmarks.kvpress_forms import H2OLike, SnapKVLike, dense_prompt, follow, once
from butler_jax.model.config import BaseConfig
from butler_jax.model.decoder import BaseModel, forward

B, T, K = 2, 40, 2


def weights(seed=0):
    """Causal attention summed over a group of 3 [B, T, K, T], float64."""
    logits = np.random.default_rng(seed).normal(size=(B, T, K, 3, T))
    seen = np.where(np.tri(T, dtype=bool)[None, :, None, None], np.exp(logits), 0.0)
    return (seen / seen.sum(-1, keepdims=True)).sum(3)


def pooled(sums, reduce, size):
    side = size // 2
    return np.stack([reduce(sums[..., max(0, t - side) : t + side + 1]) for t in range(sums.shape[-1])], axis=-1)


def best(worth, count, forced):
    """The forced tokens and the best of the others, of equals the newer, [B, K, T]."""
    order = np.argsort(np.where(forced, np.inf, worth), axis=-1, kind="stable")[..., -count:]
    kept = np.zeros(worth.shape, bool)
    np.put_along_axis(kept, order, True, axis=-1)
    return kept


def snapkv(w, count):
    sums = w[:, -6:].sum(1)
    return best(pooled(sums, lambda a: a.max(-1), 3), count, np.arange(T) >= T - min(6, count // 2))


def snapkv_of_kvpress(w, count):
    sums = w[:, -6:, :, :-6].sum(1)
    worth = pooled(sums, lambda a: a.sum(-1) / 3, 3)
    return best(np.pad(worth, ((0, 0), (0, 0), (0, 6)), constant_values=np.inf), count, False)


def h2o(w, count):
    return best(w.sum(1), count, np.arange(T) >= T - count // 2)


def observed_of_kvpress(w, count):
    return best(w.sum(1) / np.arange(T, 0, -1), count, False)


SMALL = dict(observed=6, pool=3)
CASES = {
    "snapkv": (SnapKVLike(**SMALL), snapkv),
    "snapkv, all switches": (SnapKVLike(**SMALL, whole=True, outside=True, mean=True), snapkv_of_kvpress),
    "h2o": (H2OLike(), h2o),
    "h2o, all switches": (H2OLike(free=True, mean=True), observed_of_kvpress),
}


@pytest.mark.parametrize("name", CASES)
def test_one_cut_keeps_the_tokens_of_the_formula(name):
    policy, formula = CASES[name]
    w = weights()
    for count in (20, 9):
        kept = once(policy, jnp.asarray(w, jnp.float32), jnp.full(B, count, jnp.int32), 0, 0)
        np.testing.assert_array_equal(np.asarray(kept), formula(w, count))


def test_sinks_and_window_stay():
    kept = once(H2OLike(free=True), jnp.asarray(weights(), jnp.float32), jnp.full(B, 9, jnp.int32), 3, 2)
    assert kept[..., :3].all() and kept[..., -2:].all() and (kept.sum(-1) == 9).all()


@pytest.mark.slow
def test_a_prompt_kept_whole_is_followed_densely_and_a_token_dropped_is_not_read():
    config = BaseConfig(
        family="llama", vocab_size=61, width=24, hidden=32, layers=2, heads=6, kv_heads=2, head_dim=8, context=64
    )
    model = BaseModel(config, jax.random.key(0))
    tokens = np.random.default_rng(1).integers(0, 61, (B, T)).astype(np.int32)
    prompt = dense_prompt(model, jnp.asarray(tokens[:, :25]))
    kept = jnp.ones((2, B, K, 25), bool)
    nll = follow(model, prompt, kept, jnp.asarray(tokens[:, 25:]))
    logits = np.asarray(forward(model, jnp.asarray(tokens)), np.float64)[:, 25:-1]
    wanted = np.log(np.exp(logits).sum(-1)) - np.take_along_axis(logits, tokens[:, 26:, None], -1)[..., 0]
    np.testing.assert_allclose(np.asarray(nll), wanted, atol=1e-4)  # float32 passes in two orders of sums

    kept = kept.at[..., 7].set(False)
    dropped = follow(model, prompt, kept, jnp.asarray(tokens[:, 25:]))
    other = prompt._replace(k=prompt.k.at[:, :, 7].add(3.0), v=prompt.v.at[:, :, 7].add(3.0))
    np.testing.assert_array_equal(np.asarray(follow(model, other, kept, jnp.asarray(tokens[:, 25:]))), dropped)
    assert np.abs(np.asarray(dropped) - np.asarray(nll)).max() > 1e-4


def test_overlap_leaves_out_layer_0_and_refuses_sets_of_different_sizes():
    mine, theirs = np.zeros((2, 2, 1, 1, 8), bool)
    mine[1, ..., :4], theirs[1, ..., 2:6], theirs[0] = True, True, True
    assert overlap(mine, theirs).value == 0.5
    theirs[1, ..., 7] = True
    with pytest.raises(ValueError, match=r"4.0 tokens are kept, and 5.0 by kvpress"):
        overlap(mine, theirs)


def test_the_last_line_of_every_policy_is_kvpress_s_definition():
    last = {name: lines[-1] for name, lines in steps().items()}
    assert last["snapkv"].policy == SnapKVLike(observed=64, pool=5, whole=True, outside=True, mean=True)
    assert last["h2o"].policy == H2OLike(free=True, mean=True)
    assert all(line.first and line.evaluated for line in last.values())
    assert last["snapkv"].always == last["h2o"].always == (0, 0)
