"""Prompts of any kind become token ids or an error."""

import pytest

from butler_jax.text.prompts import encode
from butler_jax.weights import load_base


def test_prompts_of_any_kind_are_tokens_or_an_error(small_model):
    base = load_base("tiny")
    end = base.tokenizer.eos
    assert encode(base, "a\0b")[0] and base.tokenizer.decode(encode(base, "a\0b")[0]) == "a\0b"
    assert end in encode(base, "a<|endoftext|>b")[0]  # what spells a special token is that token
    assert encode(base, "") == [[base.tokenizer.bos]]
    for half in ("\ud800", "a\udfffb", "\udce9"):  # the last is what a Latin-1 argument becomes
        with pytest.raises(ValueError, match="half a character at"):
            encode(base, half)
    for wrong in ([[]], [], [[10**30]], [[-1]], [None], [[1.5]], 5, [["a"]], {"a": 1}, [object()]):
        with pytest.raises(ValueError, match="prompt"):
            encode(base, wrong)
