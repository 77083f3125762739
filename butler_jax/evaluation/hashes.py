"""Short hashes of what results depend on: the code of a class, JSON-ready facts."""

from __future__ import annotations

import functools
import hashlib
import inspect
import json
from pathlib import Path
from types import CodeType
from typing import Any

import jax
import numpy as np

from butler_jax.parallel import hash_arrays


def hash_code(kind: type) -> str:
    """Hash the files that define a class and its bases; where there is no file, compiled functions and attributes."""
    found = hashlib.sha256()
    for part in kind.__mro__[:-1]:
        try:
            found.update(Path(inspect.getfile(part)).read_bytes())
        except (OSError, TypeError):  # defined in a notebook
            found.update(repr([(name, _describe(value)) for name, value in sorted(vars(part).items())]).encode())
    return found.hexdigest()[:16]


def _describe(value: Any) -> Any:
    """What an attribute of a class does or is; None for what is neither code, an array nor plain data."""
    if isinstance(value, property):
        return [_describe(f) for f in (value.fget, value.fset, value.fdel)]
    if isinstance(value, staticmethod | classmethod):
        return _describe(value.__func__)
    if isinstance(value, functools.cached_property):
        return _describe(value.func)
    if inspect.isfunction(value):
        return _strip_lines(value.__code__), _describe(value.__defaults__), _describe(value.__kwdefaults__)
    if isinstance(value, set | frozenset):
        return sorted(repr(_describe(one)) for one in value)
    if isinstance(value, tuple | list):
        return [_describe(one) for one in value]
    if isinstance(value, dict):
        return [(repr(key), _describe(one)) for key, one in value.items()]
    if isinstance(value, np.ndarray | jax.Array):
        return hash_arrays(value)
    return repr(value) if isinstance(value, str | bytes | int | float | complex | None) else None


def hash_facts(facts: dict[str, Any]) -> str:
    """Hash JSON-ready facts."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()[:24]


def _strip_lines(function: CodeType) -> tuple:
    """What a function does, without line numbers."""
    inside = [_strip_lines(c) if isinstance(c, CodeType) else repr(c) for c in function.co_consts]
    return function.co_code, function.co_names, inside
