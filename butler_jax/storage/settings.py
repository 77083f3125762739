"""Configurations as JSON objects, and checks that several configurations share."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Iterable
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from butler_jax.storage.values import fits, shown

ADDRESS = r"(?:^|[:,])((gs|s3|az|abfs|hdfs|memory):/+[^,]*)"
"""Matches the address of a bucket, also of one whose path has lost a slash, in a setting."""


def require_local(config) -> None:
    """Raise ValueError where a setting is the address of a bucket.

    data_dir may be one. prompt, stop and system are texts, not paths.
    A Path has lost a slash: gs://bucket/runs has become gs:/bucket/runs.
    """
    for entry in dataclasses.fields(config):
        value = getattr(config, entry.name)
        for one in value if isinstance(value, tuple) else (value,):
            found = re.search(ADDRESS, str(one)) if isinstance(one, (str, Path)) else None
            if found is not None and entry.name not in ("data_dir", "prompt", "stop", "system"):
                raise ValueError(
                    f"--{entry.name.replace('_', '-')} {one}: files are not read from or written to a bucket's "
                    "address; mount the bucket (gcsfuse BUCKET DIRECTORY) and give the path under that directory, see "
                    "docs/guides/tpu.md"
                )


WORDS = {int: "a whole number", float: "a number", bool: "True or False", str: "text", Path: "a path"}
"""The types that `settle_types` checks, as messages call them."""


@functools.cache
def _plain_fields(kind: type) -> list[tuple[str, Any, set]]:
    """Names, annotations and types of the fields that have types of WORDS alone, or None."""
    found = []
    for name, hint in get_type_hints(kind).items():
        kinds = set(get_args(hint) if isinstance(hint, UnionType) else (hint,)) - {NoneType}
        if kinds <= WORDS.keys():
            found.append((name, hint, kinds - {int} if float in kinds else kinds))
    return found


@functools.cache
def _named_values(kind: type) -> dict[str, tuple]:
    """The values of the fields whose annotations name them, as a Literal does."""
    found = {}
    for name, hint in get_type_hints(kind).items():
        parts = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
        if {get_origin(part) for part in parts if part is not NoneType} == {Literal}:
            literals = [value for part in parts for value in get_args(part)]
            found[name] = (*literals, None) if NoneType in parts else tuple(literals)
    return found


def settle_types(config, *others: str) -> None:
    """Make numbers of numpy and JAX Python's, and a Path text where text is meant.

    Nested settings and tuples are left alone.

    Args:
        config: A dataclass.
        *others: Fields that may have other values than a Literal names.

    Raises:
        ValueError: A setting is of another type than its field, or none of the values that its field names.
    """
    for name, values in _named_values(type(config)).items():
        value = getattr(config, name)
        if value not in values and name not in others:
            raise ValueError(f"unknown {name} {shown(value)}; known: {', '.join(map(str, values))}")
    for name, hint, kinds in _plain_fields(type(config)):
        value = getattr(config, name)
        if getattr(value, "shape", None) == () and hasattr(value, "item"):
            value = value.item()
        if isinstance(value, Path) and Path not in kinds:
            value = str(value)
        if not fits(value, hint):
            words = " or ".join(word for kind, word in WORDS.items() if kind in kinds)
            raise ValueError(f"{name} must be {words}, got {shown(value)}")
        object.__setattr__(config, name, value)


def expand_home(config, *names: str) -> None:
    """Make settings Paths in which ~ is the home directory; None stays."""
    for name in names:
        value = getattr(config, name)
        object.__setattr__(config, name, None if value is None else Path(value).expanduser())


def require_positive(config, *names: str) -> None:
    """Raise ValueError where a setting is below 1."""
    for name in names:
        if getattr(config, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(config, name)}")


def split_list(values) -> tuple:
    """('a,b', 'c') or 'a,b,c' -> ('a', 'b', 'c'). Other values than text stay, and repeated entries are dropped."""
    values = (values,) if isinstance(values, str) or not isinstance(values, Iterable) else values
    parts = [p for v in values for p in (v.split(",") if isinstance(v, str) else (v,))]
    parts = [p.strip() if isinstance(p, str) else p for p in parts]
    return tuple({(type(p), p): p for p in parts if p != ""}.values())  # 1 and 1.0 are two


def to_dict(config) -> dict:
    """A configuration as nested dicts for JSON. Paths become strings."""

    def plain(value):
        if isinstance(value, dict):
            return {k: plain(v) for k, v in value.items()}
        if isinstance(value, (tuple, list)):
            return [plain(v) for v in value]
        return str(value) if isinstance(value, Path) else value

    return plain(dataclasses.asdict(config))


def from_dict(cls, values: dict):
    """Build a configuration of class `cls` from the output of `to_dict`.

    Raises:
        ValueError: A key is unknown or missing, or a value has another type.
    """
    if not isinstance(values, dict):
        raise ValueError(f"{cls.__name__} is made from a JSON object, got {shown(values)}")
    fields, hints = {f.name: f for f in dataclasses.fields(cls)}, get_type_hints(cls)
    unknown = sorted(shown(key) for key in set(values) - set(fields))
    if unknown:
        raise ValueError(f"{cls.__name__} has no {', '.join(unknown)}; it has {', '.join(fields)}")
    absent = dataclasses.MISSING
    lacking = [n for n, f in fields.items() if n not in values and f.default is absent and f.default_factory is absent]
    if lacking:
        raise ValueError(f"{cls.__name__} needs {', '.join(lacking)}")
    built: dict[str, Any] = {}
    for name, value in values.items():
        if dataclasses.is_dataclass(hints[name]) and isinstance(value, dict):
            built[name] = from_dict(hints[name], value)
            continue
        if not fits(value, hints[name]):
            raise ValueError(f"{cls.__name__}: {name} cannot be {shown(value)}; it is {fields[name].type}")
        built[name] = _tuples(value)
    return cls(**built)


def _tuples(value: Any) -> Any:
    return tuple(_tuples(v) for v in value) if isinstance(value, list) else value
