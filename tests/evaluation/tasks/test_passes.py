"""Equal passes run once."""

from __future__ import annotations

import pytest

from butler_jax.evaluation.tasks.passes import Passes
from butler_jax.policies import make_policy
from butler_jax.selection.config import SelectionConfig
from tests.tiny_models import make_batch, make_model


@pytest.fixture(scope="module")
def model():
    return make_model()


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
