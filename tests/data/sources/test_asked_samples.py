"""Samples that ask for answers: their tokens, their lengths, and the errors of settings that cannot be."""

from __future__ import annotations

import re

import numpy as np
import pytest

from butler_jax.data.sources import needle, retrieval
from butler_jax.data.sources.asked_samples import asked_tokens, find_largest
from tests.tiny_haystack import HAYSTACK


def test_marked_tokens_cover_their_spans(tokenizer):
    text = "One is 12345. Two is velmora quithas"
    first, second = text.index("12345"), text.index("velmora")
    tokens, asked = asked_tokens(tokenizer, text, [(first, first + 5), (second, len(text))])
    assert tokens == tokenizer.encode(text)
    assert tokenizer.decode([t for t, a in zip(tokens, asked, strict=True) if a]) == " 12345 velmora quithas"


def test_the_largest_number_that_fits_is_found():
    random = np.random.default_rng(0)
    for _ in range(50):
        sizes = np.cumsum(random.integers(1, 9, 60))
        for length in (0, *random.integers(1, sizes[-1] + 5, 6)):
            assert find_largest(lambda n, sizes=sizes: int(sizes[n]), 59, length) == int((sizes <= length).sum()) - 1


def test_samples_follow_from_seed_and_index_alone(tokenizer):
    makers = [
        lambda seed, index: needle.sample(tokenizer, HAYSTACK, 300, 0.3, seed=seed, index=index),
        lambda seed, index: retrieval.key_value(tokenizer, 300, seed=seed, index=index),
        lambda seed, index: retrieval.variables(tokenizer, 300, seed=seed, index=index),
    ]
    for make in makers:
        texts = {make(seed, index).text for seed in range(3) for index in range(4)}
        assert len(texts) == 12
        assert make(1, 2) == make(1, 2)


def test_bad_input_is_answered_with_what_to_do(tokenizer):
    def raises(text, make, *args, **more):
        with pytest.raises(ValueError, match=text):
            make(*args, **more)

    raises("haystack is empty", needle.sample, tokenizer, " \n", 300, 0.5)
    raises("share of the haystack from 0 to 1, got 1.5", needle.sample, tokenizer, HAYSTACK, 300, 1.5)
    raises("known: place, number, word", needle.sample, tokenizer, HAYSTACK, 300, 0.5, kind="song")
    raises("known: number, word", retrieval.key_value, tokenizer, 300, value="song")
    raises("known: value, variables", retrieval.variables, tokenizer, 300, question="why")
    raises("hops must be 0 or more", retrieval.variables, tokenizer, 300, hops=-1)
    raises("queries must be at least 1", retrieval.key_value, tokenizer, 300, queries=0)
    raises("give fewer", retrieval.key_value, tokenizer, 3_000_000)
    for make in (
        lambda length: needle.sample(tokenizer, HAYSTACK, length, 0.5),
        lambda length: retrieval.key_value(tokenizer, length),
        lambda length: retrieval.variables(tokenizer, length),
    ):
        with pytest.raises(ValueError, match="give at least") as raised:
            make(20)
        least = int(re.search(r"give at least (\d+)", str(raised.value)).group(1))
        assert len(make(least).tokens) <= least, "the length that the message names does"
        raises("give at least", make, least - 1)
