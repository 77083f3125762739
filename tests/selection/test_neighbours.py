"""The neighbour fetch."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from butler_jax.selection.neighbours import right_of_runs


def test_a_run_of_c_brings_the_c_to_its_right():
    mask = np.zeros((1, 16), bool)
    mask[0, [1, 4, 5, 9, 10, 11, 12]] = True
    # {1} brings 2, {4, 5} bring 6 and 7, {9 ... 12} bring 13, 14, 15 and one beyond the end
    assert list(np.flatnonzero(right_of_runs(jnp.asarray(mask))[0])) == [2, 6, 7, 13, 14, 15]
