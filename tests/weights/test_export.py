"""Models that are written load again as they were, and others are not written."""

import jax
import pytest

from butler_jax.model import BaseModel
from butler_jax.weights import load_base
from butler_jax.weights.export import save_model
from tests import reference_models


@pytest.mark.parametrize("name", ["llama with wide heads", "llama with biases", "qwen2"])
def test_a_model_that_is_no_plain_llama_is_not_written(name, tmp_path):
    reference_models.save_model(name, tmp_path / "theirs")
    config = load_base(tmp_path / "theirs").config
    with pytest.raises(ValueError, match=f"family {config.family} with these settings is not written"):
        save_model(tmp_path / "ours", BaseModel(config, jax.random.key(0)), load_base("tiny").tokenizer)
    assert not (tmp_path / "ours").exists()
