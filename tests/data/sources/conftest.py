"""Tokenizers of the tests of samples that ask for answers."""

from __future__ import annotations

import pytest

from butler_jax.text.tokenizer import Tokenizer
from tests.tiny_haystack import train_tokenizer


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return train_tokenizer()


@pytest.fixture(scope="session", params=[False, True], ids=["plain", "bos"])
def either(request, tokenizer) -> Tokenizer:
    """The tokenizer, and the same with a first token before every text."""
    return Tokenizer(backend=tokenizer.backend, bos=tokenizer.bos, eos=tokenizer.eos, add_bos=request.param)
