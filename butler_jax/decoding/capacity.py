"""How many tokens a cache gets room for."""

from __future__ import annotations

import numpy as np


def bucket(length: int, least: int) -> int:
    """The next of least * (1, 1.5, 2, 3, 4, 6, 8, ...)."""
    size = least
    while size < length:
        if size * 3 // 2 >= length:
            return size * 3 // 2
        size *= 2
    return size


def room_for_all(lengths: np.ndarray, new: int, capacity: int | None, context: int) -> int:
    """Tokens that every row gets room for. Raises ValueError where prompts and new tokens do not fit."""
    longest = int(lengths.max())
    needed = longest + new - 1  # the last token is not fed back
    if longest > context:
        raise ValueError(f"a prompt of {longest} tokens is beyond the model's context of {context} tokens; shorten it")
    if needed > context:
        raise ValueError(
            f"a prompt of {longest} tokens and {new} new ones are beyond the model's context of {context} tokens; ask "
            f"for at most {context - longest + 1} new tokens, or shorten the prompt"
        )
    if capacity is None:
        return min(bucket(needed, 64), context)
    if longest > capacity:
        raise ValueError(f"a prompt of {longest} tokens does not fit a cache of {capacity}; raise the capacity")
    if needed > capacity:
        raise ValueError(
            f"the cache of {capacity} tokens would be full after {capacity - longest + 1} new tokens of {new}; raise "
            "the capacity or lower max_new_tokens"
        )
    if capacity > context:
        raise ValueError(f"a cache of {capacity} tokens is beyond the model's context of {context}")
    return capacity
