"""Prompts of any kind become token ids or an error."""

from functools import partial
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest

from butler_jax.text.prompts import encode, read_stops
from butler_jax.weights import load_base


def test_prompts_of_any_kind_are_tokens_or_an_error(small_model):
    base = load_base("tiny")
    end, read = base.tokenizer.eos, partial(encode, base.tokenizer, base.config.vocab_size)
    assert read("a\0b")[0] and base.tokenizer.decode(read("a\0b")[0]) == "a\0b"
    assert end in read("a<|endoftext|>b")[0]  # what spells a special token is that token
    assert read("") == [[base.tokenizer.bos]]
    for ids in ([3, 4], [[3, 4], [5, 6]]):
        assert read(jnp.asarray(ids)) == read(np.asarray(ids)) == read(ids)
    for half in ("\ud800", "a\udfffb", "\udce9"):  # the last is what a Latin-1 argument becomes
        with pytest.raises(ValueError, match="half a character at"):
            read(half)
    for wrong in ([[]], [], [[10**30]], [[-1]], [None], [[1.5]], 5, [["a"]], {"a": 1}, [object()], b"the"):
        with pytest.raises(ValueError, match="prompt"):
            read(wrong)


def test_stops_come_beside_the_ends_of_the_tokenizer():
    tokenizer = SimpleNamespace(
        ends=frozenset({7, 9}), backend=SimpleNamespace(token_to_id={"<end>": 9, "a": 3}.get), decode=lambda ids: ""
    )
    read = partial(read_stops, tokenizer, 10)
    assert read(None) == ({7, 9}, ()) and read([]) == read(()) == (set(), ())
    assert read("\n") == ({7, 9}, ("\n",)) and read([2, "x"]) == ({7, 9, 2}, ("x",))
    assert read(4) == ({7, 9, 4}, ()) and read("<end>") == ({7, 9}, ())
    assert read_stops(None, 10, None) == (set(), ()) and read_stops(None, 10, [2]) == ({2}, ())
