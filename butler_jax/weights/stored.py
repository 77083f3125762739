"""A tensor of a file, whose values are read on request."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file: its shape, and read(start, stop), which returns these rows along its first axis."""

    shape: tuple[int, ...]
    read: Callable[[int, int], np.ndarray]
