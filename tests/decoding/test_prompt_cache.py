"""A conversation whose caches are kept: the tokens of reading it anew, and how much of it is not read again."""

from __future__ import annotations

import numpy as np
import pytest

import butler_jax
from butler_jax.decoding import PromptCache
from butler_jax.decoding.config import SamplingConfig
from butler_jax.predictors import PredictorConfig, make_predictor
from butler_jax.selection import SelectionConfig
from butler_jax.weights import load_base
from tests import reference_models
from tests.marked import long

WORDS = np.random.default_rng(0).integers(3, 25, 200).tolist()
SOME = SelectionConfig(budget=0.4, sinks=1, recent=2, interval=3, unit=2)


def turns(base, lengths, new, *, end=None, **settings):
    """Answer prompts that each go on from the answer before. Returns the tokens kept of each.

    lengths: tokens that each turn adds. end: tokens of the prompt and the answer that the next prompt begins with.
    """
    cache, prompt, kept, words = PromptCache(), [], [], iter(WORDS)
    for length in lengths:
        prompt = [*prompt, *(next(words) for _ in range(length))]
        found = butler_jax.generate(base, prompt, cache=cache, max_new_tokens=new, stop=(), **settings)
        anew = butler_jax.generate(base, prompt, max_new_tokens=new, stop=(), **settings)
        assert found.tokens == anew.tokens
        assert found.attended == pytest.approx(anew.attended)
        prompt = [*prompt, *found.tokens[0]][:end]
        kept.append(found.kept_tokens)
    return kept


def test_a_refused_call_leaves_what_is_held(base):
    cache = PromptCache()
    first = butler_jax.generate(base, WORDS[:9], cache=cache, max_new_tokens=2, stop=())
    prompt = [*WORDS[:9], *first.tokens[0], 5]
    for wrong in (dict(seed="x"), dict(stop=[""])):
        with pytest.raises(ValueError, match=r"the seed must be|a text to stop at is empty"):
            butler_jax.generate(base, prompt, cache=cache, max_new_tokens=2, **wrong)
    assert butler_jax.generate(base, prompt, cache=cache, max_new_tokens=2, stop=()).kept_tokens > 0


def test_a_call_that_still_runs_leaves_a_later_one_alone(base):
    settings = dict(cache=PromptCache(), capacity=64, stop=())
    first = butler_jax.generate_stream(base, WORDS[:9], max_new_tokens=9, **settings)
    next(first)
    answer = butler_jax.generate(base, WORDS[10:20], max_new_tokens=4, **settings)
    list(first)
    prompt = [*WORDS[10:20], *answer.tokens[0]]
    found = butler_jax.generate(base, prompt, max_new_tokens=8, **settings)
    assert found.kept_tokens == 13
    assert found.tokens == butler_jax.generate(base, prompt, max_new_tokens=8, stop=()).tokens


def test_two_calls_in_turn_go_on_from_the_same_prompt(base):
    settings = dict(cache=PromptCache(), capacity=64, stop=(), max_new_tokens=6)
    alone = butler_jax.generate(base, WORDS[:9], capacity=64, stop=(), max_new_tokens=6)
    first = butler_jax.generate_stream(base, WORDS[:9], **settings)
    tokens = [next(first).token]
    second = butler_jax.generate_stream(base, WORDS[:9], **settings)
    tokens += [piece.token for piece in first]  # frees what the cache held when the second was made
    assert [tokens, [piece.token for piece in second]] == alone.tokens * 2


@pytest.mark.slow
def test_dense_turns_keep_prompt_and_answer(base):
    drawn = SamplingConfig(temperature=1.0, repetition_penalty=1.1)
    assert turns(base, [9, 5, 1, 30], 8, sampling=drawn, seed=3) == [0, 16, 29, 38]  # the last token is not fed


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["lookahead", long("contextual")])
def test_sparse_turns_keep_the_prompt(base, kind):
    predictor = make_predictor(base.config, PredictorConfig(kind=kind, rank=8, stride=2))
    assert turns(base, [9, 40], 12, predictor=predictor, selection=SOME) == [0, 9]


@pytest.mark.slow
def test_a_text_that_changes_earlier_goes_back_to_where_it_is_the_same(base):
    assert turns(base, [20, 30, 25], 8, end=12) == [0, 12, 12]
    cache, settings = PromptCache(), dict(max_new_tokens=8, stop=())
    butler_jax.generate(base, WORDS[:40], cache=cache, **settings)
    short = butler_jax.generate(base, WORDS[:10], cache=cache, **settings)  # of a smaller cache
    assert short.kept_tokens == 9 and short.tokens == butler_jax.generate(base, WORDS[:10], **settings).tokens
    other = butler_jax.generate(base, WORDS[50:60], cache=cache, **settings)
    assert other.kept_tokens == 0
    with pytest.raises(ValueError, match="a cache is for one prompt, and there are 2"):
        butler_jax.generate(base, [WORDS[:3], WORDS[:4]], cache=cache)


@pytest.mark.slow
def test_what_cannot_go_on_is_read_anew(base, predictor):
    assert turns(base, [9, 5], 4, policy="h2o", selection=SelectionConfig(budget=6, sinks=1, recent=2)) == [0, 0]
    assert turns(base, [9, 5], 4, predictor=predictor, score_dtype="int8") == [0, 0]
    assert turns(base, [9, 5], 4, predictor=predictor, offload=True) == [0, 0]
    cache, settings = PromptCache(), dict(max_new_tokens=2, stop=())
    butler_jax.generate(base, WORDS[:9], cache=cache, **settings)
    assert butler_jax.generate(base, WORDS[:12], cache=cache, predictor=predictor, **settings).kept_tokens == 0


@pytest.mark.long  # as a queue of test_longrope.py
@pytest.mark.slow
def test_longrope_is_read_anew_beyond_its_original_context(tmp_path):
    reference_models.save_model("phi3 longrope", tmp_path)
    assert turns(load_base(tmp_path), [10, 5, 5, 5], 8) == [0, 17, 0, 43]  # of 10, 23, 36, 49; the border is 32
