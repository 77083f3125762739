"""Prompts become token ids, and generated tokens become text piece by piece."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import takewhile
from typing import Any

import jax
import numpy as np

from butler_jax.storage import shown
from butler_jax.text.tokenizer import Tokenizer

Prompts = str | Sequence[str] | Sequence[int] | Sequence[Sequence[int]]


def encode(tokenizer: Tokenizer | None, vocab_size: int, prompts: Prompts) -> list[list[int]]:
    """Encode prompts as token ids: at least one prompt with at least one id each.

    A special token that is spelled out in a text becomes that token, as with the model's own tokenizer. Give token ids
    where it must stay text.

    Args:
        tokenizer: Encodes texts; None where the model has none.
        vocab_size: Of the model; the ids are below it.
        prompts: A text, a list of texts, a list or an array of token ids, or a list of such lists. An empty text is
            the token at which texts begin, where the tokenizer has one.

    Raises:
        ValueError: A prompt is empty or of another type, an id is out of range, a text contains a lone surrogate, or
            there is no tokenizer for a text.
    """
    if isinstance(prompts, (str, bytes, bytearray)):  # bytes are refused below
        prompts = [prompts]
    if isinstance(prompts, (jax.Array, np.ndarray)):
        prompts = np.asarray(prompts).tolist()
    if not isinstance(prompts, Sequence):
        raise ValueError(f"prompts must be a text, or a list of texts or of token ids, got {type(prompts).__name__}")
    prompts = list(prompts)
    if not prompts:
        raise ValueError("there is no prompt; give a text, or a list of texts or of token ids")
    if all(isinstance(p, (int, np.integer)) for p in prompts):
        prompts = [prompts]
    return [encode_prompt(tokenizer, vocab_size, one, f"prompt {number}") for number, one in enumerate(prompts)]


def encode_prompt(tokenizer: Tokenizer | None, vocab_size: int, prompt: Any, name: str) -> list[int]:
    """Encode one prompt as `encode` does. Errors call it `name`."""
    if isinstance(prompt, str):
        if tokenizer is None:
            raise ValueError(f"{name} is a text, and the base has no tokenizer; give token ids")
        row = tokenizer.encode(prompt)
        if not row and tokenizer.bos is not None:
            row = [tokenizer.bos]
    else:
        prompt = np.asarray(prompt) if isinstance(prompt, jax.Array) else prompt
        ids = isinstance(prompt, (Sequence, np.ndarray)) and not isinstance(prompt, (bytes, bytearray))
        ids = ids and all(isinstance(t, (int, np.integer)) for t in prompt)
        if not ids:
            raise ValueError(f"{name} must be a text or a list of token ids, got {shown(prompt)}")
        row = [int(token) for token in prompt]
    if not row:
        raise ValueError(f"{name} is empty; give at least one token")
    wrong = [token for token in row if not 0 <= token < vocab_size]
    if wrong:
        raise ValueError(f"{name} has the token {wrong[0]}; the vocabulary is 0 ... {vocab_size - 1}")
    return row


Stop = Sequence[int | str] | int | str | None
"""Token ids and texts, or one of them, that end a row beside the tokenizer's ends. None: these ends alone. An empty
list: nothing ends a row."""


def read_stops(tokenizer: Tokenizer | None, vocab_size: int, stop: Stop) -> tuple[set[int], tuple[str, ...]]:
    """The token ids, and the texts, that end a row.

    Args:
        stop: A text that spells a special token is that token, since decoded text does not show it.

    Raises:
        ValueError: An id is out of range, a text is empty, there is no tokenizer for a text, or bytes are given.
    """
    given = () if stop is None else (stop,) if isinstance(stop, str) or not isinstance(stop, Iterable) else tuple(stop)
    none = tokenizer is None or (stop is not None and not given)
    ids, texts = set() if none else set(tokenizer.ends), []
    if isinstance(stop, bytes | bytearray):
        raise ValueError(f"stop must be token ids and texts, got {shown(stop)}; decode it")
    for one in given:
        if isinstance(one, str):
            if tokenizer is None:
                raise ValueError(f"stop {one!r} is a text, and the base has no tokenizer; give token ids")
            if not one:
                raise ValueError("a text to stop at is empty; leave it out")
            token = tokenizer.backend.token_to_id(one)
            if token is None or tokenizer.decode([token]):
                texts.append(one)
                continue
            one = token
        if not isinstance(one, (int, np.integer)) or not 0 <= one < vocab_size:
            raise ValueError(f"stop {one!r} is no token; the vocabulary is 0 ... {vocab_size - 1}")
        ids.add(int(one))
    return ids, tuple(texts)


WAITING = 16  # tokens to wait for the rest of a character; a character has at most four bytes, so more are not text
BEFORE = 64  # tokens of the prompt that decoders see before the first new one: some strip the first space of a text


class Writer:
    """Turns a row's tokens into text piece by piece.

    An incomplete character is held back for up to WAITING tokens, and left out where the row ends in it. The possible
    beginning of a text to stop at is held back until it is decided.

    Attributes:
        shown: How many tokens, those of the prompt included, are text by now.
        stopped: Whether one of the texts to stop at has come. The text ends before it.
    """

    def __init__(self, tokenizer: Any, prompt: Sequence[int] = (), stops: Sequence[str] = ()):
        self.tokenizer, self.tokens, self.stops = tokenizer, list(prompt[-BEFORE:]), stops
        self.start, self.shown, self.held, self.stopped = 0, len(self.tokens), "", False

    def add(self, token: int, last: bool) -> str:
        """The text that this token completes. With last=True, the held text too."""
        if self.tokenizer is None:
            return ""
        text = self.held + self._complete(token, last)
        found = [text.find(stop) for stop in self.stops if stop in text]
        if found:
            self.stopped, self.held = True, ""
            return text[: min(found)]
        begun = (n for stop in self.stops for n in range(1, len(stop)) if text.endswith(stop[:n]))
        shown = len(text) - (0 if last else max(begun, default=0))
        self.held = text[shown:]
        return text[:shown]

    def close(self) -> str:
        """The held text, of a row that ends before its last token; without an incomplete character."""
        text, self.held = self.held, ""
        return text

    def _complete(self, token: int, last: bool) -> str:
        """The whole characters that this token completes."""
        self.tokens.append(token)
        before = self.tokenizer.decode(self.tokens[self.start : self.shown])
        now = self.tokenizer.decode(self.tokens[self.start :])
        if now.endswith("\ufffd") and len(self.tokens) - self.shown < WAITING:
            if not last:
                return ""
            now = now.rstrip("\ufffd")
        same = takewhile(lambda pair: pair[0] == pair[1], zip(before, now, strict=False))
        new = now[sum(1 for _ in same) :]
        if new:  # special tokens alone would be no text before the next token
            self.start = self.shown
        self.shown = len(self.tokens)
        return new
