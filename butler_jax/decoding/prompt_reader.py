"""The reading of one prompt, so that other rows can decode between its parts."""

from __future__ import annotations

from typing import Any

import numpy as np

from butler_jax.decoding.capacity import bucket
from butler_jax.decoding.prompt_parts import begin_reading, end_reading, read_part
from butler_jax.decoding.settings import Decoding
from butler_jax.decoding.slots import ReadRow, read_whole
from butler_jax.model import BaseModel
from butler_jax.predictors import Predictor


class PromptReader:
    """Reads a prompt part by part, in one of three widths. `found` is the row once the last part was dispatched."""

    def __init__(self, model: BaseModel, predictor: Predictor | None, how: Decoding, tokens: list[int], following: int):
        self.model, self.predictor, self.how, self.tokens = model, predictor, how, tokens
        self.widths = sorted({how.chunk, max(how.chunk // 4, 1), max(how.chunk // 16, 1)}, reverse=True)
        self.following, self.length, self.done = np.int32(following), np.asarray([len(tokens)], np.int32), 0
        self.filled: Any = None
        self.found: ReadRow | None = None

    def read(self) -> None:
        """Dispatch the next part. Under a policy that evicts, it is the whole prompt."""
        model, predictor, how = self.model, self.predictor, self.how
        if how.plan.when == "evicting":
            tokens = self._padded(0, min(bucket(len(self.tokens), 64), how.capacity))
            self.found = read_whole(model, predictor, tokens, self.length, self.following, how=how)
            return
        if self.filled is None:
            self.filled = begin_reading(model, predictor, 1, how.capacity, offload=how.offload)
        left = len(self.tokens) - self.done
        width = next((w for w in self.widths if left > w // 2), self.widths[-1])
        start = min(self.done, how.capacity - width)  # the last part may reach back, never beyond the cache
        tokens = self._padded(start, width)
        where = np.int32(start), self.length, self.following
        self.filled = read_part(model, predictor, tokens, *where, self.filled)
        self.done = start + width
        if self.done >= len(self.tokens):
            kept = dict(plan=how.plan, score_dtype=how.score_dtype)
            self.found = ReadRow(*end_reading(model, self.length, *self.filled, **kept))
            self.filled = None

    def _padded(self, start: int, width: int) -> np.ndarray:
        """`width` tokens of the prompt from `start` on, 0 after its end, int32 [1, width]."""
        tokens = np.zeros((1, width), np.int32)
        part = self.tokens[start : start + width]
        tokens[0, : len(part)] = part
        return tokens
