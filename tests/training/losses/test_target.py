"""Errors in the residual stream as the target of the cross entropy, against a float64 form with loops."""

from __future__ import annotations

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from butler_jax.training.losses import ErrorRule, ErrorTarget, FarKeys, attend_with_cross_entropy, cross_entropy
from butler_jax.training.losses.target import PENALTY, offset_penalty
from tests.marked import long, slow
from tests.training.losses.naive import assert_close

SINKS, RECENT, ROOM = 2, 3, 6


def make_inputs(length, heads, kv_heads, dim=8, rank=4):
    """q, k, v, q_imp, k_imp, and gram, norm and offset of the target."""
    random = np.random.default_rng(length)
    shapes = (heads, dim), (kv_heads, dim), (kv_heads, dim), (heads, rank), (kv_heads, rank)
    arrays = [random.normal(size=(2, length, *shape)) for shape in shapes]
    output = random.normal(size=(kv_heads, heads // kv_heads, dim, ROOM))
    gram = np.einsum("kgde,kgfe->kgdf", output, output)
    target = ErrorTarget(gram, np.exp(random.normal(size=(2, length))), random.normal(size=(2, length, heads)))
    return arrays, target


def make_far_keys(length):
    """Keys of the first row's first half that count 5.5 times for its second half, and one of the second row."""
    end, log_count = np.zeros((2, length), np.int32), np.zeros((2, length), np.float32)
    end[0, length // 2 :], log_count[0, length // 2 :] = length // 2, np.log(5.5)
    end[1, length // 3 + 8 :], log_count[1, length // 3 + 8 :] = length // 3 + SINKS + 1, np.log(90.0)
    return FarKeys(end, log_count)


def count_keys(target, row, column, keys, contested):
    """How many keys each key stands for."""
    counts = np.ones(len(keys))
    if target is not None and target.far is not None:
        far = (keys < target.far.end[row, column]) & contested
        counts[far] = np.exp(np.float64(target.far.log_count[row, column]))
    return counts


def naive(arrays, target, rule, segments):
    """The summed cross entropy and the summed penalty of the offset in float64, pair by pair."""
    q, k, v, q_imp, k_imp = (np.asarray(a, np.float64) for a in arrays)
    gram, norm, offset = (np.asarray(a, np.float64) for a in target[:3])
    batch, length, heads, dim = q.shape
    group, total, penalty = heads // k.shape[2], 0.0, 0.0
    for b, h, t in np.ndindex(batch, heads, length):
        start = int(np.argmax(segments[b] == segments[b, t]))
        keys = np.arange(start, t + 1)
        contested = (keys >= start + SINKS) & (keys <= t - RECENT)
        if segments[b, t] == 0 or not contested.any():
            continue
        counts = count_keys(target, b, t, keys, contested)
        logits = k[b, keys, h // group] @ q[b, t, h] / dim**0.5
        weights = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
        values = v[b, keys, h // group]
        moved = values - weights @ values if rule.error == "centred" else values
        sizes = np.sqrt(np.einsum("sd,de,se->s", moved, gram[h // group, h % group], moved))
        weights = weights * counts / np.sum(weights * counts)
        errors = (weights * (1.0 if rule.error == "weight" else sizes))[contested] / norm[b, t]
        scores = (k_imp[b, keys, h // group] @ q_imp[b, t, h])[contested] / q_imp.shape[-1] ** 0.5
        logs = np.log(counts[contested])
        lse = np.log(np.exp(scores + logs).sum())
        miss = offset[b, t, h] + (0 if rule.normalised else lse) - np.log(max(errors.sum(), 1e-6))
        total += np.sum(errors * (lse - scores - logs))
        penalty += PENALTY * miss**2
    return total, penalty


@pytest.mark.parametrize(
    ("error", "normalised", "length", "heads", "kv_heads", "form", "far"),
    [
        *itertools.product(["weight", "value", "centred"], [False, True], [40], [4], [2], ["fused"], [False]),
        *itertools.product(["centred"], [False, True], [40], [4], [2], ["fused"], [True]),
        *(
            long(e, n, 140, 3, 1, "fused", e == "value")
            for e, n in itertools.product(["weight", "value", "centred"], [False, True])
        ),
        *(slow("centred", True, 140, 3, 1, "flash", far) for far in (False, True)),
    ],
)
def test_loss_and_gradients_equal_the_naive_form(error, normalised, length, heads, kv_heads, form, far):
    arrays, target = make_inputs(length, heads, kv_heads)
    target = target._replace(far=make_far_keys(length) if far else None)
    segments = np.ones((2, length), np.int32)
    segments[1, length // 3 :], segments[1, -4:] = 2, 0
    rule = ErrorRule(error, normalised=normalised)
    small = [np.float32(a) for a in arrays]

    def loss(q_imp, k_imp, offset):
        given = (*small[:3], q_imp, k_imp)
        own = ErrorTarget(np.float32(target.gram), np.float32(target.norm), offset, target.far)
        options = dict(segments=segments, sinks=SINKS, recent=RECENT, target=own, rule=rule, form=form)
        return attend_with_cross_entropy(*given, **options)[1]

    own = (small[3], small[4], np.float32(target.offset))
    value, gradients = jax.jit(jax.value_and_grad(loss, (0, 1, 2)))(*own)
    assert_close(value, sum(naive(arrays, target, rule, segments)))
    # Along a random direction, by central differences of the float64 form: the error of the step is below 1e-7.
    random = np.random.default_rng(1)
    for number, gradient in enumerate(gradients):
        way = random.normal(size=gradient.shape)

        def at(size, number=number, way=way):
            moved = [arrays[3], arrays[4], target.offset]
            moved[number] = moved[number] + size * way
            # The penalty moves the offset, and the cross entropy moves the scores.
            return naive([*arrays[:3], *moved[:2]], target._replace(offset=moved[2]), rule, segments)[number == 2]

        wanted = (at(1e-5) - at(-1e-5)) / 2e-5
        # Entries differ in sign: the error is relative to the sum of their magnitudes.
        size = np.abs(np.asarray(gradient, np.float64) * way).sum()
        assert abs(np.sum(np.asarray(gradient, np.float64) * way) - wanted) <= 1e-5 * size


@pytest.mark.parametrize(
    ("form", "implementation", "message"),
    [
        ("two_calls", "xla", "form 'two_calls' is unknown for a target of errors; .*'fused', 'flash'"),
        ("fused", "splash", "\"fused\" runs on \"xla\" only, not on 'splash'; use 'flash' or None"),
    ],
)
def test_a_target_has_forms_of_its_own(form, implementation, message):
    arrays, target = make_inputs(20, 2, 2)
    arrays, target = [np.float32(a) for a in arrays], ErrorTarget(*map(np.float32, target[:3]))
    with pytest.raises(ValueError, match=message):
        attend_with_cross_entropy(
            *arrays, target=target, rule=ErrorRule("value"), form=form, implementation=implementation
        )


def test_the_form_follows_the_device(monkeypatch):
    """On TPU the kernels, elsewhere one pass in XLA; both are asked for by name where the device is another."""
    chosen = functools.partial(cross_entropy._choose_form, None, of_errors=True)
    assert (chosen("splash"), chosen("xla")) == ("flash", "fused")
    monkeypatch.setattr(cross_entropy, "platform", lambda: "gpu")
    with pytest.raises(ValueError, match='form "flash" is for TPU, the platform is gpu; use "xla"'):
        chosen("cudnn")


def test_a_row_that_does_not_count_adds_no_penalty_where_the_rows_are_a_constant():
    """A compiler may square the factors of a product one by one, and the log-sum-exp of no key is -1e30."""
    lse, use = jnp.asarray([1.0, -1e30]), np.asarray([1.0, 0.0], np.float32)

    @jax.jit
    def penalty(offset, lse):
        return offset_penalty(offset, lse, jnp.ones(2), jnp.asarray(use), ErrorRule("weight"))

    total, gradient = penalty(jnp.zeros(2), lse)
    assert total == pytest.approx(PENALTY) and gradient.tolist() == pytest.approx([2 * PENALTY, 0.0])
