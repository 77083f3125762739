"""Prompts of any kind become token ids or an error."""

from functools import partial

import pytest

from butler_jax.text.prompts import encode
from butler_jax.weights import load_base


def test_prompts_of_any_kind_are_tokens_or_an_error(small_model):
    base = load_base("tiny")
    end, read = base.tokenizer.eos, partial(encode, base.tokenizer, base.config.vocab_size)
    assert read("a\0b")[0] and base.tokenizer.decode(read("a\0b")[0]) == "a\0b"
    assert end in read("a<|endoftext|>b")[0]  # what spells a special token is that token
    assert read("") == [[base.tokenizer.bos]]
    for half in ("\ud800", "a\udfffb", "\udce9"):  # the last is what a Latin-1 argument becomes
        with pytest.raises(ValueError, match="half a character at"):
            read(half)
    for wrong in ([[]], [], [[10**30]], [[-1]], [None], [[1.5]], 5, [["a"]], {"a": 1}, [object()], b"the"):
        with pytest.raises(ValueError, match="prompt"):
            read(wrong)
