"""A text to hide needles in, and a tokenizer trained on it and on co-reference samples."""

from __future__ import annotations

from functools import cache
from random import Random

from butler_jax.data.sources import coreference
from butler_jax.text.tokenizer import Tokenizer, train_bpe


def prose(words: int, seed: int = 0) -> str:
    """Sentences of 4 to 14 made-up words; no digits, and no capital but at the beginning."""
    random, text, left = Random(seed), [], words
    known = ["".join(random.choice("abcdefgh") for _ in range(random.randint(1, 7))) for _ in range(200)]
    while left > 0:
        count = random.randint(4, 14)
        text.append(" ".join(random.choice(known) for _ in range(count)).capitalize() + random.choice(".?!"))
        left -= count
    return " ".join(text)


HAYSTACK = prose(3000)


@cache
def train_tokenizer() -> Tokenizer:
    """The tokenizer of tests that ask for answers."""
    return train_bpe([HAYSTACK, " ".join(coreference.sample(0, n).text for n in range(20))], 512)


def answers_of(sample) -> tuple[str, ...]:
    """The answers of a sample, as they stand in its text."""
    return tuple(sample.text[start:end] for start, end in sample.spans)


def decode_asked(tokenizer: Tokenizer, sample) -> str:
    """The text of the tokens that a sample asks for."""
    return tokenizer.decode([token for token, asked in zip(sample.tokens, sample.asked, strict=True) if asked])
