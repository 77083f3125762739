"""Rows after prompts that were read before equal those of a simulation that runs the prompts too."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from butler_jax.model.config import RopeConfig
from butler_jax.policies import make_policy
from butler_jax.predictors import make_predictor
from butler_jax.predictors.config import PredictorConfig
from butler_jax.selection.config import SelectionConfig
from butler_jax.simulation import read_prompts, simulate
from tests.marked import slow
from tests.tiny_models import BASE, make_batch, make_model

MIXED = dataclasses.replace(BASE, layers=4, sliding_window=16, sliding_layers=(True, False, True, False))
LONG = RopeConfig(kind="longrope", short_factor=(1.0,) * 8, long_factor=(4.0,) * 8, original_context=64)
CASES = {
    "oracle": (BASE, "oracle", None, {}),
    "pages": (BASE, "quest:page=4", None, {}),
    "layers share": (BASE, "oracle_residual", None, dict(allocation="per_layer")),
    "windows": (MIXED, "oracle", None, {}),
    "lookahead, int8": (BASE, "tokenbutler", "lookahead", {}),
    "contextual, long": (dataclasses.replace(BASE, rope=LONG), "tokenbutler", "contextual", {}),
    "producer, windows": (MIXED, "tokenbutler", "producer", {}),
}
FAST = ("pages", "lookahead, int8")


@pytest.mark.parametrize("case", [case if case in FAST else slow(case) for case in CASES])
def test_rows_after_prompts_are_those_of_a_whole_pass(case):
    base, policy, kind, settings = CASES[case]
    model, policy = make_model(base), make_policy(policy)
    predictor = kind and make_predictor(base, PredictorConfig(kind=kind, rank=8, stride=2))
    batch = make_batch([[20, 76], [96]], 96)  # the first row holds another document before its own
    batch["segments"][0, :20] = batch["positions"][0, :20] = 0
    rows, prompts = 27, np.asarray([76 - 20, 96 - 27])
    how = dict(prompts=prompts, score_dtype="int8" if "int8" in case else None)
    selection = SelectionConfig(budget=0.25, **settings)
    whole = simulate(model, batch, policy, selection, predictor, **how)
    read = read_prompts(model, batch, 96 - rows, predictor)
    part = simulate(model, batch, policy, selection, predictor, read=read, **how)
    assert float(part.attended[:, :-1].min()) < 0.3 and float(part.attended[0, 0]) == 1  # prompts reach into the rows
    # The same float32 sums in another order; a wrongly chosen key changes the first digits.
    for name in ("nll", "attended", "read", "served", "of_dense", "stream"):
        np.testing.assert_allclose(getattr(part, name), getattr(whole, name)[:, -rows:], atol=2e-4, err_msg=name)
    np.testing.assert_array_equal(part.greedy, whole.greedy[:, -rows:])
    np.testing.assert_allclose(part.shares, whole.shares[..., -rows:], atol=1e-6)


@pytest.mark.slow
def test_more_rows_than_a_chunk_run_after_a_prompt():
    model, batch, policy = make_model(), make_batch([[300]], 300), make_policy("oracle")
    selection, prompts = SelectionConfig(budget=0.25), np.asarray([150])
    whole = simulate(model, batch, policy, selection, prompts=prompts)
    part = simulate(model, batch, policy, selection, prompts=prompts, read=read_prompts(model, batch, 150))
    np.testing.assert_allclose(part.nll, whole.nll[:, 150:], atol=2e-4)  # as above
    np.testing.assert_allclose(part.attended, whole.attended[:, 150:], atol=1e-6)


def test_what_cannot_start_from_prompts_is_refused():
    model, batch = make_model(), make_batch([[48]], 48)
    read = read_prompts(model, batch, 16)
    with pytest.raises(ValueError, match="h2o evicts tokens of a prompt"):
        simulate(model, batch, make_policy("h2o"), SelectionConfig(), read=read)
    predictor = make_predictor(BASE, PredictorConfig(rank=8, stride=2))
    with pytest.raises(ValueError, match="read without the predictor of tokenbutler; give it to read_prompts"):
        simulate(model, batch, make_policy("tokenbutler"), SelectionConfig(), predictor, read=read)
    with pytest.raises(ValueError, match="prompts of 16 tokens are no multiple of the interval 32; read a"):
        simulate(model, batch, make_policy("oracle"), SelectionConfig(interval=32), read=read)
    with pytest.raises(ValueError, match=r"prompts are 1 \.\.\. 47 tokens of these sequences, got 48"):
        read_prompts(model, batch, 48)
