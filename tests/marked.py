"""Cases of a parametrised test that repeat a property: slow ones, and those that a release alone runs."""

from __future__ import annotations

import pytest


def slow(*values: object, id: str | None = None):
    """A case that only `pytest -m slow` runs, where a fast one looks at the same part."""
    return pytest.param(*values, id=id, marks=pytest.mark.slow)


def long(*values: object, id: str | None = None):
    """A case that `.ci/run` leaves out, where another one looks at the same part; `pytest -m long` runs it."""
    return pytest.param(*values, id=id, marks=(pytest.mark.slow, pytest.mark.long))
