"""The embedded model: its size, its card, and its co-reference accuracy."""

from __future__ import annotations

import json

import jax
import pytest

from butler_jax.evaluation import Passes, count_answers, make_coreference_batches
from butler_jax.model.decoder import parameter_count
from butler_jax.policies import make_policy
from butler_jax.selection.config import SelectionConfig
from butler_jax.weights import load_base
from butler_jax.weights.loading import TINY


@pytest.fixture(scope="module")
def tiny():
    return load_base("tiny")


def test_files_are_small_and_nothing_is_pickled():
    files = [path for path in TINY.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 8_000_000
    assert {path.suffix for path in files} <= {".json", ".safetensors", ".txt", ".md"}


def test_shape_is_that_of_a_small_grouped_llama(tiny):
    config = tiny.config
    assert config.family == "llama" and config.layers >= 6 and config.context == 2048
    assert config.heads == 8 and 2 <= config.kv_heads <= 4
    assert 1000 <= config.vocab_size <= 4096
    assert parameter_count(jax.eval_shape(lambda: tiny.model)) <= 4_000_000


def test_card_says_how_it_was_made():
    card = json.loads((TINY / "card.json").read_text(encoding="utf-8"))
    assert {"data", "steps", "seed", "length", "batch_size"} <= set(card["recipe"])
    assert card["recipe"]["steps"] > 0 and card["learning_rate"] > 0
    assert all(0 < loss < 4 for loss in card["losses"].values()) and "validation_loss" in card["losses"]


def test_tokenizer_returns_the_text(tiny):
    text = "def f(x):\n    return x + 1  # Straße, 東京\n"
    tokens = tiny.tokenizer.encode(text)
    assert tiny.tokenizer.decode(tokens) == text
    assert max(tokens) < tiny.config.vocab_size


@pytest.mark.slow
def test_dense_model_knows_the_last_mention_in_unseen_samples(tiny):
    batches = make_coreference_batches(tiny.tokenizer, samples=64, batch_size=8, context=tiny.config.context)
    found = count_answers(Passes(tiny.model), batches, make_policy("dense"), SelectionConfig(budget=1.0))
    assert len(found.right) == 64
    # what the model is trained for: sparsity needs something to lose
    assert found.token_inaccuracy.value <= 0.05
