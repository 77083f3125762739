"""Settings from a file have the types of their fields."""

import json

import pytest

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
