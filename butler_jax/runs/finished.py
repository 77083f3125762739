"""Finished checkpoints as files: which there are, what they say of themselves, and whether they are whole."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path

from butler_jax.runs import digests
from butler_jax.storage import read_object, shown

METADATA = "_CHECKPOINT_METADATA"

UNFINISHED = ".unfinished"
"""Part of the names of checkpoints that are being written or removed. Without a process that does so, they are
left-overs."""

STEP = re.compile("0|[1-9][0-9]{0,17}")
"""The name of a checkpoint, whole. Everything else in their directory is not ours."""


def steps(directory: Path) -> list[int]:
    """Steps of the named checkpoints in a directory, in order: only they have a number for a name, as Python writes it.

    What has another name, 007 or hundreds of digits, is left where it is.
    """
    found = directory.iterdir() if directory.is_dir() else ()
    return sorted(int(path.name) for path in found if STEP.fullmatch(path.name))


def damage(checkpoint: Path, *, only: str | None = None) -> list[str]:
    """What is wrong with a checkpoint, or with one of its files: a few words each, empty where it is whole.

    One that was renamed is not whole: it is of another step than it says.
    """
    if found := digests.damage(checkpoint, only=only):
        return found
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # older ones do not say it
        if (step := read_facts(checkpoint)["step"]) != int(checkpoint.name):
            return [f"it was saved as step {shown(step)}"]
    return []


def read_facts(checkpoint: Path) -> dict:
    """What was saved with a checkpoint besides the arrays: base, fingerprint, sizes, places in the data, metrics."""
    return read_object(checkpoint / METADATA)["custom_metadata"]
