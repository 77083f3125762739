"""Scores in the principal directions of the keys, against an eigendecomposition in numpy."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from butler_jax.model.config import BaseConfig
from butler_jax.model.decoder import BaseModel, dense_mixer, embed, run_layers
from butler_jax.policies import make_policy


def test_batches_are_a_list():
    with pytest.raises(ValueError, match=r"batches must be a list of batches such as \[batch\], got a list_iterator"):
        make_policy("lowrank").prepare(None, iter([]))


def test_lowrank_scores_in_the_principal_directions_of_the_keys(chunk):
    config = BaseConfig(
        family="llama", vocab_size=61, width=32, hidden=48, layers=4, heads=6, kv_heads=2, head_dim=8, context=64
    )
    model = BaseModel(config, jax.random.key(0))
    tokens = np.random.default_rng(0).integers(1, 61, (2, 40)).astype(np.int32)
    segments = np.ones_like(tokens)
    segments[1, 30:] = 0
    batch = {"tokens": tokens, "segments": segments, "positions": np.arange(40, dtype=np.int32)[None] + 0 * tokens}
    policy = make_policy("lowrank", rank=3).prepare(model, [batch])
    kept = []

    def mixer(state, view):
        return dense_mixer(config, jnp.asarray(segments))(None, view)[0], state, view.k

    x = embed(model, jnp.asarray(tokens))
    keys = np.asarray(run_layers(model, x, jnp.asarray(batch["positions"]), mixer, None)[2], np.float64)
    for layer, head in np.ndindex(4, 2):
        own = keys[layer, :, :, head][segments > 0]
        values, vectors = np.linalg.eigh(np.cov(own.T, bias=True))
        basis = vectors[:, ::-1][:, :3]
        found = policy.directions[layer, head]
        np.testing.assert_allclose(found @ found.T, basis @ basis.T, atol=1e-3)  # the same space; float32 sums
        kept.append(values[::-1][:3].sum() / values.sum())
    assert min(kept) > 3 / 8
    basis = np.float64(policy.directions[3])
    q, k = (np.einsum(f"bk{g}cd,kdr->bk{g}cr", a, basis) for g, a in (("g", np.asarray(chunk.q)), ("", chunk.k)))
    np.testing.assert_allclose(policy.scores(chunk), np.einsum("bkgcr,bksr->bkgcs", q, k), atol=1e-5)
    whole = make_policy("lowrank", rank=8).prepare(model, [batch])
    np.testing.assert_allclose(whole.scores(chunk), chunk.logits, atol=1e-4)  # all directions: the true logits
    assert whole != policy and len({whole, policy}) == 2 and make_policy("lowrank").prepare(model, [batch]).rank == 2
    with pytest.raises(ValueError, match=r"rank of lowrank must be 1 \.\.\. 8, the head dimension, got 9"):
        make_policy("lowrank", rank=9).prepare(model, [batch])
