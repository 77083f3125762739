"""Checks of what a simulation or a measurement is given."""

from __future__ import annotations

from typing import Any

import numpy as np


def require_list(**values: Any) -> None:
    """Raise ValueError where one number or name stands in the place of a list."""
    for name, value in values.items():
        if isinstance(value, int | float | str):
            raise ValueError(f"{name} must be a list, got {value!r}; write [{value!r}]")


def require_counted(rows: np.ndarray, prompt_tokens: int) -> None:
    """Raise ValueError where no row counts."""
    if not np.any(rows):
        raise ValueError(
            f"no row is left after prompts of {prompt_tokens} tokens; give longer texts, or a smaller prompt_tokens"
        )
