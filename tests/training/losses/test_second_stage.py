"""The second stage: the cross entropy among chosen keys, against a float64 form with loops."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from butler_jax.training.losses import ErrorRule, ErrorTarget, attend_with_cross_entropy
from butler_jax.training.losses.target import PENALTY
from tests.marked import slow
from tests.training.losses.naive import assert_close
from tests.training.losses.test_target import RECENT, SINKS, count_keys, make_far_keys, make_inputs

LENGTH = 40


def softmax(x):
    weights = np.exp(x - x.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True)


def naive(arrays, target, segments, budget, normalised, penalty=PENALTY):
    """The summed loss with centred errors, or without a target with attention weights."""
    q, k, v, q_imp, k_imp = (np.asarray(a, np.float64) for a in arrays)
    batch, length, heads, dim = q.shape
    group, total = heads // k.shape[2], 0.0
    for b, kv, t in np.ndindex(batch, k.shape[2], length):
        start = int(np.argmax(segments[b] == segments[b, t]))
        keys = np.arange(start, t + 1)
        contested = (keys >= start + SINKS) & (keys <= t - RECENT)
        if segments[b, t] == 0 or not contested.any():
            continue
        own = slice(kv * group, (kv + 1) * group)
        true = softmax(q[b, t, own] @ k[b, keys, kv].T / dim**0.5)
        scores = q_imp[b, t, own] @ k_imp[b, keys, kv].T / q_imp.shape[-1] ** 0.5
        counts = count_keys(target, b, t, keys, contested)
        lse = np.log((counts * np.exp(scores))[:, contested].sum(axis=-1))
        logs = scores - lse[:, None] if normalised else scores
        if target is not None:
            moved = v[b, keys, kv][None] - (true @ v[b, keys, kv])[:, None]
            sizes = np.sqrt(np.einsum("gsd,gde,gse->gs", moved, np.asarray(target.gram[kv], np.float64), moved))
            true = true * counts / np.sum(true * counts, axis=-1, keepdims=True) * sizes / target.norm[b, t]
            offset = np.asarray(target.offset, np.float64)[b, t, own]
            logs = logs + offset[:, None]
            miss = offset - np.log(np.maximum(true[:, contested].sum(axis=-1), 1e-6))
            total += penalty * np.sum((miss if normalised else miss + lse) ** 2)
        most = max(int(np.ceil(budget * len(keys))), SINKS + RECENT) - SINKS - RECENT  # of the contested
        chosen = np.flatnonzero(contested)[np.argsort(-logs.max(axis=0)[contested], kind="stable")[:most]]
        if len(chosen):
            predicted = softmax(scores[:, chosen] + np.log(counts[chosen]))
            total -= np.sum(true[:, chosen] * np.log(predicted))
    return total


@pytest.mark.parametrize(
    ("errors", "far", "budget", "normalised"),
    [
        (True, True, 0.4, True),
        (True, False, 0.4, False),
        slow(True, False, 0.4, True),
        slow(False, False, 0.4, True),
        slow(True, False, 1.0, True),
    ],
)
def test_the_loss_among_chosen_keys_equals_the_naive_form(errors, far, budget, normalised):
    arrays, target = make_inputs(LENGTH, 4, 2)
    target = target._replace(far=make_far_keys(LENGTH) if far else None)
    segments = np.ones((2, LENGTH), np.int32)
    segments[1, LENGTH // 3 :], segments[1, -4:] = 2, 0
    small = [np.float32(a) for a in arrays]

    def loss(q_imp, k_imp):
        own = ErrorTarget(*map(np.float32, target[:3]), target.far) if errors else None
        options = dict(segments=segments, sinks=SINKS, recent=RECENT, target=own, chosen=budget)
        rule = ErrorRule("centred", normalised=normalised) if errors else None
        return attend_with_cross_entropy(*small[:3], q_imp, k_imp, rule=rule, **options)[1]

    run = jax.jit(jax.value_and_grad(loss, (0, 1)))
    value, gradients = run(*small[3:])
    given = target if errors else None
    assert_close(value, naive(arrays, given, segments, budget, normalised))
    step, change = 1e-6, [np.random.default_rng(0).normal(size=a.shape) for a in arrays[3:]]  # too small to choose anew
    moved = [[*arrays[:3], *(a + s * c for a, c in zip(arrays[3:], change, strict=True))] for s in (step, -step)]
    ahead, back = (naive(one, given, segments, budget, normalised, penalty=0) for one in moved)  # it moves no scores
    slope = sum(float(np.sum(np.float64(g) * c)) for g, c in zip(gradients, change, strict=True))
    np.testing.assert_allclose(slope, (ahead - back) / (2 * step), rtol=1e-3)


def test_kernels_cannot_choose():
    arrays = [np.float32(a) for a in make_inputs(LENGTH, 4, 2)[0]]
    with pytest.raises(ValueError, match="by the form \"fused\", not by 'two_calls'"):
        attend_with_cross_entropy(*arrays, chosen=0.5, form="two_calls")
