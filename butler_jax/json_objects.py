"""JSON objects from files and lines: whatever is wrong with one is a ValueError that says where."""

from __future__ import annotations

import json
import re
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from butler_jax.configs import require
from butler_jax.typed import shown

MOST_BYTES = 32 << 20
"""The largest configuration or index that is read: parsed, JSON may take some twenty times its size."""

HALF = re.compile(r"\\u[dD][89a-fA-F]")
LONGEST_LINE = 64 << 20


def parse_object(text: str | bytes, where: str) -> dict[str, Any]:
    """The JSON object in a text, in UTF-8 where it is bytes. where: file and line, for the ValueError otherwise."""
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
    require(isinstance(values, dict), f"{where} must hold a JSON object, not {shown(values)}")
    return values


def read_object(path: Path, *, most: int = MOST_BYTES) -> dict[str, Any]:
    """The JSON object that a file holds. ValueError naming the file where it holds none or is larger."""
    found = path.stat()
    require(stat.S_ISREG(found.st_mode), f"{path} is no regular file")
    size = found.st_size
    require(size <= most, f"{path} has {size} bytes; nothing of its kind has more than {most}")
    return parse_object(path.read_bytes(), str(path))


def read_lines(path: Path, *, longest: int = LONGEST_LINE) -> Iterator[tuple[int, bytes]]:
    """(number from 1, bytes with their end) of a file's lines; ValueError where one is longer than `longest` bytes."""
    with path.open("rb") as file:
        number = 0
        while raw := file.readline(longest + 1):
            number += 1
            require(len(raw) <= longest, f"{path}, line {number}: more than {longest} bytes; cut it into lines")
            yield number, raw
