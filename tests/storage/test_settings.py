"""Settings from a file have the types of their fields."""

import json
from pathlib import Path

import numpy as np
import pytest

import butler_jax
from butler_jax.evaluation.config import EvalConfig
from butler_jax.predictors.config import PredictorConfig
from butler_jax.selection import SelectionConfig
from butler_jax.storage.settings import from_dict, to_dict
from butler_jax.training.config import TrainConfig


@pytest.mark.parametrize("kind", [TrainConfig, EvalConfig, PredictorConfig])
def test_settings_from_a_file_have_the_types_of_their_fields(kind):
    whole = json.loads(json.dumps(to_dict(kind())))
    assert from_dict(kind, whole) == kind()
    for name, value in whole.items():
        nested = isinstance(value, dict)
        words = "has no 'a'; it has" if nested else f"{kind.__name__}: {name} cannot be"
        with pytest.raises(ValueError, match=words):
            from_dict(kind, {**whole, name: {"a": [1]}})
        if nested:
            with pytest.raises(ValueError, match=f"{kind.__name__}: {name} cannot be 5"):
                from_dict(kind, {**whole, name: 5})
    with pytest.raises(ValueError, match="has no 'more'"):
        from_dict(kind, {**whole, "more": 1})
    with pytest.raises(ValueError, match="is made from a JSON object"):
        from_dict(kind, [whole])


@pytest.mark.parametrize(
    "call",
    [
        lambda base: butler_jax.generate(base, "a"),
        lambda base: next(butler_jax.generate_stream(base, "a")),
        lambda base: butler_jax.chat(base, "a"),
        lambda base: butler_jax.serve(base, ["a"]),
        butler_jax.evaluate,
        butler_jax.distil,
        butler_jax.init_predictor,
    ],
)
def test_a_name_in_the_place_of_a_base_says_what_loads_it(call):
    with pytest.raises(ValueError, match=r"the base is given as 'tiny'; load it first: butler_jax.load_base\('tiny'\)"):
        call("tiny")


def test_numbers_of_numpy_are_numbers_and_other_types_are_named():
    config = TrainConfig(steps=np.int64(2), learning_rate=np.float32(0.5), data="python_docs", base=Path("models/a"))
    assert json.loads(json.dumps(to_dict(config)))["steps"] == 2 and type(config.learning_rate) is float
    assert config.base == "models/a" and type(EvalConfig(seed=np.int64(3)).seed) is int
    for make, words in (
        (lambda: TrainConfig(steps=2.0), "steps must be a whole number, got 2.0"),
        (lambda: TrainConfig(accumulate=True), "accumulate must be a whole number, got True"),
        (lambda: TrainConfig(strict_data="no"), "strict_data must be True or False, got 'no'"),
        (lambda: EvalConfig(mesh=5), "mesh must be text, got 5"),
        (lambda: EvalConfig(selection=0.5), "selection must be a SelectionConfig, got 0.5"),
        (lambda: EvalConfig(budgets=(1, 1.0), selection=SelectionConfig(sinks=0, recent=1)), "are one token and every"),
        (lambda: SelectionConfig(floor="a"), "floor must be a number, got 'a'"),
        (lambda: SelectionConfig(neighbours="yes"), "neighbours must be True or False, got 'yes'"),
    ):
        with pytest.raises(ValueError, match=words):
            make()


@pytest.mark.parametrize(
    "call",
    [
        lambda given: butler_jax.generate(None, "a", predictor=given),
        lambda given: butler_jax.serve(None, ["a"], predictor=given),
        lambda given: butler_jax.evaluate(None, given),
        lambda given: butler_jax.distil(None, predictor=given),
    ],
)
def test_a_path_in_the_place_of_a_predictor_says_what_loads_it(call):
    with pytest.raises(ValueError, match=r"load it first: butler_jax.load_predictor\('runs/a'\)"):
        call(Path("runs/a"))
