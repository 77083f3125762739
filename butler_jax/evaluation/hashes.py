"""Short hashes of what results depend on: arrays, the code of a class, JSON-ready facts."""

from __future__ import annotations

import hashlib
import inspect
import json
from pathlib import Path
from types import CodeType
from typing import Any

import jax
import numpy as np

from butler_jax.parallel import on_host


def hash_arrays(tree: Any) -> str:
    """Hash all numbers of a pytree with their types and shapes."""
    found = hashlib.sha256()
    for leaf in jax.tree.leaves(tree):
        values = on_host(leaf)
        found.update(f"{values.dtype}{values.shape}".encode())
        found.update(np.ascontiguousarray(values).tobytes())
    return found.hexdigest()[:16]


def hash_code(kind: type) -> str:
    """Hash the files that define a class and its bases; where there is no file, the compiled functions."""
    found = hashlib.sha256()
    for part in kind.__mro__[:-1]:
        try:
            found.update(Path(inspect.getfile(part)).read_bytes())
        except (OSError, TypeError):  # defined in a notebook
            functions = [f.__code__ for f in vars(part).values() if inspect.isfunction(f)]
            found.update(repr([_strip_lines(function) for function in functions]).encode())
    return found.hexdigest()[:16]


def hash_facts(facts: dict[str, Any]) -> str:
    """Hash JSON-ready facts."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()[:24]


def _strip_lines(function: CodeType) -> tuple:
    """What a function does, without line numbers."""
    inside = [_strip_lines(c) if isinstance(c, CodeType) else repr(c) for c in function.co_consts]
    return function.co_code, function.co_names, inside
