"""What the tests of both losses share: random inputs, and the comparison with the float64 forms."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.float64 import distillation_loss, distillation_terms

TOLERANCE = 1e-5
"""Largest error relative to the largest entry: float32 sums of up to a few hundred terms, against float64."""

ROUNDINGS = 8
"""Roundings of a term before it is added up: of both logits, of an exponential and a logarithm, and of products."""

HEADS = [(2, 2, 2), (3, 1, 1), (3, 1, 3), (4, 2, 2), (4, 2, 4)]


def random_inputs(seed, batch, length, heads, kv_heads, key_heads, dim=8, rank=4):
    """q, k, v, q_imp and k_imp."""
    rng = np.random.default_rng(seed)
    shapes = (heads, dim), (kv_heads, dim), (kv_heads, dim), (heads, rank), (key_heads, rank)
    return tuple(rng.normal(size=(batch, length, *shape)).astype(np.float32) for shape in shapes)


def assert_close(actual, expected, terms=0.0):
    """The error is small beside the largest entry or, where the terms of a sum cancel, beside the terms.

    terms: sums of the absolute values of what was added up. Without them a sum that cancels fails: it may be exactly
    0, and any rounding is then infinitely large beside it. The second bound is the larger one only where more than 95 %
    of a sum cancel: 8 * 2**-24 is a twentieth of the tolerance. It loosens nothing elsewhere.
    """
    error = np.abs(np.asarray(actual, np.float64) - expected).max()
    allowed = max(TOLERANCE * np.abs(expected).max(), ROUNDINGS * 2.0**-24 * np.max(terms))
    assert error <= allowed, (error, allowed)


def assert_equals_naive(kind, loss_and_count, inputs, **options):
    """The loss, its count and both gradients are those of the float64 form."""
    q, k, _, q_imp, k_imp = inputs
    (loss, count), gradients = jax.jit(jax.value_and_grad(loss_and_count, (0, 1), has_aux=True))(q_imp, k_imp)
    expected, number, *expected_gradients = distillation_loss(kind, q, k, q_imp, k_imp, **options)
    terms, *gradient_terms = distillation_terms(kind, q, k, q_imp, k_imp, **options)
    assert float(count) == number
    assert loss.dtype == count.dtype == jnp.float32
    assert_close(loss, expected, terms)
    assert_close(jax.jit(loss_and_count)(q_imp, k_imp)[0], expected, terms)  # the form without gradients
    for actual, wanted, sizes in zip(gradients, expected_gradients, gradient_terms, strict=True):
        assert_close(actual, wanted, sizes)
