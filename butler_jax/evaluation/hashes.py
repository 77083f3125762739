"""Short hashes of what results depend on: the code of a class, JSON-ready facts."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import inspect
import itertools
import json
from pathlib import Path
from types import CellType, CodeType
from typing import Any

import jax
import numpy as np

from butler_jax.parallel import hash_arrays


def hash_code(kind: type) -> str:
    """Hash what a class and its bases do: the files that define them, their attributes, and what their functions read.

    A function reads its closure, and data, functions and classes of its own module.
    """
    found = hashlib.sha256()
    for part in kind.__mro__[:-1]:
        with contextlib.suppress(OSError, TypeError):  # a class of a notebook has no file
            found.update(Path(inspect.getfile(part)).read_bytes())
        found.update(repr(_describe_members(part, part.__module__, set())).encode())
    return found.hexdigest()[:16]


def _describe_members(kind: type, module: str, seen: set[int]) -> list:
    members = sorted((name, value) for name, value in vars(kind).items() if name not in ("__dict__", "__weakref__"))
    return [(name, _describe(value, module, seen)) for name, value in members]


def _describe(value: Any, module: str, seen: set[int]) -> Any:
    """What a value of a module does or is; None for what is neither code, an array nor plain data.

    seen: what is being described already, which is described once.
    """
    each = lambda values: [_describe(one, module, seen) for one in values]  # noqa: E731
    if isinstance(value, str | bytes | int | float | complex | None):
        return repr(value)
    if isinstance(value, np.ndarray | jax.Array):
        return hash_arrays(value)
    if isinstance(value, tuple | list):
        return each(value)
    if isinstance(value, set | frozenset):
        return sorted(map(repr, each(value)))
    if isinstance(value, dict):
        return [(repr(key), found) for key, found in zip(value, each(value.values()), strict=True)]
    if isinstance(value, property):
        return each((value.fget, value.fset, value.fdel))
    if isinstance(value, functools.cached_property):
        return each([value.func])
    if isinstance(value, functools.partial):
        return each((value.func, value.args, value.keywords))
    value = inspect.unwrap(getattr(value, "__func__", value))  # of a static or jitted function
    if id(value) in seen or getattr(value, "__module__", None) != module:
        return None
    seen.add(id(value))
    if inspect.isclass(value):
        return _describe_members(value, module, seen)
    if not inspect.isfunction(value):
        return None
    read = (value.__globals__[name] for name in _list_names(value.__code__) if name in value.__globals__)
    cells = (cell.cell_contents for cell in value.__closure__ or () if cell != CellType())
    return _strip_lines(value.__code__), *each((value.__defaults__, value.__kwdefaults__)), each(cells), each(read)


def _list_names(function: CodeType) -> list[str]:
    """The names that a function and those inside it look up."""
    inside = (_list_names(c) for c in function.co_consts if isinstance(c, CodeType))
    return sorted({*function.co_names, *itertools.chain.from_iterable(inside)})


def hash_facts(facts: dict[str, Any]) -> str:
    """Hash JSON-ready facts."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()[:24]


def _strip_lines(function: CodeType) -> tuple:
    """What a function does, without line numbers."""

    def describe(constant):
        if isinstance(constant, CodeType):
            return _strip_lines(constant)
        return sorted(map(repr, constant)) if isinstance(constant, frozenset) else repr(constant)  # else in any order

    return function.co_code, function.co_names, [*map(describe, function.co_consts)]
