"""Equal passes run once."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from butler_jax.evaluation.tasks.passes import Passes
from butler_jax.policies import make_policy
from butler_jax.predictors import PredictorConfig, make_predictor
from butler_jax.selection.config import SelectionConfig
from butler_jax.simulation import simulate
from tests.marked import slow
from tests.tiny_models import make_batch, make_model


@pytest.fixture(scope="module")
def model():
    return make_model()


@pytest.mark.slow
def test_budgets_that_mean_the_same_tokens_are_run_once(model, monkeypatch):
    import butler_jax.evaluation.tasks.passes as module

    ran, original = [], module.simulate
    monkeypatch.setattr(module, "simulate", lambda *a, **k: ran.append(a[2].name) or original(*a, **k))
    passes, batch = Passes(model), make_batch([[30], [20]], 48)
    wanted = batch["segments"] > 0
    first = passes(batch, make_policy("oracle"), SelectionConfig(budget=0.25), wanted=wanted)
    again = passes(batch, make_policy("oracle"), SelectionConfig(budget=0.125), wanted=wanted)  # 12 tokens as well
    assert again is first and ran == ["oracle"]
    passes(batch, make_policy("streaming"), SelectionConfig(budget=0.25), wanted=wanted)
    passes(batch, make_policy("oracle"), SelectionConfig(budget=0.5), wanted=wanted)
    assert ran == ["oracle", "streaming", "oracle"]
    for name in ("oracle", "streaming"):  # everything is read
        passes(batch, make_policy(name), SelectionConfig(budget=30), wanted=wanted)
    assert ran[3:] == ["dense"]


@pytest.mark.parametrize("policy", ["oracle", slow("dense"), slow("h2o")])
def test_predictions_after_prompts_are_those_of_whole_passes(model, policy):
    batch, selection = make_batch([[150], [101], []], 160), SelectionConfig(budget=0.125)
    wanted = np.zeros((3, 160), bool)
    wanted[0, 140:147], wanted[1, 60:64], wanted[1, 66] = True, True, True  # tokens that follow an answer do not count
    prompts = np.asarray([140, 60, 0])
    whole = simulate(model, batch, make_policy(policy), selection, prompts=prompts, wanted=jnp.asarray(wanted))
    passes = Passes(model, prompted=True)
    found = passes(batch, make_policy(policy), selection, wanted=wanted)
    assert len(passes._prompts) == (policy != "h2o")
    for name in ("nll", "attended", "of_dense", "greedy"):
        expected = np.asarray(getattr(whole, name))[wanted]
        # the same float32 sums in another order; a wrongly chosen key changes the first digits
        np.testing.assert_allclose(getattr(found, name)[wanted], expected, atol=2e-4, err_msg=name)


def test_policies_share_a_prompt_and_old_ones_are_let_go(model, monkeypatch):
    import butler_jax.evaluation.tasks.passes as module

    passes, selection = Passes(model, prompted=True), SelectionConfig(budget=0.25)
    batches = [make_batch([[90]], 96, seed=seed) for seed in (1, 2)]
    wanted = np.arange(96)[None] == 80
    for name in ("oracle", "streaming"):
        passes(batches[0], make_policy(name), selection, wanted=wanted)
    assert len(passes._prompts) == 1
    monkeypatch.setattr(module, "memory_of", lambda device: 4)
    passes(batches[1], make_policy("oracle"), selection, wanted=wanted)
    assert len(passes._prompts) == 1
    passes(batches[0], make_policy("oracle"), SelectionConfig(budget=0.5), wanted=wanted)
    assert len(passes._prompts) == 1


def test_a_prompt_is_read_once_with_and_without_the_predictor_that_is_expected(model):
    predictor = make_predictor(model.config, PredictorConfig(rank=4))
    batch, selection = make_batch([[90]], 96), SelectionConfig(budget=0.25)
    wanted = np.arange(96)[None] == 80
    policies = [("oracle", None), ("tokenbutler", predictor)]
    apart, together = Passes(model, prompted=True), Passes(model, prompted=True)
    together.expect([None, predictor, make_predictor(model.config, PredictorConfig(rank=2))])
    for name, own in policies:
        policy = make_policy(name).for_predictor(own)
        found, expected = (each(batch, policy, selection, own, wanted=wanted) for each in (together, apart))
        np.testing.assert_allclose(found.nll[wanted], expected.nll[wanted], atol=2e-4)
    assert len(apart._prompts) == 2 and len(together._prompts) == 1
