"""Decoding step by step gives the logits of one pass over the whole sequence."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from butler_jax.decoding import decode_step, prefill, step
from butler_jax.model.config import RopeConfig
from butler_jax.model.decoder import forward, run_layers
from butler_jax.policies import make_policy
from butler_jax.predictors import PredictorConfig, make_predictor
from butler_jax.selection import SelectionConfig
from tests.decoding.ragged import CAPACITY, LENGTHS, PROMPTS, decoded, model_of, rows_of
from tests.marked import long, slow


@pytest.mark.parametrize(
    "changes",
    [
        slow({"qkv_bias": True, "kv_heads": 1, "sliding_window": 5, "sliding_layers": (True, False) * 2}),
        {
            "rope": RopeConfig(
                kind="longrope", original_context=16, short_factor=(1.0,) * 8, long_factor=(1.0, 2.0) * 4, factor=4.0
            )
        },
        {"attention_sinks": True, "sliding_window": 5, "sliding_layers": (True, False) * 2},
        slow({"attention_softcap": 0.05}),
    ],
    ids=["bias and windows", "longrope", "sinks and windows", "soft cap"],
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


SLIDING = (True, False) * 3


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "sliding"),
    [
        ("lookahead", SLIDING),
        long("lookahead", ()),
        long("contextual", ()),
        long("contextual", SLIDING),
    ],
)
def test_a_step_with_its_layers_unrolled_equals_the_scan(monkeypatch, kind, sliding):
    """As on GPU. Six layers: a dense one, and producers of 4 and of 1."""
    model = model_of(layers=6, sliding_window=6 if sliding else None, sliding_layers=sliding)
    predictor = make_predictor(
        model.config, PredictorConfig(kind=kind, rank=8, hidden=32 if kind == "contextual" else None)
    )
    how = dict(predictor=predictor, selection=SelectionConfig(budget=0.5, sinks=1, recent=2, interval=2))
    prompt, lengths = jnp.asarray(rows_of()[:, :5]), jnp.asarray(PROMPTS)
    _, state = jax.jit(lambda t, n: prefill(model, t, n, capacity=CAPACITY, **how))(prompt, lengths)

    def two_steps(unroll):
        monkeypatch.setattr(
            step, "run_layers", lambda *given, **named: run_layers(*given, **named | {"unroll": unroll})
        )
        take = jax.jit(lambda t, s: step.decode_step(model, t, s, details=True, **how))
        first, after, _ = take(jnp.array([3, 4, 5]), state)
        second, after, found = take(jnp.array([6, 7, 8]), after)
        return first, second, after, found

    for one, other in zip(jax.tree.leaves(two_steps(False)), jax.tree.leaves(two_steps(True)), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)


@pytest.mark.parametrize("platform", ["cpu", "gpu"])
def test_layers_are_unrolled_on_a_gpu(monkeypatch, platform):
    """By default, since a scan there copies the weights of each layer."""
    seen, model = [], model_of()
    monkeypatch.setattr(step, "platform", lambda: platform)
    monkeypatch.setattr(
        step, "run_layers", lambda *given, unroll, **named: seen.append(unroll) or run_layers(*given, **named)
    )
    _, state = prefill(model, jnp.asarray(rows_of()[:, :5]), jnp.asarray(PROMPTS), capacity=CAPACITY)
    for selection in (None, SelectionConfig(budget=0.5, sinks=1, recent=2)):
        how = dict(selection=selection, policy=make_policy("oracle"))
        jax.eval_shape(lambda s, how=how: decode_step(model, jnp.array([3, 4, 5]), s, **how), state)
    assert seen == [platform == "gpu"] * 2


@pytest.mark.parametrize("name", ["oracle", "tokenbutler"])
def test_a_step_of_an_interval_chooses_after_a_dense_one(name):
    model = model_of(sliding_window=20, sliding_layers=(True, False, True, False))
    predictor = make_predictor(model.config, PredictorConfig(rank=8, stride=2)) if name == "tokenbutler" else None
    tokens = jax.random.randint(jax.random.key(3), (2, 34), 0, model.config.vocab_size)
    selection = SelectionConfig(budget=0.5, sinks=1, recent=2, interval=4)
    under = dict(predictor=predictor, selection=selection, policy=make_policy(name))
    _, state = prefill(model, tokens[:, :30], jnp.asarray([30, 25]), capacity=48, **under)
    _, state, _ = decode_step(model, tokens[:, 30], state, predictor=predictor)
    fresh = dataclasses.replace(state, memory=None)
    _, state, found = decode_step(model, tokens[:, 31], state, **under, details=True)
    under["selection"] = dataclasses.replace(selection, interval=1)
    _, _, wanted = decode_step(model, tokens[:, 31], fresh, **under, details=True)
    assert not np.any(wanted.chosen[1] & ~found.chosen[1])  # layer 1 is the first that is served
    assert 0 <= np.max(found.attended[1] - wanted.attended[1]) <= 1  # and the token since the dense step
    under["selection"] = selection
    _, _, later = decode_step(model, tokens[:, 32], state, **under, details=True)
    assert not np.any(found.chosen[1::2] & ~later.chosen[1::2])  # the choice is kept
