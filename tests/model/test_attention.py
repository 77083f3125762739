"""Causal attention against a float64 form that builds the whole square."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from butler_jax.model import attention
from butler_jax.model.attention import causal_attention, document_starts
from tests.marked import long
from tests.tiny_models import random_documents


def _inputs(seed, batch, length, heads, kv_heads, dim, value_dim):
    rng = np.random.default_rng(seed)
    shapes = (heads, dim), (kv_heads, dim), (kv_heads, value_dim)
    return tuple(rng.normal(size=(batch, length, *shape)).astype(np.float32) for shape in shapes)


def _naive(q, k, v, segments=None, sliding_window=None, scale=None):
    """Output and log-sum-exp in float64, one query at a time over the keys it may see."""
    q, k, v = (x.astype(np.float64) for x in (q, k, v))
    batch, length, heads, dim = q.shape
    group = heads // k.shape[2]
    out, lse = np.zeros((*q.shape[:3], v.shape[3])), np.zeros(q.shape[:3])
    for b in range(batch):
        for i in range(length):
            seen = np.arange(0 if sliding_window is None else max(0, i - sliding_window + 1), i + 1)
            if segments is not None:
                seen = seen[segments[b, seen] == segments[b, i]]
            for h in range(heads):
                logits = k[b, seen, h // group] @ q[b, i, h] * (dim**-0.5 if scale is None else scale)
                lse[b, i, h] = logits.max() + np.log(np.exp(logits - logits.max()).sum())
                out[b, i, h] = np.exp(logits - lse[b, i, h]) @ v[b, seen, h // group]
    return out, lse


# Float32 sums of some hundred terms of order one, against float64.
TOLERANCE = 5e-6


@settings(max_examples=8, deadline=None)
@given(
    length=st.sampled_from([1, 2, 7, 128, 129, 200]),
    heads=st.sampled_from([(1, 1), (3, 1), (4, 2)]),
    dims=st.sampled_from([(4, 4), (8, 5), (3, 9)]),
    sliding_window=st.sampled_from([None, 1, 5, 128, 1000]),
    documents=st.booleans(),
)
def test_output_and_log_sum_exp_equal_naive_form(length, heads, dims, sliding_window, documents):
    q, k, v = _inputs(length, 2, length, *heads, *dims)
    segments = random_documents(length, 2, length, most=4) if documents else None
    out, lse = causal_attention(
        q, k, v, segments=segments, sliding_window=sliding_window, implementation="xla", return_lse=True
    )
    expected, expected_lse = _naive(q, k, v, segments, sliding_window)
    np.testing.assert_allclose(out, expected, rtol=TOLERANCE, atol=TOLERANCE)
    np.testing.assert_allclose(lse, expected_lse, rtol=TOLERANCE, atol=TOLERANCE)
    assert lse.dtype == jnp.float32


@pytest.mark.parametrize("sliding_window", [None, 40, 300])
def test_many_chunks_in_bands_equal_naive_form(sliding_window):
    # 700 tokens are six chunks of 128 in three bands; the windows are shorter and longer than a chunk.
    q, k, v = _inputs(0, 1, 700, 2, 1, 4, 4)
    segments = random_documents(3, 1, 700, most=4)
    out = jax.jit(lambda q, k, v: causal_attention(q, k, v, segments=segments, sliding_window=sliding_window))(q, k, v)
    np.testing.assert_allclose(out, _naive(q, k, v, segments, sliding_window)[0], rtol=TOLERANCE, atol=TOLERANCE)


def test_scale_replaces_the_default():
    q, k, v = _inputs(0, 1, 9, 2, 2, 4, 4)
    np.testing.assert_allclose(
        causal_attention(q, k, v, scale=0.7), _naive(q, k, v, scale=0.7)[0], rtol=TOLERANCE, atol=TOLERANCE
    )


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        (dict(sink_logits=jnp.zeros(2)), "sink_logits must be one for each of the 4 query heads"),
        (dict(softcap=0.0), "softcap must be above 0, got 0.0"),
        (dict(sliding_window=2.5), "sliding_window must be a whole number"),
    ],
)
def test_what_does_not_fit_is_refused(changed, said):
    q, k, v = _inputs(0, 1, 9, 4, 2, 4, 4)
    with pytest.raises(ValueError, match=said):
        causal_attention(q, k, v, **changed)
    with pytest.raises(ValueError, match="q, k and v hold no tokens"):
        causal_attention(q[:, :0], k[:, :0], v[:, :0])


def test_gradients_equal_those_of_the_whole_square():
    q, k, v = (jnp.asarray(x) for x in _inputs(1, 2, 200, 4, 2, 4, 4))
    segments = jnp.asarray(random_documents(1, 2, 200, most=4))
    rows = jnp.arange(200)
    seen = (rows[:, None] >= rows[None, :]) & (rows[:, None] - rows[None, :] < 50)
    seen = seen[None, None] & (segments[:, None, :, None] == segments[:, None, None, :])

    def chunked(q, k, v):
        return jnp.sum(jnp.square(causal_attention(q, k, v, segments=segments, sliding_window=50)))

    def square(q, k, v):
        return jnp.sum(jnp.square(jax.nn.dot_product_attention(q, k, v, mask=seen)))

    gradients, others = (jax.jit(jax.grad(f, (0, 1, 2)))(q, k, v) for f in (chunked, square))
    for actual, expected in zip(gradients, others, strict=True):
        # Two float32 computations of sums over up to 50 keys and 4 heads.
        np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=2e-5)


def test_padding_rows_are_finite_and_touch_nothing_else():
    q, k, v = _inputs(2, 1, 150, 2, 1, 4, 4)
    segments = np.ones((1, 150), np.int32)
    segments[:, 100:] = 0
    short = causal_attention(q[:, :100], k[:, :100], v[:, :100])
    for array in (q, k, v):
        array[:, 100:] = 1e4

    def total(q, k, v):
        out = causal_attention(q, k, v, segments=segments)
        return jnp.sum(out), out

    (_, out), gradients = jax.jit(jax.value_and_grad(total, (0, 1, 2), has_aux=True))(q, k, v)
    assert bool(jnp.isfinite(out).all())
    assert all(bool(jnp.isfinite(gradient).all()) for gradient in gradients)
    np.testing.assert_allclose(out[:, :100], short, rtol=TOLERANCE, atol=TOLERANCE)


def test_bfloat16_stays_close_to_float32():
    q, k, v = _inputs(4, 1, 300, 2, 1, 16, 16)
    out, lse = causal_attention(
        *(jnp.asarray(x, jnp.bfloat16) for x in (q, k, v)), implementation="xla", return_lse=True
    )
    assert out.dtype == jnp.bfloat16
    # bfloat16 keeps 8 bits; outputs are averages of values of order one, logits of size up to four.
    np.testing.assert_allclose(out.astype(jnp.float32), causal_attention(q, k, v), atol=5e-2)
    assert lse.dtype == jnp.float32


@pytest.mark.parametrize("sliding_window", [long(None), 60])
def test_splash_equals_naive_form(sliding_window):
    # Interpreted on CPU; 200 tokens are padded to 256, widths 8 and 5 to 128.
    q, k, v = _inputs(5, 2, 200, 4, 2, 8, 5)
    segments = random_documents(5, 2, 200, most=4)
    out, lse = causal_attention(
        q, k, v, segments=segments, sliding_window=sliding_window, implementation="splash", return_lse=True
    )
    expected, expected_lse = _naive(q, k, v, segments, sliding_window)
    np.testing.assert_allclose(out, expected, rtol=TOLERANCE, atol=TOLERANCE)
    np.testing.assert_allclose(lse, expected_lse, rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize("return_lse", [long(False), True])
def test_splash_gradients_equal_xla(return_lse):
    q, k, v = _inputs(6, 1, 130, 2, 1, 8, 8)
    segments = random_documents(6, 1, 130, most=4)

    def total(q, k, v, implementation):
        out = causal_attention(q, k, v, segments=segments, implementation=implementation, return_lse=return_lse)
        return jnp.sum(jnp.square(out[0] if return_lse else out))

    gradient = jax.jit(jax.grad(total, (0, 1, 2)), static_argnums=3)
    pairs = zip(gradient(q, k, v, "splash"), gradient(q, k, v, "xla"), strict=True)
    for actual, reference in pairs:
        np.testing.assert_allclose(actual, reference, rtol=1e-4, atol=2e-5)  # both float32


def test_log_sum_exp_carries_no_gradient():
    q, k, v = _inputs(7, 1, 10, 1, 1, 4, 4)
    gradient = jax.grad(lambda q: jnp.sum(causal_attention(q, k, v, return_lse=True)[1]))(q)
    assert not gradient.any()


def test_memory_is_linear_in_the_sequence():
    def compiled(length):
        q = jax.ShapeDtypeStruct((1, length, 2, 8), jnp.float32)
        k = jax.ShapeDtypeStruct((1, length, 1, 8), jnp.float32)
        run = lambda q, k, v: jnp.sum(causal_attention(q, k, v, implementation="xla"))  # noqa: E731
        return jax.jit(jax.grad(run, (0, 1, 2))).lower(q, k, k).compile()

    shorter, longer = compiled(2048), compiled(4096)
    # A buffer that grew with T * T would quadruple; 2.2 leaves room for padding and alignment.
    ratio = longer.memory_analysis().temp_size_in_bytes / shorter.memory_analysis().temp_size_in_bytes
    assert ratio <= 2.2
    shapes = re.findall(r"\w+\[([\d,]+)\]", longer.as_text())
    assert max(int(np.prod([int(n) for n in shape.split(",") if n])) for shape in shapes) < 4096 * 4096 / 4


def test_bands_cover_every_chunk_once_and_reach_every_key():
    for chunks in range(1, 40):
        for sliding_window in (None, 1, 2, 128, 129, 130, 1000):
            bands = attention.make_bands(chunks, 128, sliding_window)
            assert [b.start for b in bands] == [0, *(b.stop for b in bands[:-1])] and bands[-1].stop == chunks
            for band in bands:
                for chunk in range(band.start, band.stop):
                    first = int(band.first_key(chunk, 128))
                    needed = 0 if sliding_window is None else max(0, chunk * 128 - sliding_window + 1)
                    assert first <= needed and first + band.keys >= (chunk + 1) * 128
                    assert first + band.keys <= chunks * 128


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"implementation": "flash"}, "unknown implementation 'flash'.*xla.*cudnn.*splash"),
        ({"implementation": "cudnn"}, "cannot keep documents apart"),
        ({"implementation": "cudnn", "segments": None}, "needs bfloat16 or float16"),
        ({"sliding_window": 0}, "sliding_window must be a whole number, at least 1"),
        ({"segments": np.ones((1, 3), np.int32)}, "segments must be"),
        ({"k": np.zeros((1, 8, 3, 4), np.float32)}, "differ in batch, length, KV heads or width"),
        ({"q": np.zeros((1, 8, 3, 4), np.float32)}, "3 query heads cannot share 2 KV heads"),
        ({"q": np.zeros((8, 3, 4), np.float32)}, "must be \\[B, T, heads, dim\\]"),
    ],
)
def test_errors_name_what_is_wrong(change, message):
    q, k, v = _inputs(0, 1, 8, 4, 2, 4, 4)
    arguments = {"q": q, "k": k, "v": v, "segments": np.ones((1, 8), np.int32), **change}
    with pytest.raises(ValueError, match=message):
        causal_attention(arguments.pop("q"), arguments.pop("k"), arguments.pop("v"), **arguments)


def test_named_cudnn_does_not_fall_back():
    if jax.default_backend() == "gpu":
        pytest.skip("cuDNN may be there")
    q, k, v = (jnp.asarray(x, jnp.bfloat16) for x in _inputs(0, 1, 8, 4, 2, 8, 8))
    with pytest.raises(ValueError, match="needs an NVIDIA GPU"):
        causal_attention(q, k, v, implementation="cudnn")


def test_document_starts_are_first_columns():
    segments = jnp.asarray([[1, 1, 2, 2, 2, 0, 0], [1, 0, 0, 0, 0, 0, 0]])
    starts = document_starts(segments)
    np.testing.assert_array_equal(starts, [[0, 0, 2, 2, 2, 5, 5], [0, 1, 1, 1, 1, 1, 1]])
