"""Prompts become token ids, and generated tokens become text piece by piece."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

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
        prompts: A text, a list of texts, a list of token ids, or a list of such lists.

    Raises:
        ValueError: A prompt is empty or of another type, an id is out of range, a text contains a lone surrogate, or
            there is no tokenizer for a text.
    """
    if isinstance(prompts, str):
        prompts = [prompts]
    if not isinstance(prompts, (Sequence, np.ndarray)):
        raise ValueError(f"prompts must be a text, or a list of texts or of token ids, got {type(prompts).__name__}")
    prompts = list(prompts)
    if not prompts:
        raise ValueError("there is no prompt; give a text, or a list of texts or of token ids")
    if all(isinstance(p, (int, np.integer)) for p in prompts):
        prompts = [prompts]
    rows = []
    for number, prompt in enumerate(prompts):
        if isinstance(prompt, str):
            if tokenizer is None:
                raise ValueError(f"prompt {number} is a text, and the base has no tokenizer; give token ids")
            row = tokenizer.encode(prompt)
            if not row and tokenizer.bos is not None:
                row = [tokenizer.bos]
        else:
            ids = isinstance(prompt, (Sequence, np.ndarray)) and all(isinstance(t, (int, np.integer)) for t in prompt)
            if not ids:
                raise ValueError(f"prompt {number} must be a text or a list of token ids, got {shown(prompt)}")
            row = [int(token) for token in prompt]
        if not row:
            raise ValueError(f"prompt {number} is empty; give at least one token")
        wrong = [token for token in row if not 0 <= token < vocab_size]
        if wrong:
            raise ValueError(f"prompt {number} has the token {wrong[0]}; the vocabulary is 0 ... {vocab_size - 1}")
        rows.append(row)
    return rows


def stop_tokens(tokenizer: Tokenizer | None, vocab_size: int, stop: Sequence[int | str] | int | str | None) -> set[int]:
    """The ids that end a row: token ids or texts of single tokens, or one of them; None is the tokenizer's ends.

    Raises:
        ValueError: A text is not a single token, or an id is out of range.
    """
    if stop is None:
        return set() if tokenizer is None else set(tokenizer.ends)
    found = set()
    for one in [stop] if isinstance(stop, (str, int)) else stop:
        token = tokenizer.backend.token_to_id(one) if isinstance(one, str) and tokenizer else one
        if not isinstance(token, (int, np.integer)):
            raise ValueError(f"stop {one!r} is not a single token; give a token id")
        if not 0 <= token < vocab_size:
            raise ValueError(f"stop {token} is no token; the vocabulary is 0 ... {vocab_size - 1}")
        found.add(int(token))
    return found


WAITING = 16  # tokens to wait for the rest of a character; a character has at most four bytes, so more are not text


class Writer:
    """Turns a row's tokens into text piece by piece. An incomplete character is held back for up to WAITING tokens."""

    def __init__(self, tokenizer: Any):
        self.tokenizer, self.tokens, self.start, self.shown = tokenizer, [], 0, 0

    def add(self, token: int, last: bool) -> str:
        """The text that this token completes. With last=True, the held text too."""
        if self.tokenizer is None:
            return ""
        self.tokens.append(token)
        before = self.tokenizer.decode(self.tokens[self.start : self.shown])
        now = self.tokenizer.decode(self.tokens[self.start :])
        if now.endswith("\ufffd") and not last and len(self.tokens) - self.shown < WAITING:
            return ""
        self.start, self.shown = self.shown, len(self.tokens)
        return now[len(before) :]
