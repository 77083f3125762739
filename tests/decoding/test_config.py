"""The settings of sampling are checked."""

from __future__ import annotations

import pytest

from butler_jax.decoding.config import SamplingConfig, read_sampling


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"temperature": -1}, "temperature must be 0"),
        ({"top_k": 0}, "top_k must be a whole number of at least 1"),
        ({"top_k": 2.5}, "top_k must be a whole number of at least 1, got 2.5"),
        ({"top_p": 0}, "top_p must be above 0"),
        ({"top_p": 1.5}, "at most 1"),
        ({"repetition_penalty": 0}, "repetition penalty must be above 0"),
    ],
)
def test_bad_settings_are_clear_errors(fields, message):
    with pytest.raises(ValueError, match=message):
        SamplingConfig(**fields)


@pytest.mark.parametrize(
    ("generation", "sampling", "passed_over"),
    [
        ({}, {}, ()),
        ({"temperature": 0.6, "top_p": 0.9}, {}, ()),  # without do_sample, as transformers
        ({"do_sample": True}, {"temperature": 1.0, "top_k": 50}, ()),
        (
            {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "top_k": 20, "repetition_penalty": 1.1},
            {"temperature": 0.6, "top_p": 0.9, "top_k": 20, "repetition_penalty": 1.1},
            (),
        ),
        ({"do_sample": True, "top_k": 0, "min_p": 0.1, "num_beams": 1}, {"temperature": 1.0}, ("min_p",)),
        ({"do_sample": False, "repetition_penalty": 1.2, "num_beams": 4}, {"repetition_penalty": 1.2}, ("num_beams",)),
        ({"do_sample": True, "temperature": None, "max_length": 20}, {"temperature": 1.0, "top_k": 50}, ()),
    ],
)
def test_generation_config_says_how_tokens_are_drawn(generation, sampling, passed_over):
    assert read_sampling(generation) == (SamplingConfig(**sampling), passed_over)


def test_what_a_file_with_draws_leaves_out_is_that_of_transformers():
    from transformers import GenerationConfig

    sampling, theirs = read_sampling({"do_sample": True})[0], GenerationConfig._get_default_generation_params()
    for name in ("temperature", "top_k", "top_p", "repetition_penalty"):
        assert getattr(sampling, name) == theirs[name]


@pytest.mark.parametrize("wrong", [{"temperature": "hot"}, {"top_p": 7}, {"top_k": 1.5}, {"temperature": -1}])
def test_a_wrong_generation_config_is_named(wrong):
    with pytest.raises(ValueError, match=r"generation_config\.json .* of the model: .*correct the file"):
        read_sampling({"do_sample": True, **wrong})
