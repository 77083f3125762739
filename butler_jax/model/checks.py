"""Checks of what a pass is given."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from butler_jax.model.config import BaseConfig


def require_model(model: Any) -> None:
    """Raise ValueError where a base stands in the place of its model."""
    if hasattr(model, "fingerprint"):
        raise ValueError("the model of a base is needed: give base.model")


def check_length(config: BaseConfig, length: int) -> None:
    """Raise ValueError where a length in tokens exceeds the model's context."""
    if length > config.context:
        raise ValueError(
            f"length {length} is beyond the model's context of {config.context} tokens; use at most {config.context}"
        )


def check_tokens(config: BaseConfig, tokens: Any, dims: str, real: Any = True) -> None:
    """Raise ValueError where tokens are no ids, or one that is known is outside of the vocabulary.

    Args:
        dims: Names of their dimensions, as in "B T".
        real: Where a token is one; the others are padding.
    """
    known = None if isinstance(tokens, jax.core.Tracer) else np.asarray(tokens)
    shape, kind = np.shape(tokens), tokens.dtype if known is None else known.dtype
    if len(shape) != len(dims.split()) or not np.issubdtype(kind, np.integer):
        raise ValueError(f"tokens must be whole numbers [{', '.join(dims.split())}], got {kind}{list(shape)}")
    if known is None or isinstance(real, jax.core.Tracer):
        return
    wrong = known[((known < 0) | (known >= config.vocab_size)) & np.asarray(real)]
    if wrong.size:
        raise ValueError(f"there is the token {wrong[0]}; the vocabulary is 0 ... {config.vocab_size - 1}")
