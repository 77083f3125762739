"""The vector registers of a TPU, 8 x 128 numbers of 32 bits."""

from __future__ import annotations

SUBLANES = 8
LANES = 128


def lane_slices(x):
    """The slices of a matrix that are one register wide; its width is whole ones."""
    return [x[:, at : at + LANES] for at in range(0, x.shape[1], LANES)]
