"""Checks of single values, before anything is computed with them."""

from __future__ import annotations

import dataclasses
import math
import reprlib
from collections.abc import Mapping
from numbers import Integral
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints


def whole(value: Any, name: str, *, least: int = 1) -> int:
    """`value` as an int, if it is a whole number of at least `least`. Otherwise raises ValueError with its name."""
    if not isinstance(value, Integral) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name} must be a whole number of at least {least}, got {shown(value)}")
    return int(value)


def number(value: Any, name: str) -> float:
    """`value` as a finite float. Raises ValueError with its name if it is none."""
    try:
        if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
            return float(value)
    except OverflowError:  # an int beyond the range of float
        pass
    raise ValueError(f"{name} must be a finite number, got {shown(value)}")


def shown(value: Any) -> str:
    """A value as text for a message, shortened where it is long or deeply nested."""
    try:
        return reprlib.repr(value)
    except ValueError:  # an int of more digits than Python writes
        return f"a {type(value).__name__} of very many digits"


def deeper(value: Any, levels: int) -> bool:
    """Whether lists and dicts are nested deeper than `levels`, so that reading or writing them may fail."""
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else None
    return inner is not None and (levels == 0 or any(deeper(one, levels - 1) for one in inner))


def fits(value: Any, hint: Any) -> bool:
    """Whether a value read from JSON can stand for an annotated type.

    A list can stand for a tuple, a text for a Path, an int for a float, and an object for a dataclass. A bool is not a
    number.
    """
    origin, arguments = get_origin(hint), get_args(hint)
    if hint is Any:
        return True
    if origin in (Union, UnionType):
        return any(fits(value, one) for one in arguments)
    if origin is Literal:
        return any(type(value) is type(one) and value == one for one in arguments)
    if origin in (tuple, list):
        every = arguments[0] if arguments else Any
        return isinstance(value, (tuple, list)) and all(fits(one, every) for one in value)
    if origin in (dict, Mapping):
        return isinstance(value, dict)
    if dataclasses.is_dataclass(hint):
        hints = get_type_hints(hint)
        return isinstance(value, dict) and all(name in hints and fits(one, hints[name]) for name, one in value.items())
    if hint in (None, NoneType):
        return value is None
    if hint in (int, float):
        whole = type(value) is int and (hint is int or value.bit_length() < 1024)  # larger ones have no float
        return whole or (hint is float and isinstance(value, float))
    return isinstance(value, (str, Path) if hint is Path else hint)
