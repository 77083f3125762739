"""Settings from a file have the types of their fields."""

import json
from pathlib import Path

import pytest

import butler_jax
from butler_jax.evaluation.config import EvalConfig
from butler_jax.predictors.config import PredictorConfig
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
