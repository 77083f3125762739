"""The predictors by name: their sizes on published models, and settings that do not fit."""

from __future__ import annotations

import jax
import pytest

from butler_jax.model.config import BaseConfig
from butler_jax.model.decoder import BaseModel, parameter_count
from butler_jax.predictors import make_predictor
from butler_jax.predictors.config import PredictorConfig
from tests.predictors.passes import config_of

# Sizes as the models' published config.json files give them.
MODELS = {
    "Llama-3.2-1B": BaseConfig(
        family="llama",
        vocab_size=128256,
        width=2048,
        hidden=8192,
        layers=16,
        heads=32,
        kv_heads=8,
        head_dim=64,
        context=131072,
        tied=True,
    ),
    "Llama-3.2-3B": BaseConfig(
        family="llama",
        vocab_size=128256,
        width=3072,
        hidden=8192,
        layers=28,
        heads=24,
        kv_heads=8,
        head_dim=128,
        context=131072,
        tied=True,
    ),
    "Llama-2-7B": BaseConfig(
        family="llama",
        vocab_size=32000,
        width=4096,
        hidden=11008,
        layers=32,
        heads=32,
        kv_heads=32,
        head_dim=128,
        context=4096,
    ),
    "Llama-3.1-8B": BaseConfig(
        family="llama",
        vocab_size=128256,
        width=4096,
        hidden=14336,
        layers=32,
        heads=32,
        kv_heads=8,
        head_dim=128,
        context=131072,
    ),
    "Mistral-7B": BaseConfig(
        family="mistral",
        vocab_size=32000,
        width=4096,
        hidden=14336,
        layers=32,
        heads=32,
        kv_heads=8,
        head_dim=128,
        context=32768,
        sliding_window=4096,
    ),
    "Phi-3-mini": BaseConfig(
        family="phi3",
        vocab_size=32064,
        width=3072,
        hidden=8192,
        layers=32,
        heads=32,
        kv_heads=32,
        head_dim=96,
        context=4096,
        sliding_window=2047,
    ),
    "Qwen2.5-3B": BaseConfig(
        family="qwen2",
        vocab_size=151936,
        width=2048,
        hidden=11008,
        layers=36,
        heads=16,
        kv_heads=2,
        head_dim=128,
        context=32768,
        tied=True,
        qkv_bias=True,
    ),
}

BASE_PARAMETERS = {  # the totals the models' cards and index files give
    "Llama-3.2-1B": 1_235_814_400,
    "Llama-3.2-3B": 3_212_749_824,
    "Llama-2-7B": 6_738_415_616,
    "Llama-3.1-8B": 8_030_261_248,
    "Mistral-7B": 7_241_732_096,
    "Phi-3-mini": 3_821_079_552,
    "Qwen2.5-3B": 3_085_938_688,
}

PUBLISHED = {  # R, I and count of the paper's first version, its dead weight included
    "Llama-3.2-1B": (16, 512, 12_393_472),
    "Llama-3.2-3B": (16, 1024, 32_598_528),
    "Llama-2-7B": (32, 1024, 83_113_984),
    "Llama-3.1-8B": (32, 1024, 83_113_984),
    "Mistral-7B": (32, 1024, 83_113_984),
    "Phi-3-mini": (16, 1024, 44_132_864),
    "Qwen2.5-3B": (32, 768, 33_364_992),
}


def count(base: BaseConfig, **settings) -> int:
    """Parameters of a predictor, without making it."""
    return parameter_count(jax.eval_shape(lambda: make_predictor(base, PredictorConfig(**settings))))


@pytest.mark.parametrize("name", MODELS)
def test_base_sizes_are_the_known_totals(name):
    shapes = jax.eval_shape(lambda: BaseModel(MODELS[name], jax.random.key(0)))
    assert parameter_count(shapes) == BASE_PARAMETERS[name]


@pytest.mark.parametrize("name", MODELS)
def test_contextual_counts_are_the_published_ones_less_dead_weight(name):
    base, (rank, hidden, published) = MODELS[name], PUBLISHED[name]
    ours = count(base, kind="contextual", rank=rank, hidden=hidden)
    unread_norm = 2 * base.width  # a LayerNorm over E (scale and bias) whose output nothing reads
    slots_of_layer_0 = 2 * hidden * base.heads * rank  # query and key outputs of a layer that is always dense
    assert ours + unread_norm + slots_of_layer_0 == published


@pytest.mark.parametrize("name", MODELS)
def test_overhead_is_about_one_percent_where_the_paper_says_so(name):
    rank, hidden, published = PUBLISHED[name]
    ours = count(MODELS[name], kind="contextual", rank=rank, hidden=hidden)
    assert ours / (BASE_PARAMETERS[name] + ours) < 0.012
    paper = {
        "Llama-3.2-1B": 0.993,
        "Llama-3.2-3B": 1.004,
        "Llama-2-7B": 1.218,
        "Llama-3.1-8B": 1.024,
        "Mistral-7B": 1.135,
        "Phi-3-mini": 1.142,
        "Qwen2.5-3B": 1.070,
    }[name]
    # the paper's figures are rounded to 0.001 %
    assert 100 * published / (BASE_PARAMETERS[name] + published) == pytest.approx(paper, abs=6e-4)


def test_producer_and_lookahead_counts_of_an_8b_model():
    base, total = MODELS["Llama-3.1-8B"], BASE_PARAMETERS["Llama-3.1-8B"]
    producer, lookahead = (count(base, kind=kind, rank=16) for kind in ("producer", "lookahead"))
    assert (producer, lookahead) == (25_755_648, 65_519_616 + 31 * 32 * (4096 + 3))  # with an offset
    assert round(100 * producer / total, 2) == 0.32
    assert round(100 * lookahead / total, 2) == 0.87


@pytest.mark.parametrize(
    ("settings", "base", "message"),
    [
        ({"rank": 18}, {}, "rank 18 exceeds the base's head dimension 16; use at most 16"),
        ({"rank": 7}, {}, "rank must be positive and even, got 7"),
        ({"rank": 0}, {}, "rank must be positive and even, got 0"),
        ({"stride": 0}, {}, "stride must be at least 1, got 0"),
        ({"kind": "oracle"}, {}, "unknown predictor 'oracle'; known: lookahead, producer, contextual"),
        ({"kind": "contextual"}, {"width": 72}, "multiple of 16, got 72; use --predictor lookahead"),
        ({}, {"layers": 1}, "at least 2 layers, got 1"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings, base, message):
    with pytest.raises(ValueError, match=message):
        make_predictor(config_of(**base), PredictorConfig(**settings))
