"""The plan of a decoding, and states that it cannot go on with."""

from __future__ import annotations

import dataclasses
from functools import partial

import jax.numpy as jnp
import numpy as np
import pytest

from butler_jax.decoding import decode_step, make_plan, prefill
from butler_jax.decoding.cache import DecodeState
from butler_jax.decoding.capacity import room_for_all
from butler_jax.decoding.plan import plan_step
from butler_jax.policies import make_policy
from butler_jax.selection import SelectionConfig
from tests.decoding.letters import BASE


@pytest.mark.parametrize(
    ("name", "fields", "when", "heads", "room"),
    [
        ("tokenbutler", dict(budget=24), "ahead", 2, 24),
        ("tokenbutler", dict(budget=24, unit=4), "ahead", 2, 7),  # the newest page may begin anywhere
        ("oracle", dict(budget=24), "in_layer", 2, 24),
        ("oracle_head", dict(budget=24), "in_layer", 4, 24),
        ("h2o", dict(budget=24), "evicting", 2, 24),
        ("dense", dict(budget=24), "never", 2, 0),
    ],
)
def test_a_policy_settles_who_chooses_when_and_how_much(name, fields, when, heads, room):
    plan = make_plan(BASE, 64, SelectionConfig(**fields), make_policy(name))
    assert (plan.when, plan.heads, plan.room, plan.interval) == (when, heads, room, 1)


def test_the_last_new_token_needs_no_room():
    assert room_for_all(np.array([3, 10]), 7, 16, 64) == 16
    assert room_for_all(np.array([60]), 5, None, 64) == 64
    with pytest.raises(ValueError, match="the cache of 15 tokens would be full after 6 new tokens of 7"):
        room_for_all(np.array([3, 10]), 7, 15, 64)


def test_a_full_cache_and_a_missing_predictor_are_clear_errors(base, predictor):
    logits, state = prefill(base.model, jnp.ones((1, 4), jnp.int32), jnp.asarray([4]), capacity=4)
    with pytest.raises(ValueError, match="the cache is full: a row holds 4 of 4 tokens"):
        decode_step(base.model, jnp.asarray([1]), state)
    with pytest.raises(ValueError, match=r"there is the token 61; the vocabulary is 0 ... 60"):
        decode_step(base.model, jnp.asarray([61]), state)
    with pytest.raises(ValueError, match=r"give base\.model"):
        prefill(base, jnp.ones((1, 4), jnp.int32), jnp.asarray([4]), capacity=4)
    with pytest.raises(ValueError, match=r"tokens must be whole numbers \[B, T\], got int32\[4\]"):
        prefill(base.model, jnp.ones(4, jnp.int32), jnp.asarray([4]), capacity=4)
    state = dataclasses.replace(state, lengths=jnp.asarray([3]))
    with pytest.raises(ValueError, match="prefill or a step ran without the predictor"):
        decode_step(base.model, jnp.asarray([1]), state, predictor=predictor)
    with pytest.raises(ValueError, match="needs a trained predictor"):
        decode_step(base.model, jnp.asarray([1]), state, selection=SelectionConfig())
    with pytest.raises(ValueError, match="give the selection to prefill too"):
        decode_step(
            base.model, jnp.asarray([1]), state, selection=SelectionConfig(interval=2), policy=make_policy("random")
        )
    other = dict(policy=make_policy("random"))
    _, kept = prefill(
        base.model,
        jnp.ones((1, 4), jnp.int32),
        jnp.asarray([4]),
        capacity=60,
        selection=SelectionConfig(budget=0.25, interval=2),
        **other,
    )
    with pytest.raises(ValueError, match="room for 15 units of 2 heads, and this selection chooses 30 of 2: "):
        decode_step(base.model, jnp.asarray([1]), kept, selection=SelectionConfig(budget=0.5, interval=2), **other)
    with pytest.raises(ValueError, match="a prompt has no tokens"):
        prefill(base.model, jnp.ones((1, 4), jnp.int32), jnp.asarray([0]), capacity=4)
    padded = jnp.asarray([[1, 60, -1], [2, 61, 99]])
    with pytest.raises(ValueError, match="a prompt has the token 61; the vocabulary is 0"):
        prefill(base.model, padded, jnp.asarray([2, 2]), capacity=4)
    assert isinstance(state, DecodeState) and logits.shape == (1, 61)


def test_a_floor_that_nothing_uses_is_a_clear_error(base):
    with pytest.raises(ValueError, match="a floor goes with the allocation per_layer, and this is per_head"):
        make_plan(base.config, 64, SelectionConfig(budget=0.5, floor=0.2), make_policy("oracle"))


def test_a_predictor_of_another_base_is_a_clear_error(predictor):
    other = dataclasses.replace(BASE, width=2 * BASE.width)
    with pytest.raises(ValueError, match=r"of a base of other sizes: .*'width': .* load its base, or train"):
        make_plan(other, 64, SelectionConfig(), predictor=predictor)


def test_a_state_of_another_policy_is_a_clear_error(base):
    model, selection = base.model, SelectionConfig(budget=12)
    tokens = jnp.ones((2, 5), jnp.int32)
    fill = partial(prefill, model, tokens, jnp.asarray([5, 3]), capacity=24, selection=selection)
    step = partial(decode_step, model, tokens[:, 0], selection=selection)
    with pytest.raises(ValueError, match="the state was not prefilled under the policy h2o"):
        step(fill(policy=make_policy("oracle"))[1], policy=make_policy("h2o"))
    state = fill(policy=make_policy("h2o"))[1]
    with pytest.raises(ValueError, match="the state was not prefilled under the policy snapkv"):
        step(state, policy=make_policy("snapkv"))
    with pytest.raises(ValueError, match="was prefilled under a policy that evicts"):
        step(state, policy=make_policy("oracle"))


@pytest.mark.parametrize("window", [30, 50])
def test_a_step_is_dense_where_a_window_holds_no_more_than_min_context(window):
    base = dataclasses.replace(BASE, sliding_window=window)
    plan = make_plan(base, 64, SelectionConfig(budget=0.5, sinks=1, recent=2, min_context=40), make_policy("oracle"))
    rooms = [plan_step(plan, base, 64, np.asarray(rows), 0).room for rows in ([5, 39], [5, 60], [50, 60])]
    assert rooms == ([0, 0, 0] if window == 30 else [0, 40, 32])  # 0: everything is read
