"""Which features of a data set hold the text: those that the user names after #, else "text" or the only one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

SEPARATOR = "\n\n"
"""What stands between the texts of several features."""


def split_features(source: str) -> tuple[str, tuple[str, ...]]:
    """Split NAME#FEATURE or NAME#FEATURE+FEATURE into the name and the features; none are named without #."""
    name, mark, features = source.rpartition("#")
    return (name, tuple(feature for feature in features.split("+") if feature)) if mark else (source, ())


def choose_features(asked: Sequence[str], texts: Sequence[str], found: Sequence[str], source: str) -> tuple[str, ...]:
    """Choose the features that are read.

    Args:
        asked: Those that the user named.
        texts: The features that hold text.
        found: All features, for the messages.
        source: The data set as the user writes it, without #.

    Raises:
        ValueError: One of `asked` holds no text, or none is asked for and the choice is not clear.
    """
    if missing := [name for name in asked if name not in texts]:
        raise ValueError(f"{source} has no text feature {missing[0]}; it has: {', '.join(texts) or 'none'}.")
    if asked:
        return tuple(asked)
    if "text" in texts:
        return ("text",)
    if len(texts) == 1:
        return (texts[0],)
    if not texts:
        raise ValueError(f"{source} has no text feature (features: {_listed(found)}); choose a set of text.")
    raise ValueError(
        f"{source} has several text features ({_listed(texts)}) and none is called text. Name one: "
        f"{source}#{texts[0]}, or several in their order: {source}#{'+'.join(texts[:2])}."
    )


def join_features(record: Mapping[str, Any], features: Sequence[str]) -> str:
    """The text of a record.

    Raises:
        ValueError: A feature is missing or no text.
    """
    values = [record.get(feature) for feature in features]
    for feature, value in zip(features, values, strict=True):
        if not isinstance(value, str):
            found = f"{type(value).__name__}" if feature in record else f"missing; found: {_listed(list(record))}"
            raise ValueError(f'expected a string "{feature}", and it is {found}')
    return SEPARATOR.join(values)


def _listed(names: Sequence[str]) -> str:
    return (", ".join(map(str, names[:8])) + (", ..." if len(names) > 8 else ""))[:200] or "none"
