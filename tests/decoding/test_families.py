"""Every family is decoded, token by token after a prompt in chunks, to the logits of transformers."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from butler_jax.decoding import decode_step, prefill
from butler_jax.weights import load_base
from tests import reference_models
from tests.marked import long, slow

PROMPT, TOTAL = 9, 20
LONG = ("gemma2", "gemma3", "olmo2", "olmo3", "smollm3", "granite", "mixtral", "qwen3_moe")
pytestmark = pytest.mark.usefixtures("few_optimisations")


@pytest.mark.parametrize("name", [slow("gpt_oss"), *map(long, LONG)])
def test_decoding_gives_the_logits_of_transformers(name, tmp_path):
    theirs = reference_models.save_model(name, tmp_path)
    model = load_base(tmp_path).model
    tokens = np.random.default_rng(0).integers(3, 96, (2, TOTAL), dtype=np.int32)
    wanted = reference_models.logits(theirs, tokens)

    @jax.jit
    def run(tokens):
        first, state = prefill(model, tokens[:, :PROMPT], jnp.full(2, PROMPT), capacity=TOTAL, chunk=4)

        def step(state, token):
            logits, state, _ = decode_step(model, token, state)
            return state, logits

        return first, jax.lax.scan(step, state, tokens[:, PROMPT:].T)[1]

    first, steps = run(tokens)
    np.testing.assert_allclose(first, wanted[:, PROMPT - 1], atol=2e-5)  # as in tests/model/test_decoder.py
    np.testing.assert_allclose(jnp.moveaxis(steps, 0, 1), wanted[:, PROMPT:], atol=2e-5)
