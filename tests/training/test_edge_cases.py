"""Losses and training steps of empty rows, and of numbers that are not finite."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.float64 import distillation_loss
from butler_jax.model.decoder import BaseModel
from butler_jax.predictors import make_predictor
from butler_jax.predictors.config import PredictorConfig
from butler_jax.training.config import TrainConfig
from butler_jax.training.losses.cross_entropy import attend_with_cross_entropy
from butler_jax.training.losses.squared_error import sum_squared_errors
from butler_jax.training.objective import DistillationObjective
from butler_jax.training.step import learning_schedule, make_optimiser, make_train_step, start_state
from tests.edge_cases import BASE, NAN, normal, text
from tests.marked import long, slow


@pytest.fixture(scope="module")
def model() -> BaseModel:
    return BaseModel(BASE, jax.random.key(0))


@pytest.fixture(scope="module")
def predictor():
    return make_predictor(BASE, PredictorConfig(rank=8, stride=2))


FORMS = ("fused", "two_calls")


def loss_inputs(length: int, rows: int = 1):
    return (
        normal(0, rows, length, 4, 8),
        normal(1, rows, length, 2, 8),
        normal(3, rows, length, 4, 4),
        normal(4, rows, length, 2, 4),
    )


def value_and_gradients(name, q, k, p, r, **options):
    """((loss, count), (dp, dr)) of one of the losses."""

    def loss(p, r):
        if name == "squared_error":
            return sum_squared_errors(q, k, p, r, **options)
        return attend_with_cross_entropy(q, k, k, p, r, **options)[1:]

    return jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(p, r)


@pytest.mark.parametrize(
    "options", [slow({"form": "fused"}), {"form": "two_calls"}, {}], ids=["fused", "two calls", "square"]
)
def test_an_empty_row_weighs_nothing_in_a_loss(options):
    name = "cross_entropy" if options else "squared_error"
    options = {**options, **({"sinks": 2, "recent": 3} if options else {})}
    arrays = loss_inputs(16, 2)
    segments = jnp.asarray([[1] * 11 + [2] * 1 + [0] * 4, [0] * 16], jnp.int32)  # a document of one token too
    (loss, count), (dp, dr) = value_and_gradients(name, *arrays, segments=segments, **options)
    (wanted, number), alone = value_and_gradients(name, *(a[:1] for a in arrays), segments=segments[:1], **options)
    assert np.isfinite(loss) and count == number and loss == pytest.approx(float(wanted), rel=1e-5)
    for gradient, own in zip((dp, dr), alone, strict=True):
        assert np.isfinite(gradient).all() and not np.asarray(gradient)[1].any()
        assert not np.asarray(gradient)[0, 12:].any()
        np.testing.assert_allclose(gradient[:1], own, atol=1e-5)  # float32 sums of another batch size
    (loss, count), gradients = value_and_gradients(name, *arrays, segments=jnp.zeros((2, 16), jnp.int32), **options)
    assert loss == count == 0 and not any(np.asarray(g).any() for g in gradients)


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_sinks_and_recent_beyond_the_length_leave_no_loss(form):
    for length, sinks, recent in ((1, 0, 1), (1, 4, 8), (9, 4, 8), (9, 0, 9), (9, 9, 0)):
        found = value_and_gradients("cross_entropy", *loss_inputs(length), sinks=sinks, recent=recent, form=form)
        assert found[0] == (0, 0) and not any(np.asarray(g).any() for g in found[1])
    (loss, count), _ = value_and_gradients("cross_entropy", *loss_inputs(1), form=form)
    assert count == 4 and loss == pytest.approx(0, abs=1e-6)  # the entropy of a distribution over one key is 0


@pytest.mark.parametrize(("sinks", "recent"), [(0, 0), (2, 3)])
def test_a_row_without_true_attention_weighs_nothing(sinks, recent):
    q, k, p, r = loss_inputs(20)
    k = jnp.abs(k) + 0.1
    strange = q.at[0, 9, 1].set(-1e34)  # no logit above -1e30
    options = {"sinks": sinks, "recent": recent}
    (loss, _), (dp, dr) = value_and_gradients("cross_entropy", strange, 9 * k, p, r, form="fused", **options)
    # Causal rows: what row 9 adds is the loss up to it less the loss before it; of one query head alone here.
    head = [np.asarray(a)[:, :, 1:2] if a.shape[2] == 4 else np.asarray(a)[:, :, :1] for a in (q, 9 * k, p, r)]
    own = [distillation_loss("cross entropy", *(a[:, :t] for a in head), **options)[0] for t in (10, 9)]
    whole = distillation_loss("cross entropy", *map(np.asarray, (q, 9 * k, p, r)), **options)[0]
    assert float(loss) == pytest.approx(whole - (own[0] - own[1]), rel=1e-5)
    assert not np.asarray(dp)[0, 9, 1].any() and np.isfinite(dr).all()


@pytest.mark.parametrize("value", [NAN, 3e38])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("sinks", "recent"), [(0, 0), (2, 3)])
def test_a_loss_of_true_logits_that_are_no_numbers_is_not_finite(value, form, sinks, recent):
    q, k, p, r = loss_inputs(20)
    strange = q.at[0, 9, 1].set(value)
    options = {"sinks": sinks, "recent": recent, "form": form}
    (loss, _), _ = value_and_gradients("cross_entropy", strange, jnp.abs(9 * k) + 0.1, p, r, **options)
    assert not np.isfinite(loss)
    (loss, _), _ = value_and_gradients("squared_error", strange, jnp.abs(9 * k) + 0.1, p, r)
    assert not np.isfinite(loss)


@pytest.mark.parametrize("form", FORMS)
def test_a_score_of_minus_infinity_where_attention_goes_is_an_infinite_loss(form):
    q, k, p, r = loss_inputs(20)
    p = p.at[0, 9, 1].set(3e38)
    (loss, _), _ = value_and_gradients("cross_entropy", q, k, p, -jnp.abs(9 * r) - 0.1, form=form)
    assert not np.isfinite(loss)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "objective"),
    [("lookahead", "cross_entropy"), ("producer", "squared_error"), long("contextual", "cross_entropy")],
)
def test_a_batch_of_padding_trains_nothing(model, kind, objective):
    predictor = make_predictor(BASE, PredictorConfig(kind=kind, rank=8, stride=2, hidden=16))
    config = TrainConfig(predictor=PredictorConfig(kind=kind), length=16, batch_size=2, weight_decay=0.0)
    optimiser = make_optimiser(config, 1e-2)
    gradients = DistillationObjective(objective, sinks=2, recent=3).differentiate
    rate = learning_schedule(config, 1e-2)
    step = make_train_step(gradients, config, optimiser, rate, predictor.logical_axes)
    before = [np.asarray(a) for a in jax.tree.leaves(predictor)]
    state, metrics = step(start_state(predictor, optimiser), model, text(0, 0, total=16))
    assert metrics["loss"] == 0 and metrics["gradient_norm"] == 0
    for old, new in zip(before, jax.tree.leaves(state.module), strict=True):
        np.testing.assert_array_equal(new, old)


def test_a_run_directory_may_be_text():
    assert TrainConfig(run_dir="runs/own").run_dir == Path("runs/own")
