"""The order-preserving image of scores by which units are chosen."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

import pallas_kernels as pk


def test_order_of_float32_is_kept_by_its_image():
    values = np.array([-np.inf, -3e38, -1.0, -1e-30, 0.0, 1e-30, 1.0, 3e38, np.inf], np.float32)
    image = np.asarray(pk.ordered_image(jnp.asarray(values)))
    assert (np.diff(image.astype(np.int64)) > 0).all()
    signed, missing = np.asarray(pk.ordered_image(jnp.asarray([-0.0, 0.0, np.nan, -np.inf], jnp.float32))).reshape(2, 2)
    assert signed[0] == signed[1] and missing[0] == missing[1]
