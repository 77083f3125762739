"""Values from JSON against annotated types, and where msgspec and cattrs differ."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import cattrs
import msgspec
import pytest

from butler_jax.evaluation.config import EvalConfig
from butler_jax.predictors.config import PredictorConfig
from butler_jax.storage.settings import from_dict
from butler_jax.storage.values import fits


@pytest.mark.parametrize(
    ("value", "hint", "wanted"),
    [
        (1, int, True),
        (True, int, False),
        (1.0, int, False),
        ("1", int, False),
        (1, float, True),
        (True, float, False),
        (10**400, int, True),
        (10**400, float, False),
        ("a", Path, True),
        (5, Path, False),
        (None, int | None, True),
        ([1, 2], tuple[int, ...], True),
        ([1, "a"], tuple[int, ...], False),
        ("ab", tuple[str, ...], False),
        ("x", Literal["x", "y"], True),
        ("z", Literal["x", "y"], False),
        (True, Literal[1], False),
        ([], Any, True),
        ({"a": 1}, dict, True),
        ([], dict, False),
        ({"rank": 4}, PredictorConfig, True),
        ({"rank": "4"}, PredictorConfig, False),
        ({"more": 4}, PredictorConfig, False),
        (5, PredictorConfig, False),
    ],
)
def test_a_value_fits_a_type_or_not(value, hint, wanted):
    assert fits(value, hint) is wanted


def test_msgspec_does_not_keep_the_promises_of_from_dict():
    """Unknown names are ignored, a message does not show the value, a text beside a path is no type."""
    with pytest.raises(ValueError, match="PredictorConfig has no 'more'"):
        from_dict(PredictorConfig, {"more": 1})
    assert msgspec.convert({"more": 1}, PredictorConfig) == PredictorConfig()
    with pytest.raises(ValueError, match="PredictorConfig: rank cannot be 'four'; it is int"):
        from_dict(PredictorConfig, {"rank": "four"})
    with pytest.raises(msgspec.ValidationError) as refusal:
        msgspec.convert({"rank": "four"}, PredictorConfig)
    assert "four" not in str(refusal.value)
    with pytest.raises(TypeError, match="custom type"):
        msgspec.convert({"compare": ["a"]}, EvalConfig)


def test_cattrs_does_not_keep_the_promises_of_from_dict():
    """Values of another type are converted where they should be refused."""
    for given in ("4", 4.9):
        with pytest.raises(ValueError, match="PredictorConfig: rank cannot be"):
            from_dict(PredictorConfig, {"rank": given})
        assert cattrs.structure({"rank": given}, PredictorConfig).rank == 4
