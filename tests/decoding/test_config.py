"""The settings of sampling are checked."""

from __future__ import annotations

import pytest

from butler_jax.decoding.config import SamplingConfig


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"temperature": -1}, "temperature must be 0"),
        ({"top_k": 0}, "top_k must be at least 1"),
        ({"top_p": 0}, "top_p must be above 0"),
        ({"top_p": 1.5}, "at most 1"),
        ({"repetition_penalty": 0}, "repetition penalty must be above 0"),
    ],
)
def test_bad_settings_are_clear_errors(fields, message):
    with pytest.raises(ValueError, match=message):
        SamplingConfig(**fields)
