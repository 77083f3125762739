"""The predictors that an evaluation compares, and what is known of them."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest

from butler_jax import EvalConfig
from butler_jax.evaluation import contenders, training_facts
from butler_jax.policies import Scoring
from tests.tiny_evaluations import make_perplexity_evaluation
from tests.tiny_models import make_model


def test_predictors_that_are_compared_have_labels_of_their_own(monkeypatch):
    loaded = SimpleNamespace(config=SimpleNamespace(kind="lookahead"))
    monkeypatch.setattr(training_facts, "load_trained", lambda run, base: (loaded, {"run": str(run)}))
    found = contenders._read_predictors(None, None, EvalConfig(compare="a/run,b/run,c/run"))
    assert [suffix for suffix, *_ in found] == [":lookahead", ":lookahead run", ":lookahead c/run"]
    with pytest.raises(ValueError, match="--compare names a/run more than once"):
        list(contenders._read_predictors(None, None, EvalConfig(compare="a/run,./a/run,a//run,a/./run")))


@pytest.mark.parametrize("name", ["dense:x", "_hidden", ""])
def test_a_name_that_cannot_begin_a_label_is_refused(name):
    with pytest.raises(ValueError, match=f"a policy is called '{name}'; give it a name without a colon"):
        contenders.label_policies([SimpleNamespace(name=name)])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Broken(Scoring):
    """Scores of which those of the keys before a column are NaN."""

    name = "broken"
    before: int = 0

    def scores(self, chunk):
        return jnp.where(chunk.columns < self.before, jnp.nan, chunk.logits)


def test_scores_that_are_nan_are_told(tmp_path):
    base, _, config = make_perplexity_evaluation(make_model(), tmp_path)
    decided = np.maximum(np.arange(min(128, base.config.context)) - 11, 0)  # neither 4 sinks nor 8 recent tokens
    share = 100 * np.minimum(decided, 16).sum() / decided.sum()
    for before, told in ((0, []), (20, [f"broken: {share:.0f} % of its scores are NaN; these keys are read last"])):
        said = []
        wanted = dataclasses.replace(config, policies=(Broken(before=before),))
        contenders.collect_policies(base, None, wanted, "python_docs", said.append)
        assert said == told
    wanted = dataclasses.replace(config, policies=(Broken(before=1000),))
    with pytest.raises(ValueError, match="the scores of the policy broken are NaN for every key"):
        contenders.collect_policies(base, None, wanted, "python_docs", print)


def test_the_best_step_is_that_of_the_predictor_that_is_loaded(monkeypatch, tmp_path):
    losses = {10: 0.5, 20: 0.4, 30: 0.4, 40: None}  # step 40 was saved after Ctrl-C, without a validation
    monkeypatch.setattr(training_facts, "steps", lambda directory: [*losses])
    monkeypatch.setattr(training_facts, "read_facts", lambda path: {"metrics": {"loss": losses[int(path.name)]}})
    assert training_facts._find_best(tmp_path) == 30


def test_the_command_of_a_training_is_that_of_the_last_start_that_took_a_step(monkeypatch, tmp_path):
    starts = [{"command": "train --steps 4", "from": 0, "to": 4}, {"command": "train --steps 2", "from": 4, "to": 4}]
    monkeypatch.setattr(training_facts, "records", lambda run: starts)
    assert training_facts.read_training(tmp_path, 4)["command"] == "train --steps 4"
