"""What holds for both losses: frozen attention, gradients, padding, precision and memory."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.float64 import distillation_loss
from butler_jax.model.attention import causal_attention
from butler_jax.training.losses.cross_entropy import attend_with_cross_entropy
from butler_jax.training.losses.squared_error import attend_with_squared_error, sum_squared_errors
from tests.marked import slow
from tests.tiny_models import random_documents
from tests.training.losses.naive import assert_close, random_inputs

LOSSES = {"cross entropy": attend_with_cross_entropy, "squared error": attend_with_squared_error}


def cross_entropy(q, k, q_imp, k_imp, **options):
    return attend_with_cross_entropy(q, k, k, q_imp, k_imp, **options)[1:]


SUMS = {"cross entropy": cross_entropy, "squared error": sum_squared_errors}
"""(loss, count) alone."""


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("key_heads", [slow(2), 4])
def test_output_is_the_frozen_attention_and_carries_no_gradient(name, key_heads):
    inputs = q, k, v, q_imp, k_imp = random_inputs(4, 2, 140, 4, 2, key_heads)
    segments = random_documents(4, 2, 140)
    expected = causal_attention(q, k, v, segments=segments, sliding_window=30)

    def run(*inputs):
        output, loss, _ = LOSSES[name](*inputs, segments=segments, sliding_window=30)
        return loss + 100 * jnp.sum(output), output

    (_, output), gradients = jax.jit(jax.value_and_grad(run, (0, 1, 2, 3, 4), has_aux=True))(*inputs)
    # The same float32 sums in another order.
    np.testing.assert_allclose(output, expected, rtol=1e-5, atol=1e-6)
    assert not any(gradient.any() for gradient in gradients[:3])
    _, _, *wanted = distillation_loss(name, q, k, q_imp, k_imp, segments=segments, sliding_window=30)
    for gradient, own in zip(gradients[3:], wanted, strict=True):
        assert_close(gradient, own)


@pytest.mark.parametrize("name", SUMS)
def test_gradients_scale_with_the_incoming_one(name):
    q, k, _, q_imp, k_imp = random_inputs(5, 1, 20, 2, 1, 1)
    one = jax.grad(lambda q_imp: SUMS[name](q, k, q_imp, k_imp)[0])(q_imp)
    half = jax.grad(lambda q_imp: 0.5 * SUMS[name](q, k, q_imp, k_imp)[0])(q_imp)
    np.testing.assert_array_equal(half, 0.5 * one)  # a power of two is exact


@pytest.mark.parametrize("name", SUMS)
def test_padding_changes_nothing(name):
    q, k, _, q_imp, k_imp = random_inputs(6, 1, 150, 2, 1, 1)
    segments = np.ones((1, 150), np.int32)
    segments[:, 110:] = 0
    short = SUMS[name](*(x[:, :110] for x in (q, k, q_imp, k_imp)))
    big = [x.copy() for x in (q, k, q_imp, k_imp)]
    for x in big:
        x[:, 110:] = 1e6

    def loss(q_imp, k_imp):
        return SUMS[name](*big[:2], q_imp, k_imp, segments=segments)

    (value, count), gradients = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(*big[2:])
    assert_close(value, np.float64(short[0]))
    assert count == short[1]
    assert all(not gradient[:, 110:].any() and jnp.isfinite(gradient).all() for gradient in gradients)


@pytest.mark.parametrize("name", SUMS)
def test_all_padding_gives_zero_loss_and_count(name):
    q, k, _, q_imp, k_imp = random_inputs(7, 2, 12, 2, 1, 1)
    loss, count = SUMS[name](q, k, q_imp, k_imp, segments=np.zeros((2, 12), np.int32))
    assert loss == 0 and count == 0


@pytest.mark.parametrize("name", LOSSES)
def test_bfloat16_inputs_give_float32_losses_close_to_float32(name):
    inputs = random_inputs(8, 1, 200, 4, 2, 2)
    rounded = [jnp.asarray(x, jnp.bfloat16) for x in inputs]
    _, expected, _ = jax.jit(LOSSES[name])(*inputs)

    def run(q_imp, k_imp):
        output, loss, _ = LOSSES[name](*rounded[:3], q_imp, k_imp)
        return loss, output

    (loss, output), gradients = jax.jit(jax.value_and_grad(run, (0, 1), has_aux=True))(*rounded[3:])
    assert loss.dtype == jnp.float32 and output.dtype == jnp.bfloat16
    # bfloat16 keeps 8 bits and the errors of single logits average out in the sum.
    np.testing.assert_allclose(loss, expected, rtol=1e-2)
    assert all(g.dtype == jnp.bfloat16 and bool(jnp.isfinite(g).all()) for g in gradients)


@pytest.mark.parametrize("name", SUMS)
@pytest.mark.parametrize("documents", [slow(False), True])
def test_memory_is_linear_in_the_sequence(name, documents):
    def compiled(length):
        shapes = (2, 8), (1, 8), (2, 4), (1, 4)
        arrays = [jax.ShapeDtypeStruct((1, length, *shape), jnp.float32) for shape in shapes]
        segments = jax.ShapeDtypeStruct((1, length), jnp.int32) if documents else None

        def loss(q, k, q_imp, k_imp, segments):
            return SUMS[name](q, k, q_imp, k_imp, segments=segments)[0]

        return jax.jit(jax.value_and_grad(loss, (2, 3))).lower(*arrays, segments).compile()

    shorter, longer = compiled(2048), compiled(4096)
    # A buffer that grew with T * T would quadruple; 2.2 leaves room for padding and alignment.
    ratio = longer.memory_analysis().temp_size_in_bytes / shorter.memory_analysis().temp_size_in_bytes
    assert ratio <= 2.2
    shapes = re.findall(r"\w+\[([\d,]+)\]", longer.as_text())
    assert max(int(np.prod([int(n) for n in shape.split(",") if n])) for shape in shapes) < 4096 * 4096 / 4
