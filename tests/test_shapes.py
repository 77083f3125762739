"""The check of annotations finds wrong shapes and types."""

import jax.numpy as jnp
import jaxtyping
import pytest

from butler_jax.model.layers import gated, rms_norm, rotary


def test_arrays_that_fit_pass_and_others_are_found():
    gated(jnp.ones((2, 3)), jnp.ones((2, 3)))
    with pytest.raises(jaxtyping.TypeCheckError, match="gated"):
        gated(jnp.ones((2, 3)), jnp.ones((1, 3)))  # broadcasts
    with pytest.raises(jaxtyping.TypeCheckError, match="rms_norm"):
        rms_norm(jnp.ones((2, 3)), jnp.ones(1), 1e-6)
    rotary(jnp.ones((2, 5, 4)), jnp.ones((2, 1, 2)), jnp.ones((2, 1, 2)))
    with pytest.raises(jaxtyping.TypeCheckError, match="rotary"):
        rotary(jnp.ones((2, 5, 4)), jnp.ones((2, 1, 2)), jnp.ones((2, 1, 1)))
