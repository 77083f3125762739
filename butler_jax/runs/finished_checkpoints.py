"""Finished checkpoints as files: their steps, the facts saved with them, and whether they are whole."""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Mapping
from pathlib import Path

from butler_jax.runs import digests
from butler_jax.storage import read_object, shown

METADATA = "_CHECKPOINT_METADATA"

UNFINISHED = ".unfinished"
"""Part of the name of a checkpoint that is being written or removed, or that a killed process left behind."""

STEP = re.compile("0|[1-9][0-9]{0,17}")
"""The name of a finished checkpoint. Other names in the directory are ignored."""


def steps(directory: Path) -> list[int]:
    """Steps of the finished checkpoints in a directory, in order.

    Their names are numbers as Python writes them. Other names, such as 007 or hundreds of digits, are ignored.
    """
    found = directory.iterdir() if directory.is_dir() else ()
    return sorted(int(path.name) for path in found if STEP.fullmatch(path.name))


def pick_best(losses: Mapping[int, float | None]) -> int | None:
    """The step with the lowest loss, the newest of equal ones; None of none. A loss of None counts as infinite.

    losses: by step, in order.
    """
    return min(reversed(losses), key=lambda step: math.inf if losses[step] is None else losses[step], default=None)


def damage(checkpoint: Path, *, only: str | None = None) -> list[str]:
    """What is wrong with a checkpoint, a few words for each fault; empty where it is whole.

    A renamed checkpoint is not whole, since it was saved at another step.

    Args:
        only: The name of the one file to check; None checks all.
    """
    if found := digests.damage(checkpoint, only=only):
        return found
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # older checkpoints do not record it
        if (step := read_facts(checkpoint)["step"]) != int(checkpoint.name):
            return [f"it was saved as step {shown(step)}"]
    return []


def read_facts(checkpoint: Path) -> dict:
    """What was saved with a checkpoint besides the arrays: base, fingerprint, sizes, data state, metrics."""
    return read_object(checkpoint / METADATA)["custom_metadata"]
