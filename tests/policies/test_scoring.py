"""Scores are pooled over the query heads of a group."""

from __future__ import annotations

import numpy as np
import pytest

from butler_jax.policies import Oracle, make_policy
from butler_jax.selection import SelectionConfig
from tests.policies.chunks import B, C, softmax


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


@pytest.mark.parametrize(
    ("name", "field"), [("oracle", "logits"), ("oracle_head", "logits"), ("tokenbutler", "predicted")]
)
def test_weights_for_top_p_are_means_of_softmaxes_over_the_group(chunk, name, field):
    keys = np.array(chunk.allowed)
    if name == "tokenbutler":
        keys = np.array(chunk.contested)
    weights = softmax(np.asarray(getattr(chunk, field)), keys[:, None, None])
    wanted = weights.reshape(B, -1, *weights.shape[3:]) if name == "oracle_head" else weights.mean(axis=2)
    found = np.exp(np.asarray(make_policy(name)(chunk._replace(allocation="top_p")), np.float64))
    inside = np.broadcast_to(keys[:, None], wanted.shape)
    np.testing.assert_allclose(found[inside], wanted[inside], rtol=2e-5)  # float32 logits of size 10, as above


def test_scores_of_another_shape_are_refused_with_the_shapes_that_are_wanted(chunk):
    class Flat(Oracle):
        def scores(self, chunk):
            return chunk.logits.max(axis=2)

    class Few(Oracle):
        def pool(self, scores, chunk):
            return scores.max(axis=(1, 2))[:, None]

    for policy, said in (
        (Flat(), r"the scores of the policy oracle are \["),
        (Few(), "the pooled scores of the policy"),
    ):
        with pytest.raises(ValueError, match=said):
            policy(chunk)


def test_a_policy_refuses_top_p_whose_scores_estimate_no_logits():
    selection = SelectionConfig(allocation="top_p", tolerance=0.1)
    for name in ("streaming", "random", "h2o"):
        message = rf"{name} are no estimates of attention logits.* top_p needs; take per_head$"
        with pytest.raises(ValueError, match=message):
            make_policy(name).selection(selection)
    with pytest.raises(ValueError, match="take per_head or per_layer or tolerance"):
        make_policy("tokenbutler", offset="share").selection(selection)
    assert make_policy("quest").selection(selection).unit == 16
