"""Checks of what a pass is given."""

from __future__ import annotations

import os
from typing import Any

import jax
import numpy as np

from butler_jax.model.config import BaseConfig

BUILT_BY = ("width", "layers", "heads", "kv_heads", "head_dim")
"""The sizes of a base by which its predictors are built."""


def require_loaded(base: Any, predictor: Any = None) -> None:
    """Raise ValueError where a name, a path or anything else stands in the place of a base or a predictor."""
    for name, value, needed in (("base", base, "model"), ("predictor", predictor, "q_imp")):
        if isinstance(value, str | os.PathLike):
            given = os.fspath(value)
            raise ValueError(f"the {name} is given as {given!r}; load it first: butler_jax.load_{name}({given!r})")
        if value is not None and not hasattr(value, needed):
            raise ValueError(f"the {name} must be what butler_jax.load_{name} gives, got a {type(value).__name__}")
    if base is not None:
        require_fit(base.config, predictor)


def require_fit(config: BaseConfig, predictor: Any) -> None:
    """Raise ValueError for a predictor that was built for a base of other sizes; None is fine."""
    if predictor is None:
        return
    theirs, own = ({name: getattr(one, name) for name in BUILT_BY} for one in (predictor.base, config))
    if theirs != own:
        raise ValueError(
            f"the predictor is of a base of other sizes: {theirs}, and this base has {own}; load its base, or train a "
            "predictor for this one"
        )


def require_model(model: Any) -> None:
    """Raise ValueError where a base stands in the place of its model."""
    if hasattr(model, "fingerprint"):
        raise ValueError("the model of a base is needed: give base.model")


def check_length(config: BaseConfig, length: int) -> None:
    """Raise ValueError where a length in tokens is 0, or exceeds the model's context."""
    if length < 1:
        raise ValueError("there are no tokens; give at least one")
    if length > config.context:
        raise ValueError(
            f"length {length} is beyond the model's context of {config.context} tokens; use at most {config.context}"
        )


def check_ids(tokens: Any, dims: str) -> None:
    """Raise ValueError where tokens are no whole numbers of these dimensions, such as "B T"."""
    shape, kind = np.shape(tokens), tokens.dtype if hasattr(tokens, "dtype") else np.asarray(tokens).dtype
    names = dims.split()
    if len(shape) != len(names) or not np.issubdtype(kind, np.integer):
        raise ValueError(f"tokens must be whole numbers [{', '.join(names)}], got {kind}{list(shape)}")


def check_tokens(config: BaseConfig, tokens: Any, dims: str, real: Any = None, said: str = "there is") -> None:
    """Raise ValueError as `check_ids`, and where a token that this process knows is outside of the vocabulary.

    Args:
        real: 0 or False where a token is padding, such as segments; None where none is.
        said: How the error begins.
    """
    check_ids(tokens, dims)
    if isinstance(tokens, jax.core.Tracer) or not getattr(tokens, "is_fully_addressable", True):
        return
    known = np.asarray(tokens)
    wrong = (known < 0) | (known >= config.vocab_size)
    if real is not None:
        wrong &= np.asarray(real) > 0
    if wrong.any():
        raise ValueError(f"{said} the token {known[wrong][0]}; the vocabulary is 0 ... {config.vocab_size - 1}")
