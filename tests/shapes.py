"""The check of array annotations that runs with the tests."""

import re
import types
from collections.abc import Callable
from functools import reduce
from operator import or_
from typing import Any, Union, get_args, get_origin

import jaxtyping
import numpy as np
from beartype import beartype
from jax import Array


def check_shapes(function: Callable) -> Callable:
    """A type checker for jaxtyping's import hook that checks shapes and dtypes of arrays, and nothing else.

    Other types stay unchecked, since tests pass wrong ones to read the error. A numpy array may stand for a jax array.
    Constructors stay unchecked, since jax builds trees of shapes and shardings with them.

    jaxtyping makes two functions of each: one checks the arguments before the call, the other checks them with the
    result after it. Only the second one checks here, so that a function can refuse wrong shapes in its own words.
    """
    after_the_call = any(re.fullmatch(r"ret\d+", name) for name in function.__annotations__)
    if not after_the_call or function.__name__ == "__init__":
        return function
    function.__annotations__ = {
        name: _relaxed(hint) if _has_array(hint) else Any for name, hint in function.__annotations__.items()
    }
    return beartype(function)


def _is_array(hint: Any) -> bool:
    return isinstance(hint, type) and issubclass(hint, jaxtyping.AbstractArray)


def _has_array(hint: Any) -> bool:
    return _is_array(hint) or any(map(_has_array, get_args(hint)))


def _relaxed(hint: Any) -> Any:
    """The hint with numpy arrays beside jax arrays."""
    if _is_array(hint):
        return hint.dtype[Array | np.ndarray, hint.dim_str]
    if get_origin(hint) in (Union, types.UnionType):
        return reduce(or_, map(_relaxed, get_args(hint)))
    if get_origin(hint) in (tuple, dict, list):
        return get_origin(hint)[tuple(map(_relaxed, get_args(hint)))]
    return hint
