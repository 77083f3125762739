"""JSON from files and lines. Whatever is wrong with it raises a ValueError that says where."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from butler_jax.storage.files import open_regular
from butler_jax.storage.values import shown

MOST_BYTES = 32 << 20
"""The largest configuration or index that is read, in bytes. In memory, JSON may take twenty times its size."""

HALF = re.compile(r"\\u[dD][89a-fA-F]")
"""Half of a surrogate pair."""

LONGEST_LINE = 64 << 20
"""The longest line that is read, in bytes."""


def parse_value(text: str | bytes, where: str) -> Any:
    """The JSON value in a text or in UTF-8 bytes; `where` names file and line for the error.

    Raises:
        ValueError: It is not valid JSON.
    """
    try:
        text = text.decode("utf-8") if isinstance(text, bytes) else text
        values = json.loads(text)
        if HALF.search(text):
            json.dumps(values, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise ValueError(f"{where} has half a character, a \\ud... without its other half") from None
    except RecursionError:
        raise ValueError(f"{where} is not valid JSON: it is nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"{where} is not valid JSON: {error}") from None
    return values


def parse_object(text: str | bytes, where: str) -> dict[str, Any]:
    """The JSON object in a text. As `parse_value`, and raises ValueError for other values."""
    values = parse_value(text, where)
    if not isinstance(values, dict):
        raise ValueError(f"{where} must hold a JSON object, not {shown(values)}")
    return values


def read_value(path: Path, *, most: int = MOST_BYTES) -> Any:
    """The JSON value that a file of at most `most` bytes holds.

    Raises:
        ValueError: It is larger, holds no valid JSON, or is not a regular file.
    """
    return parse_value(_read(path, most), str(path))


def read_object(path: Path, *, most: int = MOST_BYTES) -> dict[str, Any]:
    """The JSON object that a file holds. As `read_value`, and raises ValueError for other values."""
    return parse_object(_read(path, most), str(path))


def _read(path: Path, most: int) -> bytes:
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > most:
            raise ValueError(f"{path} has {size} bytes; nothing of its kind has more than {most}")
        text = file.read(most + 1) or b""
    if len(text) > most:  # it grows as it is read
        raise ValueError(f"{path} has more than {most} bytes; nothing of its kind has")
    return text


def read_lines(path: Path, *, longest: int = LONGEST_LINE) -> Iterator[tuple[int, bytes]]:
    """Yield the lines of a file as (number from 1, bytes with the line's end).

    Raises:
        ValueError: A line is longer than `longest` bytes, or it is not a regular file.
    """
    with open_regular(path) as file:
        number = 0
        while raw := file.readline(longest + 1):
            number += 1
            if len(raw) > longest:
                raise ValueError(f"{path}, line {number}: more than {longest} bytes; cut it into lines")
            yield number, raw
