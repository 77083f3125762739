"""The cross entropy and its gradients against a float64 form that builds the whole square."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from butler_jax.training.losses.cross_entropy import FORMS, attend_with_cross_entropy
from tests.marked import long, slow
from tests.tiny_models import random_documents
from tests.training.losses.naive import HEADS, assert_close, assert_equals_naive, random_inputs


def cross_entropy(q, k, q_imp, k_imp, **options):
    """Loss and count where nobody asks for the output."""
    return attend_with_cross_entropy(q, k, k, q_imp, k_imp, **options)[1:]


def named(always):
    """The counts of tokens that are always read, as options."""
    return {"sinks": always[0], "recent": always[1]}


@pytest.mark.slow
@settings(max_examples=12, deadline=None)
@given(
    length=st.sampled_from([1, 5, 128, 131, 200]),
    heads=st.sampled_from(HEADS),
    sliding_window=st.sampled_from([None, 3, 140]),
    documents=st.booleans(),
    always=st.sampled_from([(0, 0), (4, 8), (0, 1), (130, 2)]),
    form=st.sampled_from(FORMS),
)
# Every row has one contested key or none: the loss is exactly 0.
@example(length=200, heads=(2, 2, 2), sliding_window=3, documents=False, always=(130, 2), form="fused")
@example(length=200, heads=(4, 2, 2), sliding_window=3, documents=False, always=(130, 2), form="two_calls")
def test_cross_entropy_equals_naive_form_in_float64(length, heads, sliding_window, documents, always, form):
    inputs = q, k, *_ = random_inputs(length, 2, length, *heads)
    segments = random_documents(length, 2, length) if documents else None
    options = {"segments": segments, "sliding_window": sliding_window, **named(always)}

    def loss(q_imp, k_imp):
        return cross_entropy(q, k, q_imp, k_imp, implementation="xla", form=form, **options)

    assert_equals_naive("cross entropy", loss, inputs, **options)


@pytest.mark.parametrize(
    ("form", "sliding_window", "always"),
    [
        ("fused", 200, (4, 150)),
        ("two_calls", 50, (4, 8)),
        slow("fused", None, (4, 8)),
        long("fused", 200, (0, 0)),
        long("two_calls", 50, (0, 0)),
    ],
)
def test_cross_entropy_over_many_chunks_equals_naive_form(form, sliding_window, always):
    # 660 tokens: six chunks in three bands, six documents and padding.
    inputs = q, k, v, *_ = random_inputs(0, 1, 660, 2, 1, 1)
    options = {"segments": random_documents(1, 1, 660), "sliding_window": sliding_window, **named(always)}

    def loss(q_imp, k_imp):
        return attend_with_cross_entropy(q, k, v, q_imp, k_imp, implementation="xla", form=form, **options)[1:]

    assert_equals_naive("cross entropy", loss, inputs, **options)


@pytest.mark.parametrize(
    ("heads", "sinks", "recent"), [long((4, 2, 2), 4, 8), slow((4, 2, 2), 0, 0), ((4, 2, 4), 2, 1)]
)
def test_two_calls_and_fused_give_the_same(heads, sinks, recent):
    q, k, v, q_imp, k_imp = random_inputs(2, 2, 150, *heads)
    options = {"segments": random_documents(2, 2, 150), "sliding_window": 70, "sinks": sinks, "recent": recent}

    def run(q_imp, k_imp, form):
        output, loss, count = attend_with_cross_entropy(
            q, k, v, q_imp, k_imp, implementation="xla", form=form, **options
        )
        return loss, (output, count)

    run = jax.jit(jax.value_and_grad(run, (0, 1), has_aux=True), static_argnums=2)
    (loss, aux), gradients = run(q_imp, k_imp, "fused")
    (other, other_aux), other_gradients = run(q_imp, k_imp, "two_calls")
    for x, y in zip((loss, *aux, *gradients), (other, *other_aux, *other_gradients), strict=True):
        assert_close(x, np.asarray(y, np.float64))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("documents", "sinks", "recent"), [(True, 4, 8), long(True, 0, 0), long(False, 0, 0), long(False, 4, 8)]
)
def test_splash_cross_entropy_equals_naive_form(documents, sinks, recent):
    inputs = q, k, v, *_ = random_inputs(3, 1, 140, 4, 2, 2)
    segments = random_documents(3, 1, 140) if documents else None
    options = {"segments": segments, "sinks": sinks, "recent": recent}

    def loss(q_imp, k_imp):
        return attend_with_cross_entropy(q, k, v, q_imp, k_imp, implementation="splash", **options)[1:]

    assert_equals_naive("cross entropy", loss, inputs, **options)


def test_scores_of_keys_that_are_always_read_do_not_matter():
    q, k, _, q_imp, k_imp = random_inputs(10, 1, 60, 2, 1, 1)
    other = k_imp.copy()
    other[:, :4] += 50.0  # the sinks; of the recent, each row's own
    run = jax.jit(lambda k_imp: cross_entropy(q, k, q_imp, k_imp, sinks=4, recent=60 - 4)[0])
    assert run(other) == run(k_imp) == 0  # no row has another key
    run = jax.jit(lambda k_imp: cross_entropy(q, k, q_imp, k_imp, sinks=4, recent=8)[0])
    np.testing.assert_array_equal(run(other), run(k_imp))
    other[:, 30] += 1.0
    assert run(other) != run(k_imp)


def test_frozen_layers_are_not_differentiated_through_a_scan():
    # The loss of each layer is taken inside a scan; the carried stream must bring no backward pass with it.
    q, k, v, q_imp, k_imp = random_inputs(9, 1, 40, 2, 2, 2)
    weights = np.random.default_rng(0).normal(size=(3, 8, 8)).astype(np.float32)

    def total(q_imp):
        def layer(x, weight):
            x = jnp.sin(x @ weight)
            output, loss, _ = attend_with_cross_entropy(x, k, v, q_imp, k_imp)
            return x + output, loss

        return jnp.sum(jax.lax.scan(layer, q, weights)[1])

    def through(q_imp):  # the same with the stream cut by hand
        def layer(x, weight):
            x = jnp.sin(jax.lax.stop_gradient(x) @ weight)
            output, loss, _ = attend_with_cross_entropy(x, k, v, q_imp, k_imp)
            return jax.lax.stop_gradient(x + output), loss

        return jnp.sum(jax.lax.scan(layer, q, weights)[1])

    np.testing.assert_array_equal(jax.grad(total)(q_imp), jax.grad(through)(q_imp))
    assert str(jax.make_jaxpr(jax.grad(total))(q_imp)).count(" cos ") == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"recent": -1}, "sinks and recent must be 0 or more, got 0 and -1"),
        ({"form": "one"}, "form 'one' is unknown.*fused.*two_calls"),
        ({"form": "fused", "implementation": "splash"}, 'runs on "xla" only'),
        ({"implementation": "flash"}, "unknown implementation 'flash'"),
        ({"implementation": "cudnn", "segments": np.ones((1, 8), np.int32)}, "cannot keep documents apart"),
        ({"q_imp": np.zeros((1, 8, 2, 4), np.float32)}, "q_imp must be"),
        ({"q_imp": np.zeros((1, 8, 4, 3), np.float32)}, "the same width R, got 3 and 4"),
        ({"k_imp": np.zeros((1, 8, 3, 4), np.float32)}, "k_imp must have 2 .KV. or 4 .query. heads, got 3"),
    ],
)
def test_errors_name_what_is_wrong(change, message):
    arguments = dict(zip(("q", "k", "v", "q_imp", "k_imp"), random_inputs(0, 1, 8, 4, 2, 2), strict=True))
    with pytest.raises(ValueError, match=message):
        attend_with_cross_entropy(**{**arguments, **change})


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("always", [slow((0, 0)), (4, 8)])
def test_the_target_has_the_soft_cap_and_the_sinks_of_the_attention(form, always):
    """A sink takes its share of the target: what goes to keys sums to less than 1."""
    length, cap, sink_logits = 140, 0.7, jnp.asarray([0.5, 3.0, -1.0, 2.0])
    q, k, v, q_imp, k_imp = random_inputs(3, 2, length, 4, 2, 2)
    rows = np.arange(length)
    causal = jnp.asarray(rows <= rows[:, None])[None, None]
    contested = jnp.asarray((rows <= rows[:, None] - always[1]) & (rows >= always[0]))[None, None]

    def products(q, k):
        return jnp.einsum("bthd,bshd->bhts", q, jnp.repeat(k, 2, axis=2), precision="highest") * q.shape[-1] ** -0.5

    def square(q_imp, k_imp):
        logits = jnp.where(causal, cap * jnp.tanh(products(q, k) / cap), -jnp.inf)
        sinks = jnp.broadcast_to(sink_logits[None, :, None, None], (2, 4, length, 1))
        target = jax.nn.softmax(jnp.concatenate([logits, sinks], axis=-1), axis=-1)[..., :-1]
        found = jax.nn.log_softmax(jnp.where(contested, products(q_imp, k_imp), -1e30), axis=-1)
        loss = -jnp.sum(jnp.where(contested, target * found, 0))
        return loss, jnp.einsum("bhts,bshd->bthd", target, jnp.repeat(v, 2, axis=2))

    def ours(q_imp, k_imp):
        options = dict(softcap=cap, sink_logits=sink_logits, implementation="xla", form=form, **named(always))
        output, loss, _ = attend_with_cross_entropy(q, k, v, q_imp, k_imp, **options)
        return loss, output

    (wanted, output), expected = jax.value_and_grad(square, (0, 1), has_aux=True)(q_imp, k_imp)
    (loss, found), gradients = jax.jit(jax.value_and_grad(ours, (0, 1), has_aux=True))(q_imp, k_imp)
    np.testing.assert_allclose(loss, wanted, rtol=1e-5)
    for a, b in zip([found, *gradients], [output, *expected], strict=True):  # both are float32
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * float(jnp.abs(b).max()))
