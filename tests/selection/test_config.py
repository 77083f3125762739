"""Invalid settings of a selection are refused."""

from __future__ import annotations

import numpy as np
import pytest

from butler_jax.selection import SelectionConfig


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"budget": 0}, "above 0, got 0; give a fraction such as 0.25 or a number of tokens"),
        ({"budget": -0.5}, "above 0"),
        ({"budget": 1.5}, "at most 1.0"),
        ({"budget": 11}, "below 4 sinks"),
        ({"budget": 1}, "everything is 1.0"),
        ({"budget": float("nan")}, "above 0"),
        ({"budget": "half"}, "is not a number"),
        ({"sinks": 1.5}, "sinks must be a whole number, got 1.5"),
        ({"interval": 2.5}, "interval must be a whole number, got 2.5"),
        ({"threshold": 1.0}, r"one number for every layer and KV head, \[L\]\[K\]; got 1.0"),
        ({"budget": True}, "is not a number"),
        ({"sinks": -1}, "sinks"),
        ({"recent": 0}, "recent"),
        ({"unit": 3}, "power of two"),
        ({"unit": 0}, "power of two"),
        ({"unit": 16, "budget": 38}, "in pages of 16 = 39; give at least 39"),
        ({"interval": 0}, "interval must be at least 1"),
        ({"min_context": -1}, "min_context"),
        ({"threshold": ((0.0, 1.0), (0.0,))}, "every layer and KV head"),
        ({"allocation": "top_p", "tolerance": 2}, "under top_p the tolerance is 1 - p"),
        ({"threshold": ()}, "every layer and KV head"),
        ({"threshold": (("a",),)}, "every layer and KV head"),
        ({"threshold": ((float("nan"),),)}, "every layer and KV head, .* one of them is NaN"),
    ],
)
def test_bad_budget_is_a_clear_error(fields, message):
    with pytest.raises(ValueError, match=message):
        SelectionConfig(**fields)


def test_numbers_of_numpy_are_numbers():
    config = SelectionConfig(budget=np.int64(256), sinks=np.int32(2), unit=np.int64(4))
    assert config == SelectionConfig(budget=256, sinks=2, unit=4) and isinstance(config.budget, int)
