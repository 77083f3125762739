"""Prompts as token ids, and new tokens as text, piece by piece."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from butler_jax.storage import shown

if TYPE_CHECKING:
    from butler_jax.weights import Base

Prompts = str | Sequence[str] | Sequence[int] | Sequence[Sequence[int]]


def encode(base: Base, prompts: Prompts) -> list[list[int]]:
    """Token ids of every prompt.

    What spells a special token in a text becomes that token, as with the model's own tokenizer: give token ids where
    that must not be. Raises ValueError for an empty prompt, ids out of range, half a character (a lone surrogate), or
    text without a tokenizer.
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
            if base.tokenizer is None:
                raise ValueError(f"the base {base.name} has no tokenizer; give token ids")
            row = base.tokenizer.encode(prompt)
            if not row and base.tokenizer.bos is not None:
                row = [base.tokenizer.bos]
        else:
            whole = isinstance(prompt, (Sequence, np.ndarray)) and all(isinstance(t, (int, np.integer)) for t in prompt)
            if not whole:
                raise ValueError(f"prompt {number} must be a text or a list of token ids, got {shown(prompt)}")
            row = [int(token) for token in prompt]
        if not row:
            raise ValueError(f"prompt {number} is empty, and nothing can follow nothing; give at least one token")
        least, most = min(row), max(row)
        if not (least >= 0 and most < base.config.vocab_size):
            raise ValueError(
                f"prompt {number} has the token {least if least < 0 else most}; the vocabulary is 0 ... "
                f"{base.config.vocab_size - 1}"
            )
        rows.append(row)
    return rows


def stop_tokens(base: Base, stop: Sequence[int | str] | None) -> set[int]:
    """Ids that end a row. Raises ValueError for a text that is no token."""
    if stop is None:
        eos = None if base.tokenizer is None else base.tokenizer.eos
        return set() if eos is None else {eos}
    found = set()
    for one in [stop] if isinstance(stop, (str, int)) else stop:
        token = base.tokenizer.backend.token_to_id(one) if isinstance(one, str) and base.tokenizer else one
        if not isinstance(token, (int, np.integer)):
            raise ValueError(f"stop {one!r} is not a single token of {base.name}; give a token id")
        if not (0 <= token < base.config.vocab_size):
            raise ValueError(
                f"stop {token} is no token of {base.name}; its vocabulary is 0 ... {base.config.vocab_size - 1}"
            )
        found.add(int(token))
    return found


WAITING = 16  # tokens that may hold one incomplete character, of four bytes at most; more are no text at all


class Writer:
    """Turns a row's tokens into text piece by piece; a character that is not complete yet waits for WAITING tokens."""

    def __init__(self, tokenizer: Any):
        self.tokenizer, self.tokens, self.start, self.shown = tokenizer, [], 0, 0

    def add(self, token: int, last: bool) -> str:
        """The text that this token completes; with the last one, all that is left."""
        if self.tokenizer is None:
            return ""
        self.tokens.append(token)
        before = self.tokenizer.decode(self.tokens[self.start : self.shown])
        now = self.tokenizer.decode(self.tokens[self.start :])
        if now.endswith("\ufffd") and not last and len(self.tokens) - self.shown < WAITING:
            return ""
        self.start, self.shown = self.shown, len(self.tokens)
        return now[len(before) :]
