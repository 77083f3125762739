"""What the long-context tasks share: a text whose answers are asked for, as tokens with a mask, of a given length."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from butler_jax.text import Tokenizer

Span = tuple[int, int]


@dataclass(frozen=True)
class AskedSample:
    """A text and what a model has to predict in it.

    text[start:end] of each span in `spans` is an answer. tokens: ids of the text, with the first token that the
    tokenizer adds. asked: for each token, whether it belongs to an answer.
    """

    text: str
    spans: tuple[Span, ...]
    tokens: tuple[int, ...]
    asked: tuple[bool, ...]

    @property
    def answers(self) -> tuple[str, ...]:
        """The answers, in order."""
        return tuple(self.text[start:end] for start, end in self.spans)


def asked_tokens(tokenizer: Tokenizer, text: str, spans: Sequence[Span]) -> tuple[list[int], list[bool]]:
    """Token ids of `text` and, for each, whether it belongs to one of the spans of characters.

    The space before a span belongs to it, also as a token of its own.
    """
    tokens, offsets = tokenizer.encode_with_offsets(text)
    asked = [False] * len(tokens)
    for first, last in spans:
        for number, (start, end) in enumerate(offsets):
            asked[number] |= end >= first and start < last
    return tokens, asked


def largest(size: Callable[[int], int], most: int, length: int) -> int:
    """The largest number in 0 ... most whose size is at most `length`, found by interpolation; -1 where none is.

    size: grows with the number, nearly in proportion; a step that shrinks it may hide a larger number.
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
