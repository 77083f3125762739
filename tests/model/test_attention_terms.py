"""Attention whose logits are capped and whose rows have a sink, against the definition in float64."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from butler_jax.model.attention import causal_attention
from tests.tiny_models import random_documents

TERMS = [{"softcap": 0.8}, {"sink_logits": True}, {"softcap": 0.8, "sink_logits": True}]


def inputs(terms, length, dim=8):
    rng = np.random.default_rng(0)
    shapes = (2, length, 4, dim), (2, length, 2, dim), (2, length, 2, dim)
    arrays = [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes]
    sinks = jnp.asarray(rng.normal(size=4) * 2, jnp.float32)
    return arrays, {**terms, "sink_logits": sinks} if "sink_logits" in terms else terms


def square(q, k, v, segments, sliding_window, softcap=None, sink_logits=None):
    """Output and log-sum-exp from the whole square, in the dtype of q."""
    k, v = (jnp.repeat(a, 2, axis=2) for a in (k, v))
    logits = jnp.einsum("bthd,bshd->bhts", q, k, precision="highest") * q.shape[-1] ** -0.5
    logits = logits if softcap is None else softcap * jnp.tanh(logits / softcap)
    rows = np.arange(q.shape[1])
    seen = (rows <= rows[:, None]) & (rows > rows[:, None] - sliding_window)
    seen = jnp.asarray(seen)[None] & (segments[:, :, None] == segments[:, None, :])
    logits = jnp.where(seen[:, None], logits, -jnp.inf)
    if sink_logits is not None:
        column = jnp.broadcast_to(sink_logits[None, :, None, None], (*logits.shape[:3], 1))
        logits = jnp.concatenate([logits, column], axis=-1)
    weights = jax.nn.softmax(logits, axis=-1)[..., : q.shape[1]]
    out = jnp.einsum("bhts,bshd->bthd", weights, v, precision="highest")
    return out, jnp.moveaxis(jax.nn.logsumexp(logits, axis=-1), 1, 2)


@pytest.mark.parametrize("implementation", ["xla", pytest.param("splash", marks=pytest.mark.slow)])
@pytest.mark.parametrize("terms", TERMS, ids=["soft cap", "sinks", "both"])
def test_output_log_sum_exp_and_gradients_equal_the_definition(implementation, terms):
    (q, k, v), terms = inputs(terms, 200)
    segments = jnp.asarray(random_documents(1, 2, 200, most=3))
    how = dict(segments=segments, sliding_window=60)
    names = [name for name in ("sink_logits",) if name in terms]
    kept = {name: value for name, value in terms.items() if name not in names}
    arrays = (q, k, v, *(terms[name] for name in names))

    def total(attend, *arrays):
        q, k, v, *more = arrays
        out, lse = attend(q, k, v, **kept, **dict(zip(names, more, strict=True)))
        real = (segments > 0)[..., None]
        return jnp.sum(jnp.where(real[..., None], out, 0) ** 2), (out, jnp.where(real, lse, 0))

    ours = partial(causal_attention, implementation=implementation, return_lse=True, **how)
    forms = (ours, partial(square, **how))
    (found, wanted) = (
        jax.jit(jax.value_and_grad(partial(total, form), tuple(range(len(arrays))), has_aux=True))(*arrays)
        for form in forms
    )
    for a, b in zip(jax.tree.leaves(found[0][1]), jax.tree.leaves(wanted[0][1]), strict=True):
        real = np.asarray(segments > 0)
        np.testing.assert_allclose(np.asarray(a)[real], np.asarray(b)[real], atol=1e-5)
    for a, b in zip(found[1], wanted[1], strict=True):  # sums over 60 keys and 4 heads, and over all rows for sinks
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


def test_a_row_that_sees_no_key_gives_all_to_its_sink():
    (q, k, v), terms = inputs({"sink_logits": True}, 5)
    low = jnp.full_like(k, -jnp.inf)
    out, lse = causal_attention(jnp.abs(q) + 1, low, v, return_lse=True, implementation="xla", **terms)
    assert not out.any()
    np.testing.assert_allclose(lse, np.broadcast_to(terms["sink_logits"], lse.shape), atol=1e-6)


def test_a_large_sink_takes_all_and_does_not_overflow():
    (q, k, v), _ = inputs({}, 5)
    out = causal_attention(q, k, v, sink_logits=jnp.full(4, 200.0), implementation="xla")
    assert not out.any()


@pytest.mark.parametrize("terms", TERMS[:2])
def test_cudnn_is_refused(terms):
    (q, k, v), terms = inputs(terms, 5)
    with pytest.raises(ValueError, match=r'"cudnn" attention has neither a soft cap nor sinks, .* use "xla"'):
        causal_attention(q, k, v, implementation="cudnn", **terms)
