"""Every policy by its name, and the errors of unknown names and settings."""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np
import pytest

from butler_jax.policies import (
    POLICIES,
    Evicting,
    LowRank,
    Scoring,
    SnapKV,
    Streaming,
    TokenButler,
    describe,
    make_policy,
    settle_policy,
)
from tests.policies.chunks import B, C, D, G, K, S


def test_every_policy_gives_finite_scores_of_the_shape_selection_takes_or_evicts(chunk):
    directions = np.ones((4, K, D, 2), np.float32)
    for name in POLICIES:
        if issubclass(POLICIES[name], Evicting):
            assert not issubclass(POLICIES[name], Scoring)
            continue
        scores = make_policy(name, **({"directions": directions} if name == "lowrank" else {}))(chunk)
        assert scores.shape in ((B, K, C, S), (B, K * G, C, S)), name
        assert np.isfinite(np.asarray(scores)).all(), name


def test_the_offset_of_a_predictor_is_no_setting():
    with pytest.raises(ValueError, match="the offset of tokenbutler is its predictor's"):
        make_policy("tokenbutler:offset=none")


def test_a_policy_that_programs_cannot_tell_from_others_is_refused():
    class Signed(Streaming):
        def __init__(self, sign):
            object.__setattr__(self, "sign", sign)

    @dataclass(frozen=True, kw_only=True)
    class Listed(Streaming):
        layers: list[int]

    with pytest.raises(ValueError, match="has sign, which are no fields of a dataclass"):
        settle_policy(Signed(1))
    with pytest.raises(ValueError, match=r"cannot be hashed .*; give tuples for lists"):
        settle_policy(Listed(layers=[1]))


def test_errors_name_what_is_known(chunk):
    with pytest.raises(ValueError, match="unknown policy 'best'; known: dense, oracle"):
        make_policy("best")
    with pytest.raises(ValueError, match="streaming has no seed"):
        make_policy("streaming", seed=1)
    with pytest.raises(ValueError, match="policy dense has no foo; it has no settings"):
        make_policy("dense", foo=1)
    with pytest.raises(ValueError, match="policy quest has no evicts; it has page"):
        make_policy("quest", evicts=True)
    with pytest.raises(ValueError, match="known: normalised, maximum"):
        make_policy("tokenbutler", pooling="mean")
    with pytest.raises(ValueError, match="needs a trained predictor"):
        make_policy("tokenbutler")(chunk._replace(predicted=None))
    with pytest.raises(ValueError, match="lowrank has no directions yet"):
        make_policy("lowrank")(chunk)


@pytest.mark.parametrize(
    ("text", "policy"),
    [
        ("snapkv:once=False", SnapKV(once=False)),
        ("snapkv:once=1:pool=5", SnapKV(pool=5)),
        ("lowrank:rank=4", LowRank(rank=4)),
        ("tokenbutler:error=value", TokenButler(error="value")),
        ("tokenbutler:error=None", TokenButler()),
    ],
)
def test_settings_after_a_name_have_the_types_of_their_fields(text, policy):
    assert describe(make_policy(text)) == describe(policy)


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("snapkv", dict(once="false"), "once must be True or False, got 'false'"),
        ("snapkv", dict(pool=7.0), "pool must be a whole number, got 7.0"),
        ("quest", dict(page="8"), "page must be a whole number, got '8'"),
        ("random", dict(seed="1"), "seed must be a whole number, got '1'"),
        ("lowrank", dict(rank="8"), "rank must be a whole number, got '8'"),
        ("citrus", dict(chunk=2.5), "chunk must be a whole number, got 2.5"),
        ("tokenbutler", dict(offset="shared"), "unknown offset 'shared'; known: none, share, self_normalised"),
        ("oracle_residual", dict(error="l1"), "unknown error 'l1'; known: centred, value, weight, critical"),
    ],
)
def test_fields_of_another_type_are_refused(name, settings, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        make_policy(name, **settings)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("quest:page=x", "page of policy quest is a whole number, got 'x'"),
        ("citrus:chunk=1.5", "chunk of policy citrus is a whole number, got '1.5'"),
        ("snapkv:once=maybe", "once of policy snapkv is true or false, got 'maybe'"),
        ("snapkv:pool=-1", "snapkv pools an odd number of tokens, got -1"),
        ("random:seed=-1", "the seed of random must be 0 or more, got -1"),
        ("lowrank:directions=x", "directions of policy lowrank is given in Python alone, not as a text"),
        ("h2o:", "a setting of policy h2o is FIELD=VALUE, got ''"),
    ],
)
def test_settings_of_another_type_are_refused(text, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        make_policy(text)
