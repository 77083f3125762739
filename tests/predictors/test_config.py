"""Settings of a predictor that do not go together."""

from __future__ import annotations

import pytest

from butler_jax.predictors import PredictorConfig
from butler_jax.training import TrainConfig


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (dict(target="centred"), "an offset goes with a target that is an error"),
        (dict(offset="share"), "an offset goes with a target that is an error"),
        (dict(kind="producer", target="value", offset="share"), "only the lookahead predictor has an offset"),
        (dict(kind="producer", value_channels=2), "only the lookahead predictor has value channels"),
        (dict(rank=4, value_channels=4), "value channels must be even and fewer than the rank"),
        (dict(value_channels=1), "value channels must be even and fewer than the rank"),
    ],
)
def test_targets_and_offsets_that_do_not_go_together_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        PredictorConfig(**given)


def test_an_error_is_no_target_of_the_squared_error():
    with pytest.raises(ValueError, match="--target centred is trained for by --objective cross_entropy"):
        TrainConfig(predictor=PredictorConfig(target="centred", offset="share"), objective="squared_error")
