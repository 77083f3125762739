"""Decoding step by step gives the logits of one pass over the whole sequence."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from butler_jax.model.config import RopeConfig
from butler_jax.model.decoder import forward
from tests.decoding.ragged import LENGTHS, PROMPTS, decoded, model_of, rows_of


@pytest.mark.parametrize(
    "changes",
    [
        {"qkv_bias": True, "kv_heads": 1, "sliding_window": 5, "sliding_layers": (True, False) * 2},
        {
            "rope": RopeConfig(
                kind="longrope", original_context=16, short_factor=(1.0,) * 8, long_factor=(1.0, 2.0) * 4, factor=4.0
            )
        },
    ],
    ids=["bias and windows", "longrope"],
)
def test_decoding_step_by_step_equals_the_full_pass(changes):
    model, tokens = model_of(**changes), rows_of()
    border = model.config.rope.border or tokens.shape[1]  # beyond it, longrope has other factors
    full = np.asarray(jax.jit(forward)(model, jnp.asarray(tokens[:, :border])))
    logits, _ = decoded(model, tokens)
    assert len(logits) == sum(LENGTHS) - sum(PROMPTS) + len(PROMPTS)
    for (b, t), found in logits.items():
        if t >= border:
            continue
        # float32 sums in another order; logits are about 1
        np.testing.assert_allclose(found, full[b, t], atol=2e-5)
