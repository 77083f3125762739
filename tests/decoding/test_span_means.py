"""Decoding with a tail gives the logits of the simulation, which forms its means of spans anew for every row."""

from __future__ import annotations

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import tpu_decode
from butler_jax.decoding.plan import make_plan
from butler_jax.decoding.prefill_pass import prefill
from butler_jax.decoding.step import decode_step
from butler_jax.model.decoder import logits
from butler_jax.policies import make_policy
from butler_jax.predictors import PredictorConfig, make_predictor
from butler_jax.selection.budget import limits_of
from butler_jax.selection.config import SelectionConfig
from butler_jax.simulation.simulator import hidden_states
from tests.decoding.test_choice import SINKS, SLIDING, TOTAL, decoded_sets, make_model, rows_of, text_of
from tests.marked import long, slow

pytestmark = pytest.mark.usefixtures("few_optimisations")
PROMPTS = np.asarray([4, 20, 12])


def simulated_logits(model, predictor, policy, selection):
    """Logits of every row [B, T, V], prompts read densely."""
    batch = jax.tree.map(jnp.asarray, text_of(len(PROMPTS)))
    limits = limits_of(selection, model.config, TOTAL, policy.choosing_heads(model.config))._replace(
        prompts=jnp.asarray(PROMPTS)
    )
    run = partial(hidden_states, policy=policy, rule=selection.rule)
    return np.asarray(logits(model, jax.jit(run)(model, predictor, batch, limits)[0]))


@pytest.mark.parametrize(
    ("name", "budget", "changes"),
    [
        ("tokenbutler", dict(budget=0.3, tail=8), {}),
        slow("oracle", dict(budget=0.4, tail=8, unit=4), {}),
        slow("oracle_head", dict(budget=0.3, tail=5), {}),
        slow("oracle", dict(budget=0.4, tail=8, interval=4), {}),
        slow("oracle", dict(budget=0.3, tail=4), SLIDING | SINKS),
        long("tokenbutler", dict(budget=0.3, tail=8, min_context=30), SLIDING),
        long("oracle_residual", dict(budget=0.8, tail=8, allocation="tolerance", tolerance=0.1), {}),
        long("streaming", dict(budget=12, tail=16), {}),
    ],
)
def test_decoding_with_a_tail_gives_the_logits_of_the_simulation(name, budget, changes):
    policy, model = make_policy(name), make_model(**changes)
    selection = SelectionConfig(sinks=2, recent=3, **budget)
    predictor = make_predictor(model.config, PredictorConfig(rank=8, stride=2)) if policy.needs_predictor else None
    policy = policy.for_predictor(predictor)
    found = decoded_sets(model, predictor, policy, selection, prompts=PROMPTS)
    wanted, without = (
        simulated_logits(model, predictor, policy, s) for s in (selection, dataclasses.replace(selection, tail=0))
    )
    changed = 0
    for (row, place), (*_, given) in found.items():
        if place < TOTAL - 1:
            np.testing.assert_allclose(given, wanted[row, place], atol=2e-4, rtol=2e-4)
            changed += np.abs(given - without[row, place]).max() > 0.01
    assert changed > len(found) / 2


def test_a_state_without_means_is_refused():
    model, selection = make_model(), SelectionConfig(budget=0.3, tail=8)
    tokens = jnp.asarray(rows_of()[:, :4])
    for given in (None, SelectionConfig(budget=0.3, tail=16)):
        _, state = prefill(model, tokens, jnp.full(3, 4), capacity=TOTAL, selection=given, policy=make_policy("oracle"))
        with pytest.raises(ValueError, match="a tail of spans of 8 tokens needs their means"):
            decode_step(model, tokens[:, 0], state, selection=selection, policy=make_policy("oracle"))


@pytest.mark.slow
@pytest.mark.parametrize("offload", [False, True])
def test_the_end_of_a_prompt_needs_no_second_cache_on_a_chip(offload):
    pytest.importorskip("libtpu", reason='libtpu is not installed; pip install "jax[tpu]" brings the TPU compiler')
    mesh, base = tpu_decode.chips("v5e", "model=1"), dataclasses.replace(tpu_decode.LLAMA_8B, layers=4)
    plan = make_plan(base, 32768, SelectionConfig(budget=1 / 16, tail=64))
    compiled = tpu_decode.lower_end(mesh, base=base, capacity=32768, offload=offload, plan=plan).compile()
    layer = 2 * 8 * 32768 * 128 * 2 / 2**30
    assert tpu_decode.summary(compiled)["temporary_gib"] < 2 * layer  # of four
