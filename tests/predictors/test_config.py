"""Settings of a predictor that do not go together."""

from __future__ import annotations

import pytest

from butler_jax.predictors import PredictorConfig
from butler_jax.training import TrainConfig


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (dict(target="centred", offset="none"), "a target that is an error needs an offset, and attention has none"),
        (dict(target="attention", offset="share"), "a target that is an error needs an offset, and attention has none"),
        (dict(kind="producer", offset="share"), "a target that is an error needs an offset, and attention has none"),
        (dict(kind="producer", target="value", offset="share"), "only the lookahead predictor has an offset"),
        (dict(kind="producer", value_channels=2), "only the lookahead predictor has value channels"),
        (dict(rank=4, value_channels=4), "value channels must be even and fewer than the rank"),
        (dict(value_channels=1), "value channels must be even and fewer than the rank"),
        (dict(target="centered"), "unknown target 'centered'; known: attention, weight, value, centred"),
        (dict(offset="shared"), "unknown offset 'shared'; known: none, share, self_normalised"),
        (dict(rank=16.0), "rank must be a whole number, got 16.0"),
        (dict(stride="4"), "stride must be a whole number, got '4'"),
    ],
)
def test_targets_and_offsets_that_do_not_go_together_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        PredictorConfig(**given)


@pytest.mark.parametrize(
    ("given", "target", "offset"),
    [
        ({}, "centred", "share"),
        (dict(target="attention"), "attention", "none"),
        (dict(target="weight"), "weight", "share"),
        (dict(offset="none"), "attention", "none"),
        (dict(offset="self_normalised"), "centred", "self_normalised"),
        (dict(kind="producer"), "attention", "none"),
        (dict(kind="contextual"), "attention", "none"),
    ],
)
def test_what_is_left_out_of_target_and_offset_suits_the_rest(given, target, offset):
    config = PredictorConfig(**given)
    assert (config.target, config.offset, config.value_channels) == (target, offset, 0)


def test_an_error_is_no_target_of_the_squared_error():
    with pytest.raises(ValueError, match="give --target attention"):
        TrainConfig(predictor=PredictorConfig(), objective="squared_error")
