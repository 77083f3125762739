"""Distillation losses and their gradients against float64 forms that build the whole square."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.float64 import distillation_loss
from butler_jax.model.attention import causal_attention
from butler_jax.training import losses

# Largest error relative to the largest entry: float32 sums of up to a few hundred terms, against float64.
TOLERANCE = 1e-5


def _inputs(seed, batch, length, heads, kv_heads, key_heads, dim=8, rank=4):
    rng = np.random.default_rng(seed)
    shapes = (heads, dim), (kv_heads, dim), (kv_heads, dim), (heads, rank), (key_heads, rank)
    return tuple(rng.normal(size=(batch, length, *shape)).astype(np.float32) for shape in shapes)


def _documents(seed, batch, length):
    """Up to five documents a row, borders anywhere, padding of different length at the end."""
    rng = np.random.default_rng(seed)
    segments = np.sort(rng.integers(1, 6, size=(batch, length)), axis=1).astype(np.int32)
    for row in range(batch):
        segments[row, length - rng.integers(0, length // 3 + 1) :] = 0
    return segments


def _relative(actual, expected):
    error = np.abs(np.asarray(actual, np.float64) - expected).max()
    return error / max(np.abs(expected).max(), 1e-3)


def _assert_equals_naive(kind, loss_and_count, inputs, segments=None, sliding_window=None, sinks=0, recent=0):
    q, k, _, p, r = inputs
    (loss, count), (dp, dr) = jax.jit(jax.value_and_grad(loss_and_count, (0, 1), has_aux=True))(p, r)
    expected, terms, expected_dp, expected_dr = distillation_loss(
        kind, q, k, p, r, segments, sliding_window, sinks, recent
    )
    assert float(count) == terms
    assert loss.dtype == count.dtype == jnp.float32
    assert _relative(loss, expected) < TOLERANCE
    assert _relative(dp, expected_dp) < TOLERANCE
    assert _relative(dr, expected_dr) < TOLERANCE
    assert _relative(jax.jit(loss_and_count)(p, r)[0], expected) < TOLERANCE  # the form without gradients


HEADS = [(2, 2, 2), (3, 1, 1), (3, 1, 3), (4, 2, 2), (4, 2, 4)]


@settings(max_examples=12, deadline=None)
@given(
    length=st.sampled_from([1, 5, 128, 131, 200]),
    heads=st.sampled_from(HEADS),
    sliding_window=st.sampled_from([None, 3, 140]),
    documents=st.booleans(),
    always=st.sampled_from([(0, 0), (4, 8), (0, 1), (130, 2)]),
    form=st.sampled_from(losses.FORMS),
)
def test_cross_entropy_equals_naive_form_in_float64(length, heads, sliding_window, documents, always, form):
    inputs = q, k, *_ = _inputs(length, 2, length, *heads)
    segments = _documents(length, 2, length) if documents else None
    options = {"segments": segments, "sliding_window": sliding_window, "sinks": always[0], "recent": always[1]}

    def loss(p, r):
        return losses.cross_entropy(q, k, p, r, implementation="xla", form=form, **options)

    _assert_equals_naive("cross entropy", loss, inputs, **options)


@settings(max_examples=6, deadline=None)
@given(
    length=st.sampled_from([1, 5, 32, 70, 200]),
    heads=st.sampled_from(HEADS),
    chunk=st.sampled_from([1, 16, 33, 128]),
    documents=st.booleans(),
)
def test_squared_error_equals_naive_form_in_float64(length, heads, chunk, documents):
    inputs = q, k, *_ = _inputs(length, 2, length, *heads)
    segments = _documents(length, 2, length) if documents else None

    def loss(p, r):
        return losses.squared_error(q, k, p, r, segments=segments, chunk=chunk)

    _assert_equals_naive("squared error", loss, inputs, segments)


@pytest.mark.parametrize(
    ("form", "sliding_window", "always"),
    [
        ("fused", None, (4, 8)),
        ("fused", 200, (0, 0)),
        ("fused", 200, (4, 150)),
        ("two_calls", 50, (0, 0)),
        ("two_calls", 50, (4, 8)),
    ],
)
def test_cross_entropy_over_many_chunks_equals_naive_form(form, sliding_window, always):
    # 660 tokens: six chunks in three bands, six documents and padding.
    inputs = q, k, v, *_ = _inputs(0, 1, 660, 2, 1, 1)
    options = {
        "segments": _documents(1, 1, 660),
        "sliding_window": sliding_window,
        "sinks": always[0],
        "recent": always[1],
    }

    def loss(p, r):
        options_of_form = {"implementation": "xla", "form": form, **options}
        return losses.attention_and_cross_entropy(q, k, v, p, r, **options_of_form)[1:]

    _assert_equals_naive("cross entropy", loss, inputs, **options)


def test_squared_error_with_documents_shorter_and_longer_than_a_chunk():
    # Borders at chunk edges (16, 64) and inside (21, 23), a document over three chunks, padding between.
    inputs = q, k, *_ = _inputs(1, 1, 90, 4, 2, 2)
    lengths, names = (16, 5, 2, 41, 6, 20), (1, 2, 3, 4, 0, 5)
    segments = np.repeat(names, lengths)[None].astype(np.int32)

    def loss(p, r):
        return losses.squared_error(q, k, p, r, segments=segments, chunk=16)

    _assert_equals_naive("squared error", loss, inputs, segments)


@pytest.mark.parametrize(("heads", "sinks", "recent"), [((4, 2, 2), 4, 8), ((4, 2, 2), 0, 0), ((4, 2, 4), 2, 1)])
def test_two_calls_and_fused_give_the_same(heads, sinks, recent):
    q, k, v, p, r = _inputs(2, 2, 150, *heads)
    segments = _documents(2, 2, 150)

    def run(p, r, form):
        options = {"segments": segments, "sliding_window": 70, "sinks": sinks, "recent": recent}
        options |= {"implementation": "xla", "form": form}
        output, loss, count = losses.attention_and_cross_entropy(q, k, v, p, r, **options)
        return loss, (output, count)

    run = jax.jit(jax.value_and_grad(run, (0, 1), has_aux=True), static_argnums=2)
    (loss, aux), gradients = run(p, r, "fused")
    (other, other_aux), other_gradients = run(p, r, "two_calls")
    for x, y in zip((loss, *aux, *gradients), (other, *other_aux, *other_gradients), strict=True):
        assert _relative(x, np.asarray(y, np.float64)) < TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize(("sinks", "recent"), [(0, 0), (4, 8)])
@pytest.mark.parametrize("documents", [True, False])
def test_splash_cross_entropy_equals_naive_form(documents, sinks, recent):
    inputs = q, k, v, *_ = _inputs(3, 1, 140, 4, 2, 2)
    options = {"segments": _documents(3, 1, 140) if documents else None, "sinks": sinks, "recent": recent}

    def loss(p, r):
        return losses.attention_and_cross_entropy(q, k, v, p, r, implementation="splash", **options)[1:]

    _assert_equals_naive("cross entropy", loss, inputs, **options)


def test_scores_of_keys_that_are_always_read_do_not_matter():
    q, k, _, p, r = _inputs(10, 1, 60, 2, 1, 1)
    other = r.copy()
    other[:, :4] += 50.0  # the sinks; of the recent, each row's own
    run = jax.jit(lambda r: losses.cross_entropy(q, k, p, r, sinks=4, recent=60 - 4)[0])
    assert run(other) == run(r) == 0  # no row has another key
    run = jax.jit(lambda r: losses.cross_entropy(q, k, p, r, sinks=4, recent=8)[0])
    np.testing.assert_array_equal(run(other), run(r))
    other[:, 30] += 1.0
    assert run(other) != run(r)


@pytest.mark.parametrize("name", ["attention_and_cross_entropy", "attention_and_squared_error"])
@pytest.mark.parametrize("key_heads", [2, 4])
def test_output_is_the_frozen_attention_and_carries_no_gradient(name, key_heads):
    inputs = q, k, v, p, r = _inputs(4, 2, 140, 4, 2, key_heads)
    segments = _documents(4, 2, 140)
    function = getattr(distillation, name)
    expected = causal_attention(q, k, v, segments=segments, sliding_window=30)

    def run(*inputs):
        output, loss, _ = function(*inputs, segments=segments, sliding_window=30)
        return loss + 100 * jnp.sum(output), output

    (_, output), gradients = jax.jit(jax.value_and_grad(run, (0, 1, 2, 3, 4), has_aux=True))(*inputs)
    # The same float32 sums in another order.
    np.testing.assert_allclose(output, expected, rtol=1e-5, atol=1e-6)
    assert not any(gradient.any() for gradient in gradients[:3])
    kind = name.removeprefix("attention_and_").replace("_", " ")
    _, _, dp, dr = distillation_loss(kind, q, k, p, r, segments, 30)
    assert _relative(gradients[3], dp) < TOLERANCE
    assert _relative(gradients[4], dr) < TOLERANCE


def test_gradients_scale_with_the_incoming_one():
    q, k, _, p, r = _inputs(5, 1, 20, 2, 1, 1)
    for function in (losses.cross_entropy, losses.squared_error):
        one = jax.grad(lambda p: function(q, k, p, r)[0])(p)  # noqa: B023
        half = jax.grad(lambda p: 0.5 * function(q, k, p, r)[0])(p)  # noqa: B023
        np.testing.assert_array_equal(half, 0.5 * one)  # a power of two is exact


def test_padding_changes_nothing():
    q, k, _, p, r = _inputs(6, 1, 150, 2, 1, 1)
    segments = np.ones((1, 150), np.int32)
    segments[:, 110:] = 0
    for function in (losses.cross_entropy, losses.squared_error):
        short = function(*(x[:, :110] for x in (q, k, p, r)))
        big = [x.copy() for x in (q, k, p, r)]
        for x in big:
            x[:, 110:] = 1e6
        loss = lambda p, r: function(big[0], big[1], p, r, segments=segments)  # noqa: B023, E731
        run = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))
        (value, count), gradients = run(big[2], big[3])
        assert _relative(value, np.float64(short[0])) < TOLERANCE
        assert count == short[1]
        assert all(not gradient[:, 110:].any() and jnp.isfinite(gradient).all() for gradient in gradients)


def test_all_padding_gives_zero_loss_and_count():
    q, k, _, p, r = _inputs(7, 2, 12, 2, 1, 1)
    segments = np.zeros((2, 12), np.int32)
    for function in (losses.cross_entropy, losses.squared_error):
        loss, count = function(q, k, p, r, segments=segments)
        assert loss == 0 and count == 0


def test_bfloat16_inputs_give_float32_losses_close_to_float32():
    inputs = _inputs(8, 1, 200, 4, 2, 2)
    for name in ("attention_and_cross_entropy", "attention_and_squared_error"):
        function = getattr(distillation, name)
        rounded = [jnp.asarray(x, jnp.bfloat16) for x in inputs]
        _, expected, _ = jax.jit(function)(*inputs)

        def run(p, r):
            output, loss, _ = function(*rounded[:3], p, r)  # noqa: B023
            return loss, output

        (loss, output), gradients = jax.jit(jax.value_and_grad(run, (0, 1), has_aux=True))(*rounded[3:])
        assert loss.dtype == jnp.float32 and output.dtype == jnp.bfloat16
        # bfloat16 keeps 8 bits and the errors of single logits average out in the sum.
        np.testing.assert_allclose(loss, expected, rtol=1e-2)
        assert all(g.dtype == jnp.bfloat16 and bool(jnp.isfinite(g).all()) for g in gradients)


@pytest.mark.parametrize("name", ["cross_entropy", "squared_error"])
@pytest.mark.parametrize("documents", [False, True])
def test_memory_is_linear_in_the_sequence(name, documents):
    def compiled(length):
        shapes = (2, 8), (1, 8), (2, 4), (1, 4)
        arrays = [jax.ShapeDtypeStruct((1, length, *shape), jnp.float32) for shape in shapes]
        segments = jax.ShapeDtypeStruct((1, length), jnp.int32) if documents else None

        def loss(q, k, p, r, segments):
            return getattr(distillation, name)(q, k, p, r, segments=segments)[0]

        return jax.jit(jax.value_and_grad(loss, (2, 3))).lower(*arrays, segments).compile()

    shorter, longer = compiled(2048), compiled(4096)
    # A buffer that grew with T * T would quadruple; 2.2 leaves room for padding and alignment.
    ratio = longer.memory_analysis().temp_size_in_bytes / shorter.memory_analysis().temp_size_in_bytes
    assert ratio <= 2.2
    shapes = re.findall(r"\w+\[([\d,]+)\]", longer.as_text())
    assert max(int(np.prod([int(n) for n in shape.split(",") if n])) for shape in shapes) < 4096 * 4096 / 4


def test_frozen_layers_are_not_differentiated_through_a_scan():
    # The loss of each layer is taken inside a scan; the carried stream must bring no backward pass with it.
    q, k, v, p, r = _inputs(9, 1, 40, 2, 2, 2)
    weights = np.random.default_rng(0).normal(size=(3, 8, 8)).astype(np.float32)

    def total(p):
        def layer(x, weight):
            x = jnp.sin(x @ weight)
            output, loss, _ = losses.attention_and_cross_entropy(x, k, v, p, r)
            return x + output, loss

        return jnp.sum(jax.lax.scan(layer, q, weights)[1])

    def through(p):  # the same with the stream cut by hand
        def layer(x, weight):
            x = jnp.sin(jax.lax.stop_gradient(x) @ weight)
            output, loss, _ = losses.attention_and_cross_entropy(x, k, v, p, r)
            return jax.lax.stop_gradient(x + output), loss

        return jnp.sum(jax.lax.scan(layer, q, weights)[1])

    np.testing.assert_array_equal(jax.grad(total)(p), jax.grad(through)(p))
    assert str(jax.make_jaxpr(jax.grad(total))(p)).count(" cos ") == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"recent": -1}, "sinks and recent must be 0 or more, got 0 and -1"),
        ({"form": "one"}, "form 'one' is unknown.*fused.*two_calls"),
        ({"form": "fused", "implementation": "splash"}, 'runs on "xla" only'),
        ({"implementation": "flash"}, "unknown implementation 'flash'"),
        ({"implementation": "cudnn", "segments": np.ones((1, 8), np.int32)}, "cannot keep documents apart"),
        ({"p": np.zeros((1, 8, 2, 4), np.float32)}, "p must be"),
        ({"p": np.zeros((1, 8, 4, 3), np.float32)}, "one width, got 3 and 4"),
        ({"r": np.zeros((1, 8, 3, 4), np.float32)}, "r needs 2 .KV. or 4 .query. heads, got 3"),
    ],
)
def test_errors_name_what_is_wrong(change, message):
    q, k, v, p, r = _inputs(0, 1, 8, 4, 2, 2)
    arguments = {"q": q, "k": k, "v": v, "p": p, "r": r, **change}
    with pytest.raises(ValueError, match=message):
        losses.attention_and_cross_entropy(**arguments)


def test_squared_error_refuses_an_empty_chunk():
    q, k, _, p, r = _inputs(0, 1, 8, 4, 2, 2)
    with pytest.raises(ValueError, match="chunk must be at least 1"):
        losses.squared_error(q, k, p, r, chunk=0)
