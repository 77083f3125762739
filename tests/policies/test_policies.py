"""The scores of every policy against formulas written out in numpy."""

from __future__ import annotations

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from butler_jax.model.config import BaseConfig
from butler_jax.model.decoder import BaseModel, dense_mixer, embed, run_layers
from butler_jax.policies import POLICIES, Chunk, Evicting, Scoring, make_policy
from butler_jax.policies.base import describe
from butler_jax.policies.random import mix
from butler_jax.selection.config import SelectionConfig
from butler_jax.selection.masks import Rows

jax.config.update("jax_numpy_rank_promotion", "raise")

B, K, G, C, D, S = 2, 2, 3, 4, 8, 12


@pytest.fixture(scope="module")
def chunk():
    random = np.random.default_rng(0)
    q, k = random.normal(size=(B, K, G, C, D)), random.normal(size=(B, K, S, D))
    own = np.broadcast_to(np.arange(S - C, S), (B, C)).astype(np.int32)
    start = np.array([[0] * C, [5] * C], np.int32)
    columns = np.arange(S)
    allowed = (columns <= own[..., None]) & (columns >= start[..., None])
    arrays = dict(
        layer=np.int32(3),
        weights=SimpleNamespace(o=np.float32(random.normal(size=(K * G, D, 16)))),
        x=np.float32(random.normal(size=(B, C, 16))),
        q=np.float32(q),
        k=np.float32(k),
        v=np.float32(random.normal(size=(B, K, S, D))),
        logits=np.float32(np.einsum("bkgcd,bksd->bkgcs", q, k)),
        predicted=np.float32(random.normal(size=(B, K, G, C, S)) * 3),
        rows=Rows(own, start),
        columns=columns,
        allowed=allowed,
        starts=np.array([[0] * S, [0] * 5 + [5] * (S - 5)], np.int32),
        sinks=2,
        recent=3,
    )
    return Chunk(**{name: a if name == "weights" else jax.tree.map(jnp.asarray, a) for name, a in arrays.items()})


def softmax(x, allowed):
    weights = np.where(allowed, np.exp(np.float64(x)), 0)
    return weights / np.maximum(weights.sum(-1, keepdims=True), 1e-300)


@pytest.mark.parametrize(("name", "field"), [("oracle", "logits"), ("tokenbutler", "predicted")])
def test_pooled_score_orders_as_largest_weight_of_group(chunk, name, field):
    keys = np.array(chunk.allowed)
    if name == "tokenbutler":  # compares heads by what they give to keys that are not read anyway
        for batch, row in np.ndindex(B, C):
            own, start = int(chunk.rows.own[batch, row]), int(chunk.rows.start[batch, row])
            keys[batch, row, start : start + 2] = keys[batch, row, own - 2 : own + 1] = False
    keys = keys[:, None, None]
    wanted = softmax(np.asarray(getattr(chunk, field)), keys).max(axis=2)
    scores = np.asarray(make_policy(name)(chunk), np.float64)
    inside = np.broadcast_to(keys[:, 0], wanted.shape)
    # float32 logits of size 10 carry an error of 1e-6, and so do their exponentials in relation
    np.testing.assert_allclose(np.exp(scores[inside]), wanted[inside], rtol=2e-5)


def test_plain_maximum_takes_no_normaliser_off(chunk):
    scores = make_policy("tokenbutler", pooling="maximum")(chunk)
    np.testing.assert_array_equal(scores, np.asarray(chunk.predicted).max(axis=2))


def test_oracle_per_head_keeps_every_query_head(chunk):
    scores = make_policy("oracle_head")(chunk)
    np.testing.assert_array_equal(scores, np.asarray(chunk.logits).reshape(B, K * G, C, S))


def test_streaming_scores_by_recency(chunk):
    scores = np.asarray(make_policy("streaming")(chunk))
    assert scores.shape == (B, K, C, S) and (np.diff(scores, axis=-1) > 0).all()


@pytest.mark.parametrize("page", [1, 4, 16])
def test_quest_bounds_every_logit_of_a_page_and_no_later_key(chunk, page):
    """The bound is that of the keys of the page up to the row, and no logit among them is above it."""
    scores = np.asarray(make_policy("quest", page=page).scores(chunk))
    q, k, logits = (np.asarray(a, np.float64) for a in (chunk.q, chunk.k, chunk.logits))
    for b, c in np.ndindex(B, C):
        own, start = int(chunk.rows.own[b, c]), int(chunk.rows.start[b, c])
        for s in range(start, own + 1):
            first = s - (s - start) % page
            keys = k[b, :, first : min(first + page, own + 1)]
            wanted = np.maximum(q[b, :, :, c] * keys.min(1)[:, None], q[b, :, :, c] * keys.max(1)[:, None]).sum(-1)
            np.testing.assert_allclose(scores[b, :, :, c, s], wanted, atol=1e-5)  # sums of 8 products of size 1
            assert (scores[b, :, :, c, s] >= logits[b, :, :, c, s] - 1e-5).all()


def test_quest_chooses_its_pages_whole():
    config = make_policy("quest", page=8).selection(SelectionConfig(budget=0.5, unit=1))
    assert config == SelectionConfig(budget=0.5, unit=8)
    with pytest.raises(ValueError, match="page of quest must be a power of two"):
        make_policy("quest", page=12)


def test_lowrank_scores_in_the_principal_directions_of_the_keys(chunk):
    config = BaseConfig(
        family="llama", vocab_size=61, width=32, hidden=48, layers=4, heads=6, kv_heads=2, head_dim=8, context=64
    )
    model = BaseModel(config, jax.random.key(0))
    tokens = np.random.default_rng(0).integers(1, 61, (2, 40)).astype(np.int32)
    segments = np.ones_like(tokens)
    segments[1, 30:] = 0
    batch = {"tokens": tokens, "segments": segments, "positions": np.arange(40, dtype=np.int32)[None] + 0 * tokens}
    policy = make_policy("lowrank", rank=3).prepare(model, [batch])
    kept = []

    def mixer(state, view):
        return dense_mixer(config, jnp.asarray(segments))(None, view)[0], state, view.k

    x = embed(model, jnp.asarray(tokens))
    keys = np.asarray(run_layers(model, x, jnp.asarray(batch["positions"]), mixer, None)[2], np.float64)
    for layer, head in np.ndindex(4, 2):
        own = keys[layer, :, :, head][segments > 0]
        values, vectors = np.linalg.eigh(np.cov(own.T, bias=True))
        basis = vectors[:, ::-1][:, :3]
        found = policy.directions[layer, head]
        np.testing.assert_allclose(found @ found.T, basis @ basis.T, atol=1e-3)  # the same space; float32 sums
        kept.append(values[::-1][:3].sum() / values.sum())
    assert min(kept) > 3 / 8
    basis = np.float64(policy.directions[3])
    q, k = (np.einsum(f"bk{g}cd,kdr->bk{g}cr", a, basis) for g, a in (("g", np.asarray(chunk.q)), ("", chunk.k)))
    np.testing.assert_allclose(policy.scores(chunk), np.einsum("bkgcr,bksr->bkgcs", q, k), atol=1e-5)
    whole = make_policy("lowrank", rank=8).prepare(model, [batch])
    np.testing.assert_allclose(whole.scores(chunk), chunk.logits, atol=1e-4)  # all directions: the true logits
    assert whole != policy and len({whole, policy}) == 2 and make_policy("lowrank").prepare(model, [batch]).rank == 2
    with pytest.raises(ValueError, match=r"rank of lowrank must be 1 \.\.\. 8, the head dimension, got 9"):
        make_policy("lowrank", rank=9).prepare(model, [batch])


def test_random_scores_are_uniform_and_differ_everywhere(chunk):
    big = 256
    own = jnp.arange(big, dtype=jnp.int32)[None]
    many = chunk._replace(rows=Rows(own, jnp.zeros_like(own)), columns=jnp.arange(big))
    scores = np.asarray(make_policy("random")(many))[0]
    assert scores.min() >= 0 and scores.max() < 1
    # 131,072 draws: the standard errors of the mean and of the deciles are below 1.5e-3
    assert abs(scores.mean() - 0.5) < 5e-3
    np.testing.assert_allclose(np.quantile(scores, [0.1, 0.9]), [0.1, 0.9], atol=8e-3)
    later = np.asarray(make_policy("random")(many._replace(layer=jnp.int32(4))))[0]
    other = np.asarray(make_policy("random", seed=1)(many))[0]
    pairs = [(scores[0], scores[1]), (scores, later), (scores, other), (scores[:, 1:], scores[:, :-1])]
    for a, b in pairs:
        # independent draws of at least 65,024 pairs correlate by less than 0.02 but for one time in 10**6
        assert abs(np.corrcoef(a.ravel(), b.ravel())[0, 1]) < 0.02


def test_random_scores_do_not_depend_on_where_the_document_stands(chunk):
    scores = make_policy("random")(chunk)
    moved = chunk._replace(rows=Rows(chunk.rows.own + 7, chunk.rows.start + 7), columns=chunk.columns + 7)
    np.testing.assert_array_equal(scores, make_policy("random")(moved))


def test_hash_is_the_published_finaliser():
    def reference(h):
        h ^= h >> 16
        h = h * 0x85EBCA6B & 0xFFFFFFFF
        h ^= h >> 13
        h = h * 0xC2B2AE35 & 0xFFFFFFFF
        return h ^ h >> 16

    values = [0, 1, 2, 0xDEADBEEF, 0xFFFFFFFF]
    np.testing.assert_array_equal(mix(jnp.asarray(values, jnp.uint32)), [reference(v) for v in values])


def test_every_policy_gives_finite_scores_of_the_shape_selection_takes_or_evicts(chunk):
    directions = np.ones((4, K, D, 2), np.float32)
    for name in POLICIES:
        if issubclass(POLICIES[name], Evicting):
            assert not issubclass(POLICIES[name], Scoring)
            continue
        scores = make_policy(name, **({"directions": directions} if name == "lowrank" else {}))(chunk)
        assert scores.shape in ((B, K, C, S), (B, K * G, C, S)), name
        assert np.isfinite(np.asarray(scores)).all(), name


def test_what_all_policies_of_a_kind_have_is_no_setting():
    assert describe(make_policy("dense")) == {"name": "dense"}
    assert describe(make_policy("quest")) == {"name": "quest", "page": 16}
    assert describe(make_policy("h2o")) == {"name": "h2o"}


def test_errors_name_what_is_known(chunk):
    with pytest.raises(ValueError, match="unknown policy 'best'; known: dense, oracle"):
        make_policy("best")
    with pytest.raises(ValueError, match="streaming has no seed"):
        make_policy("streaming", seed=1)
    with pytest.raises(ValueError, match="policy dense has no foo; it has no settings"):
        make_policy("dense", foo=1)
    with pytest.raises(ValueError, match="policy quest has no evicts; it has page"):
        make_policy("quest", evicts=True)
    with pytest.raises(ValueError, match="known: normalised, maximum"):
        make_policy("tokenbutler", pooling="mean")
    with pytest.raises(ValueError, match="needs a trained predictor"):
        make_policy("tokenbutler")(chunk._replace(predicted=None))
    with pytest.raises(ValueError, match="lowrank has no directions yet"):
        make_policy("lowrank")(chunk)
