"""What comes out where there is nothing to choose from, nothing to tell apart, or a number that is none.

| | result |
|---|---|
| equal scores, or all -inf, or all NaN | recent, sinks, then the earliest |
| a score of +inf | first; -inf and NaN last, the earlier of them first |
| a budget of everything or more, a recent or sinks beyond the length | everything, no token twice |
| a budget of 0, or an integer below sinks + recent | refused; a fraction of so few is raised to sinks + recent |
| a row of length 0 | chooses and attends nothing, 0; its next step attends the new token alone |
| logits all -inf (-1e30 and below) | 0; +inf or NaN: NaN in that row and head |
| losses of empty rows | 0, gradients too, and they do not count; of NaN or +inf: not finite |
"""

from __future__ import annotations

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels as pk
from benchmarks.float64 import distillation_loss
from butler_jax.decoding.cache import DecodeState, empty_store
from butler_jax.decoding.cached_attention import cached_attention
from butler_jax.decoding.prefilling import prefill
from butler_jax.decoding.score_cache import ScoreCache
from butler_jax.decoding.scoring import empty_scores
from butler_jax.decoding.step import decode_step
from butler_jax.model.attention import causal_attention, masked_softmax
from butler_jax.model.config import BaseConfig
from butler_jax.model.decoder import BaseModel, forward
from butler_jax.policies import make_policy
from butler_jax.predictors import make_predictor
from butler_jax.predictors.config import PredictorConfig
from butler_jax.selection import Rows, SelectionConfig, choose, room_for, select
from butler_jax.simulation import measure_recall, simulate
from butler_jax.training.config import TrainConfig
from butler_jax.training.losses.cross_entropy import attend_with_cross_entropy
from butler_jax.training.losses.squared_error import sum_squared_errors
from butler_jax.training.objective import DistillationObjective
from butler_jax.training.step import learning_schedule, make_optimiser, make_train_step, start_state
from tests.pallas_kernels.definitions import KERNELS, PLAIN, run

BASE = BaseConfig(
    family="llama", vocab_size=61, width=32, hidden=48, layers=3, heads=4, kv_heads=2, head_dim=16, context=64
)
NAN, INF = np.nan, np.inf


def normal(seed: int, *shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


@pytest.fixture(scope="module")
def model() -> BaseModel:
    return BaseModel(BASE, jax.random.key(0))


@pytest.fixture(scope="module")
def predictor():
    return make_predictor(BASE, PredictorConfig(rank=8, stride=2))


def text(*lengths: int, total: int) -> dict[str, jax.Array]:
    """Rows of one document of these lengths, padded to `total`."""
    shape = len(lengths), total
    inside = np.arange(total)[None] < np.asarray(lengths)[:, None]
    tokens = np.where(inside, np.random.default_rng(0).integers(1, 61, shape), 0)
    positions = np.where(inside, np.arange(total)[None], 0)
    arrays = {"tokens": tokens, "segments": inside, "positions": positions}
    return {name: jnp.asarray(a, jnp.int32) for name, a in arrays.items()}


# --- choosing -------------------------------------------------------------------------------------

SPECIAL = [3.0, -INF, INF, NAN, 2.0, INF, 1.0, 2.0, -INF, NAN, 0.0, -1.0]
CHOICES = [  # scores, sinks, recent, tokens asked, tokens chosen
    ([0.5] * 12, 2, 3, 8, [0, 1, 2, 3, 4, 9, 10, 11]),
    ([-INF] * 12, 2, 3, 8, [0, 1, 2, 3, 4, 9, 10, 11]),
    ([NAN] * 12, 2, 3, 8, [0, 1, 2, 3, 4, 9, 10, 11]),
    (SPECIAL, 0, 1, 2, [2, 11]),
    (SPECIAL, 0, 1, 5, [0, 2, 4, 5, 11]),
    (SPECIAL, 0, 1, 10, [0, 1, 2, 3, 4, 5, 6, 7, 10, 11]),  # the earlier of -inf and NaN
    (SPECIAL, 0, 1, 12, range(12)),
    (SPECIAL, 9, 9, 12, range(12)),
    (SPECIAL, 0, 1, 1, [11]),
    ([7.0], 4, 8, 1, [0]),
]


@pytest.mark.parametrize("implementation", [None, *PLAIN, *KERNELS])
def test_special_scores_have_an_order(implementation):
    """Through `choose`, and by the kernels themselves; each case is worked out by hand."""
    for scores, sinks, recent, count, wanted in CHOICES:
        row = jnp.asarray(scores, jnp.float32)[None, None]
        lengths, config = jnp.asarray([len(scores)]), SelectionConfig(budget=1.0, sinks=sinks, recent=recent)
        if implementation in KERNELS:
            options = dict(sinks=sinks, recent=recent, implementation=implementation, interpret=True)
            chosen = jax.jit(partial(pk.select_top_k, n=count, **options))(row, lengths)
        else:
            pick = jax.jit(partial(choose, room=count, config=config, implementation=implementation))
            chosen = pick(row, lengths, jnp.asarray([count]))
        indices, valid = (np.asarray(a)[0, 0] for a in chosen)
        assert indices[valid].tolist() == list(wanted), (scores, count)


@pytest.mark.parametrize(("scores", "sinks", "recent", "count", "wanted"), CHOICES)
def test_special_scores_have_the_same_order_in_a_whole_pass(scores, sinks, recent, count, wanted):
    size = len(scores)
    config = SelectionConfig(budget=max(count, sinks + recent), sinks=sinks, recent=recent)
    own = jnp.full((1, 1), size - 1)
    mask = select(
        jnp.asarray(scores, jnp.float32)[None, None, None], jnp.ones((1, 1, 1, size), bool),
        Rows(own, jnp.zeros_like(own)), config,
    )  # fmt: skip
    assert np.flatnonzero(mask).tolist() == list(wanted)


@pytest.mark.parametrize("implementation", [*PLAIN, *KERNELS])
def test_empty_rows_and_budgets_choose_nothing(implementation):
    scores, lengths = normal(0, 3, 2, 20), jnp.asarray([20, 0, 1])
    pick = partial(run, pk.select_top_k, scores, lengths, implementation=implementation, sinks=4, recent=8)
    assert np.asarray(pick(n=20).valid).sum(axis=-1).tolist() == [[20, 20], [0, 0], [1, 1]]
    assert not np.asarray(pick(n=20, counts=jnp.asarray([0, 5, 0])).valid).any()
    assert pick(n=0).indices.shape == (3, 2, 0)
    newest = pick(n=1)  # of a budget below sinks and recent, the newest
    assert np.asarray(newest.indices)[[0, 2], :, 0].tolist() == [[19, 19], [0, 0]]


@pytest.mark.parametrize("length", [1, 2, 11, 12, 13])
@pytest.mark.parametrize("budget", [1e-9, 12, 64, 1.0])
def test_rows_up_to_sinks_and_window_attend_everything(length, budget):
    config = SelectionConfig(budget=budget)
    pick = partial(choose, room=room_for(config, 16, 13), config=config)
    tokens = min(length, {12: 12, 1e-9: 12}.get(budget, 64))
    chosen = pick(normal(0, 1, 2, 16), jnp.asarray([length]), jnp.asarray([tokens]))
    assert np.asarray(chosen.valid).sum(axis=-1).tolist() == [[tokens] * 2]


# --- scores ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("implementation", [*PLAIN, *KERNELS])
@pytest.mark.parametrize("pooling", ["maximum", "normalised"])
def test_a_product_that_is_no_number_is_last_and_infinity_first(implementation, pooling):
    q, keys = jnp.abs(normal(0, 1, 1, 2, 4)) + 0.1, normal(1, 1, 1, 4, 9)
    score = partial(run, pk.importance_scores, implementation=implementation, pooling=pooling)
    found = np.asarray(score(q, keys.at[0, 0, 1, 3].set(NAN), jnp.asarray([9])))[0, 0]
    others = np.delete(np.arange(9), 3)
    alone = np.asarray(score(q, keys[..., others], jnp.asarray([8])))[0, 0]
    assert found[3] == -INF
    np.testing.assert_allclose(found[others], alone, atol=1e-5)  # the others as if it were not there; float32 sums
    q, keys = q[..., :1], keys[:, :, :1]  # of rank 1: no sums, which matrix products take in ways that make NaN of inf
    found = np.asarray(score(q, keys.at[0, 0, 0, 3].set(INF), jnp.asarray([9])))[0, 0]
    assert found[3] == INF and np.isfinite(found[others]).all()
    assert (np.asarray(score(q, jnp.full_like(keys, -INF), jnp.asarray([9]))) == -INF).all()


@pytest.mark.parametrize("implementation", [*PLAIN, *KERNELS])
def test_a_row_of_length_0_has_no_scores_and_leaves_the_others_alone(implementation):
    q, keys = normal(0, 2, 2, 2, 4), normal(1, 2, 2, 4, 1)
    found = np.asarray(run(pk.importance_scores, q, keys, jnp.asarray([0, 1]), implementation=implementation))
    assert (found[0] == -INF).all()
    np.testing.assert_allclose(found[1], 0, atol=1e-6)  # one token: its own log-sum-exp off


# --- attention ------------------------------------------------------------------------------------


@pytest.mark.parametrize("implementation", [*PLAIN, *KERNELS])
def test_decode_attention_of_logits_that_are_not_finite(implementation):
    k, v = jnp.abs(normal(1, 3, 1, 16, 16)) + 0.1, normal(2, 3, 1, 16, 16)
    q = jnp.ones((3, 1, 16)).at[0].set(-1e34).at[1].set(3e38)  # as good as -inf, +inf, ordinary
    pages = jnp.zeros((3, 1, 1), jnp.int32), jnp.ones((3, 1, 1), bool)
    attend = partial(
        run, pk.masked_topk_decode_attention, q, 9 * k, v, *pages, implementation=implementation, unit=16,
        return_residual=True, scale=1.0,
    )  # fmt: skip
    out, residual = map(np.asarray, attend(lengths=jnp.asarray([16, 16, 16])))
    assert not out[0].any() and residual[0] == -INF
    assert np.isnan(out[1]).all() and np.isnan(residual[1]).all()
    logits = np.asarray(9 * k, np.float64)[2, 0].sum(axis=-1)
    weights = np.exp(logits - logits.max())
    np.testing.assert_allclose(out[2, 0], weights @ np.asarray(v, np.float64)[2, 0] / weights.sum(), atol=1e-5)
    out, residual = map(np.asarray, attend(lengths=jnp.asarray([0, 0, 0])))
    assert not out.any() and (residual == -INF).all()


def test_dense_attention_of_logits_that_are_not_finite():
    """Row 5 sees nothing above -1e30, row 8 has +inf, row 11 is NaN: each in one head of two."""
    q, k, v = normal(0, 1, 20, 2, 4), jnp.abs(normal(1, 1, 20, 1, 4)) + 0.1, normal(2, 1, 20, 1, 4)
    strange = q.at[0, 5, 0].set(-1e34).at[0, 8, 1].set(3e38).at[0, 11, 0].set(NAN)
    out, lse = map(np.asarray, jax.jit(partial(causal_attention, return_lse=True))(strange, 9 * k, v))
    wanted = np.array(jax.jit(causal_attention)(q, 9 * k, v))
    assert lse[0, 5, 0] == np.float32(-1e30)
    wanted[0, 5, 0], wanted[0, 8, 1], wanted[0, 11, 0] = 0, NAN, NAN
    np.testing.assert_array_equal(out, wanted)
    # One token at a time over a cache, the same rows; what the cache has no tokens for is huge.
    cache = tuple(jnp.full((1, 1, 1, 24, 4), 1e30).at[0, 0, 0, :20].set(a[0, :, 0]) for a in (9 * k, v))
    step = jax.jit(lambda q, k, v, t: cached_attention(q, k, v, *cache, 0, t))
    for t in (0, 5, 7, 8, 11):
        one = step(strange[:, t : t + 1], 9 * k[:, t : t + 1], v[:, t : t + 1], jnp.asarray([t]))
        np.testing.assert_allclose(one[0, 0], wanted[0, t], atol=1e-6)  # the same sums in another order


def test_weights_are_of_what_is_seen_whatever_the_logits_are():
    logits = jnp.asarray([[1.0, 1.0, 5.0], [-INF, -INF, 5.0], [-INF, 0.0, 5.0], [9.0, 9.0, 5.0], [NAN, 0.0, 5.0]])
    mask = jnp.asarray([[True, True, False]] * 3 + [[False] * 3] + [[True, True, False]])
    found = np.asarray(masked_softmax(logits, mask))
    np.testing.assert_array_equal(found[:4], [[0.5, 0.5, 0], [0, 0, 0], [0, 1, 0], [0, 0, 0]])
    assert np.isnan(found[4, :2]).all()


def test_infinitely_unlikely_keys_weigh_nothing_and_the_gradient_is_finite():
    q, k, v = normal(0, 1, 9, 1, 4), normal(1, 1, 9, 1, 4), normal(2, 1, 9, 1, 4)
    q = q.at[..., 0].set(9.0)
    far = k.at[0, 3, 0].set(-1e35)
    rest = np.delete(np.arange(9), 3)
    out = np.asarray(causal_attention(q, far, v))[0, rest]
    np.testing.assert_allclose(out, causal_attention(q[:, rest], k[:, rest], v[:, rest])[0], atol=1e-6)
    gradient = jax.grad(lambda v: jnp.sum(causal_attention(q.at[0, 5].set(-1e10), 1e25 * jnp.abs(k), v) ** 2))(v)
    assert np.isfinite(gradient).all()


def test_a_window_beyond_the_length_is_no_window_and_one_token_sees_itself():
    q, k, v = normal(0, 2, 7, 4, 8), normal(1, 2, 7, 2, 8), normal(2, 2, 7, 2, 8)
    np.testing.assert_array_equal(causal_attention(q, k, v, sliding_window=1000), causal_attention(q, k, v))
    one = causal_attention(q[:, :1], k[:, :1], v[:, :1])
    np.testing.assert_array_equal(one, np.repeat(v[:, :1], 2, axis=2))


# --- simulation and decoding ----------------------------------------------------------------------


@pytest.mark.parametrize("name", ["tokenbutler", "oracle", "streaming", "h2o"])
def test_a_pass_over_one_token_or_none_is_dense(model, predictor, name):
    policy, selection = make_policy(name), SelectionConfig(budget=0.25)
    batch = text(1, 0, total=1)
    found = simulate(model, batch, policy, selection, predictor)
    dense = np.asarray(forward(model, batch["tokens"], segments=batch["segments"]))
    assert np.asarray(found.greedy)[0, 0] == dense[0, 0].argmax() and np.asarray(found.attended)[0, 0] == 1
    assert all(np.isfinite(a).all() for a in jax.tree.leaves(found)) and not np.asarray(found.nll).any()


def test_an_empty_row_changes_nothing_for_the_others(model, predictor):
    policy, selection = make_policy("tokenbutler"), SelectionConfig(budget=0.4, sinks=2, recent=3)
    both, alone = text(30, 0, total=40), text(30, total=40)
    found, wanted = (simulate(model, b, policy, selection, predictor) for b in (both, alone))
    np.testing.assert_allclose(found.nll[:1], wanted.nll, atol=1e-5)  # float32 sums of another batch size
    assert not np.asarray(found.nll)[1].any() and np.isfinite(found.hidden).all()
    recalls = [measure_recall(model, predictor, [b], [policy], [0.5], selection=selection) for b in (both, alone)]
    masses = [recall.mass["tokenbutler"][0.5] for recall in recalls]
    assert masses[0].value == pytest.approx(masses[1].value, abs=1e-6) and masses[0].n == masses[1].n


def test_a_budget_or_sliding_window_beyond_the_length_is_dense(model, predictor):
    batch, policy = text(20, 7, total=20), make_policy("tokenbutler")
    wanted = np.asarray(simulate(model, batch, make_policy("dense"), SelectionConfig()).nll)
    for budget in (10_000, 1.0):
        found = simulate(model, batch, policy, SelectionConfig(budget=budget, sinks=40, recent=50), predictor)
        np.testing.assert_allclose(found.nll, wanted, atol=1e-5)  # float32 sums in another order
    wide = BaseModel(dataclasses.replace(BASE, sliding_window=1000), jax.random.key(0))
    found = simulate(wide, batch, policy, SelectionConfig(budget=1.0), predictor)
    np.testing.assert_allclose(found.nll, wanted, atol=1e-5)


@pytest.mark.parametrize("implementation", PLAIN)
def test_a_predictor_that_is_no_number_chooses_the_earliest(model, predictor, implementation):
    broken = make_predictor(BASE, PredictorConfig(rank=8, stride=2))
    selection = SelectionConfig(budget=10, sinks=2, recent=3)
    tokens = text(24, total=24)["tokens"]
    fill = jax.jit(partial(prefill, model, capacity=32, selection=selection))
    step = jax.jit(partial(decode_step, model, selection=selection, details=True, implementation=implementation))
    _, state = fill(tokens, jnp.asarray([24]), predictor=predictor)
    broken.heads.query[...] = jnp.full_like(broken.heads.query[...], NAN)
    logits, _, found = step(jnp.asarray([5]), state, predictor=broken)
    assert np.flatnonzero(found.chosen[1, 0, 0]).tolist() == [0, 1, 2, 3, 4, 5, 6, 22, 23, 24]
    assert np.isfinite(logits).all()
    batch = text(25, total=25) | {"tokens": jnp.concatenate([tokens, jnp.asarray([[5]])], axis=1)}
    judged = simulate(model, batch, make_policy("tokenbutler"), selection, broken)
    assert np.asarray(judged.greedy)[0, -1] == np.asarray(logits)[0].argmax()


@pytest.mark.parametrize("implementation", PLAIN)
@pytest.mark.parametrize("fields", [None, dict(), dict(unit=4, interval=2)], ids=["dense", "tokens", "pages"])
def test_a_row_that_holds_nothing_begins_with_the_token_given(model, predictor, implementation, fields):
    """A cache of one token's room, and beside a longer row: logits of a pass over that token alone."""
    selection = None if fields is None else SelectionConfig(budget=0.5, sinks=2, recent=3, **fields)
    wanted = np.asarray(forward(model, jnp.asarray([[7], [9]])))[:, 0]
    options = dict(predictor=predictor, selection=selection, implementation=implementation)
    step = jax.jit(lambda tokens, state: decode_step(model, tokens, state, **options))
    fill = partial(prefill, model, predictor=predictor, selection=selection)
    tokens = jnp.asarray(np.random.default_rng(1).integers(1, 61, (2, 12)), jnp.int32)
    _, state = jax.jit(partial(fill, capacity=20))(tokens, jnp.asarray([0, 12]))  # known on the device alone
    logits, state, found = step(jnp.asarray([7, 9]), state)
    np.testing.assert_allclose(logits[0], wanted[0], atol=2e-5)  # float32 sums in another order
    assert np.asarray(state.lengths).tolist() == [1, 13] and (np.asarray(found.attended)[:, 0] == 1).all()
    if fields != dict(unit=4, interval=2):
        scores = empty_scores(predictor, model, 2, 1, jnp.float32)
        empty = DecodeState(empty_store(BASE, 2, 1, jnp.float32), scores, jnp.zeros(2, jnp.int32), jnp.int32(0))
        logits, state, _ = step(jnp.asarray([7, 9]), empty)
        np.testing.assert_allclose(logits, wanted, atol=2e-5)
        with pytest.raises(ValueError, match="the cache is full: a row holds 1 of 1 tokens"):
            decode_step(model, jnp.asarray([1, 1]), state, **options)


def test_a_prompt_of_one_token_keeps_its_int8_keys(model, predictor):
    _, state = prefill(
        model, jnp.asarray([[7]]), jnp.asarray([1]), capacity=2, predictor=predictor, score_dtype="int8"
    )  # fmt: skip
    assert isinstance(state.scores, ScoreCache) and (np.asarray(state.scores.scales)[1:] > 0).all()


# --- losses ---------------------------------------------------------------------------------------

FORMS = ("fused", "two_calls")


def loss_inputs(length: int, rows: int = 1):
    return (normal(0, rows, length, 4, 8), normal(1, rows, length, 2, 8), normal(3, rows, length, 4, 4),
            normal(4, rows, length, 2, 4))  # fmt: skip


def value_and_gradients(name, q, k, p, r, **options):
    """((loss, count), (dp, dr)) of one of the losses."""

    def loss(p, r):
        if name == "squared_error":
            return sum_squared_errors(q, k, p, r, **options)
        return attend_with_cross_entropy(q, k, k, p, r, **options)[1:]

    return jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(p, r)


@pytest.mark.parametrize(
    "options", [{"form": "fused"}, {"form": "two_calls"}, {}], ids=["fused", "two calls", "square"]
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


@pytest.mark.parametrize("form", FORMS)
def test_sinks_and_recent_beyond_the_length_leave_no_loss(form):
    for length, sinks, recent in ((1, 0, 1), (1, 4, 8), (9, 4, 8), (9, 0, 9), (9, 9, 0)):
        found = value_and_gradients("cross_entropy", *loss_inputs(length), sinks=sinks, recent=recent, form=form)
        assert found[0] == (0, 0) and not any(np.asarray(g).any() for g in found[1])
    (loss, count), _ = value_and_gradients("cross_entropy", *loss_inputs(1), form=form)
    assert count == 4 and loss == pytest.approx(0, abs=1e-6)  # a distribution over one key has no surprise


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


@pytest.mark.parametrize(
    ("kind", "objective"),
    [("lookahead", "cross_entropy"), ("producer", "squared_error"), ("contextual", "cross_entropy")],
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


def test_calibration_passes_over_batches_of_padding(model, predictor):
    real, empty = text(30, 12, total=32), text(0, 0, total=32)
    found, wanted = predictor.initialise(model, [real, empty]), predictor.initialise(model, [real])
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_array_equal(a, b)
