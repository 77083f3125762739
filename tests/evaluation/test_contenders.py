"""The predictors that an evaluation compares, and what is known of them."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from butler_jax import EvalConfig
from butler_jax.evaluation import contenders, training_facts


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


def test_the_best_step_is_that_of_the_predictor_that_is_loaded(monkeypatch, tmp_path):
    losses = {10: 0.5, 20: 0.4, 30: 0.4, 40: None}  # step 40 was saved after Ctrl-C, without a validation
    monkeypatch.setattr(training_facts, "steps", lambda directory: [*losses])
    monkeypatch.setattr(training_facts, "read_facts", lambda path: {"metrics": {"loss": losses[int(path.name)]}})
    assert training_facts._find_best(tmp_path) == 30


def test_the_command_of_a_training_is_that_of_the_last_start_that_took_a_step(monkeypatch, tmp_path):
    starts = [{"command": "train --steps 4", "from": 0, "to": 4}, {"command": "train --steps 2", "from": 4, "to": 4}]
    monkeypatch.setattr(training_facts, "records", lambda run: starts)
    assert training_facts.read_training(tmp_path, 4)["command"] == "train --steps 4"
