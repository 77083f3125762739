"""The common part of the long-context tasks: a text of a given length, and a mask of the tokens to predict in it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from butler_jax.text import Tokenizer

Span = tuple[int, int]


class TooShortError(ValueError):
    """A length that leaves no room for a sample; `least` is the shortest that does."""

    def __init__(self, length: int, least: int):
        super().__init__(f"{length} tokens are too short for this sample; give at least {least}")
        self.least = least


@dataclass(frozen=True)
class AskedSample:
    """A text and the answers that a model has to predict in it.

    Attributes:
        text: The text, answers included.
        spans: Half-open ranges of characters; text[start:end] is an answer.
        tokens: The token ids of the text, with `bos` where the tokenizer adds it.
        asked: For each token, whether it belongs to an answer.
    """

    text: str
    spans: tuple[Span, ...]
    tokens: tuple[int, ...]
    asked: tuple[bool, ...]


def asked_tokens(tokenizer: Tokenizer, text: str, spans: Sequence[Span]) -> tuple[list[int], list[bool]]:
    """The token ids of a text and, for each, whether it belongs to one of the spans of characters.

    The space before a span counts as part of it, also where it is a token of its own.
    """
    tokens, offsets = tokenizer.encode_with_offsets(text)
    asked = [False] * len(tokens)
    for first, last in spans:
        for number, (start, end) in enumerate(offsets):
            asked[number] |= end >= first and start < last
    return tokens, asked


def find_largest(size: Callable[[int], int], most: int, length: int) -> int:
    """The largest number in 0 ... most with size(number) <= length, found by interpolation; -1 where there is none.

    `size` grows nearly in proportion. Where it shrinks in between, a smaller number may be found.
    """
    low, high = 0, most
    small, great = size(low), size(high)
    if small > length:
        return -1
    if great <= length:
        return most
    while high - low > 1:
        guess = low + (length - small) * (high - low) // (great - small)
        middle = min(max(guess, low + 1), high - 1)
        found = size(middle)
        if found <= length:
            low, small = middle, found
        else:
            high, great = middle, found
    return low
