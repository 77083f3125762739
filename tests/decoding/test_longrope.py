"""longrope in decoding: every row takes the factors of its own length, as transformers does, also across the border."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import butler_jax
from butler_jax.predictors import PredictorConfig, make_predictor
from butler_jax.selection import SelectionConfig
from butler_jax.weights import load_base
from tests import reference_models
from tests.marked import long

NAME, BORDER, NEW = "phi3 longrope", 32, 12
LENGTHS = (27, 40, 32, 5)  # one crosses, one is beyond, one crosses with its first token, one stays
PROMPTS = [np.random.default_rng(n).integers(3, 96, n).tolist() for n in LENGTHS]


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    directory = tmp_path_factory.mktemp("longrope")
    return reference_models.save_model(NAME, directory), load_base(directory)


@pytest.fixture(scope="module")
def wanted(pair):
    """What transformers makes of each prompt alone."""
    rows = []
    for prompt in PROMPTS:
        settings = dict(max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False, pad_token_id=0)
        mask = torch.ones(1, len(prompt), dtype=torch.long)
        found = pair[0].generate(torch.tensor([prompt]), attention_mask=mask, **settings)
        rows.append(found[0, len(prompt) :].tolist())
    return rows


@pytest.mark.parametrize("capacity", [51, long(96)])
def test_rows_beside_others_are_continued_as_by_transformers(pair, wanted, capacity):
    found = butler_jax.generate(pair[1], PROMPTS, max_new_tokens=NEW, stop=(), capacity=capacity)
    assert found.tokens == wanted


@pytest.mark.slow
def test_a_row_that_crosses_is_read_again_with_the_predictors_caches(pair, wanted):
    base = pair[1]
    predictor = make_predictor(base.config, PredictorConfig(rank=4, stride=2))
    settings = dict(predictor=predictor, max_new_tokens=NEW, stop=(), capacity=51, score_dtype="int8")
    everything = butler_jax.generate(base, PROMPTS, selection=SelectionConfig(budget=1.0), **settings)
    assert everything.tokens == wanted


@pytest.mark.long  # the tokens of dense rows above do not either
@pytest.mark.slow
def test_a_sparse_row_that_crosses_does_not_depend_on_the_rows_beside_it(pair):
    base = pair[1]
    predictor = make_predictor(base.config, PredictorConfig(rank=4, stride=2))
    settings = dict(predictor=predictor, max_new_tokens=NEW, stop=(), capacity=51, score_dtype="int8")
    few = SelectionConfig(budget=0.5, sinks=1, recent=2, interval=2)
    together = butler_jax.generate(base, PROMPTS, selection=few, **settings)
    assert butler_jax.generate(base, PROMPTS[0], selection=few, **settings).tokens[0] == together.tokens[0]


@pytest.mark.slow
def test_a_policy_that_evicts_and_offload_at_the_border(pair, wanted):
    keeps = dict(selection=SelectionConfig(budget=1.0), max_new_tokens=NEW, stop=(), capacity=51)
    for policy in ("h2o", "snapkv"):  # the second keeps the attention of many rows
        assert butler_jax.generate(pair[1], PROMPTS[:2], policy=policy, **keeps).tokens == wanted[:2]
    with pytest.raises(ValueError, match="a row would grow beyond the original context of longrope"):
        butler_jax.generate(pair[1], PROMPTS[2], max_new_tokens=2, offload=True)


@pytest.mark.slow
def test_rows_of_a_queue_cross_where_they_come_to_the_border(pair, wanted):
    requests = [butler_jax.Request(prompt, NEW, stop=()) for prompt in PROMPTS]
    found = sorted(butler_jax.serve(pair[1], requests, slots=2, capacity=51, chunk=16), key=lambda one: one.number)
    assert [one.tokens for one in found] == wanted
