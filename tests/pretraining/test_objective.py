"""The next-token loss against one token at a time in float64, and its gradient against finite differences."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from butler_jax.model.config import BaseConfig
from butler_jax.model.decoder import BaseModel, forward
from butler_jax.pretraining.objective import PretrainingObjective, next_token_loss

BASE = BaseConfig(
    family="llama", vocab_size=17, width=16, hidden=24, layers=2, heads=2, kv_heads=1, head_dim=8, context=16
)


@pytest.mark.slow
def test_tokens_after_the_first_of_their_document_count():
    model = BaseModel(BASE, jax.random.key(0))
    tokens = np.random.default_rng(0).integers(1, 17, (1, 10)).astype(np.int32)
    segments = np.asarray([[1, 1, 1, 1, 2, 2, 2, 3, 0, 0]], np.int32)
    positions = np.asarray([[0, 1, 2, 3, 0, 1, 2, 0, 0, 1]], np.int32)
    batch = {"tokens": jnp.asarray(tokens), "segments": jnp.asarray(segments), "positions": jnp.asarray(positions)}
    logits = np.asarray(forward(model, tokens, positions=positions, segments=segments), np.float64)[0]
    wanted = sum(np.log(np.exp(logits[at - 1]).sum()) - logits[at - 1, tokens[0, at]] for at in (1, 2, 3, 5, 6))
    loss, count = next_token_loss(model, batch)
    assert count == 5
    np.testing.assert_allclose(loss, wanted, rtol=1e-5)  # five float32 terms of a few nats

    objective = PretrainingObjective("float32")
    loss, count, gradient = objective.differentiate(model, None, batch)
    np.testing.assert_allclose((loss, count), (wanted, 5), rtol=1e-5)
    direction = jax.tree.map(lambda a: jnp.ones_like(a) * 1e-3, model.final_norm[...])
    ends = []
    for sign in (1, -1):
        moved = BaseModel(BASE, jax.random.key(0))
        moved.final_norm[...] = moved.final_norm[...] + sign * direction
        ends.append(float(next_token_loss(moved, batch)[0]))
    # A central difference over 2e-3: the loss of size 14 is exact to 1e-6, so the slope is to 1e-3.
    found = float(jnp.sum(gradient["final_norm"][...]))
    np.testing.assert_allclose(found, (ends[0] - ends[1]) / 2e-3, atol=5e-3)
