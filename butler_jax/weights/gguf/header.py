"""Checks the header of a GGUF file before the library `gguf` reads it, since the library trusts counts and lengths."""

from __future__ import annotations

import math
import mmap
import struct
from pathlib import Path
from types import ModuleType

from butler_jax.storage import shown

SCALARS = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}  # type of a value -> its bytes
UINT32, STRING, ARRAY = 4, 8, 9
MOST_VALUES = 1 << 21
"""Metadata values of a file. A vocabulary of 256,000 tokens has 1.3 million; the library takes 200 bytes for each."""

MOST_BYTES = 1 << 28
"""Bytes of a header. The largest vocabularies take some 10 MiB."""

MOST_DIMENSIONS = 4
ALIGNMENT = 32


def check_header(path: Path, gguf: ModuleType) -> None:
    """Check that the counts, lengths and tensors of a GGUF file fit into it, and that tensors do not overlap.

    The check keeps nothing in memory and reads the header once. `gguf` is the library, for the sizes of its tensor
    types.

    Raises:
        ValueError: Says what does not fit. Unknown tensor types and undecodable names raise ValueError or KeyError too.
    """
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        walk = _Walk(data)
        version, tensors, entries = walk.numbers("<4xIQQ")
        if version not in (2, 3):
            raise ValueError(f"version {version} is not supported")
        alignment, keys = ALIGNMENT, set()
        for _ in range(entries):
            key = walk.text()
            if key in keys:
                raise ValueError(f"the key {shown(key)} is there twice")
            keys.add(key)
            (kind,) = walk.numbers("<I")
            if key == "general.alignment":
                if kind != UINT32:
                    raise ValueError("general.alignment is no uint32")
                (alignment,) = walk.numbers("<I")
                if alignment == 0 or alignment & (alignment - 1):
                    raise ValueError(f"general.alignment must be a power of 2, got {alignment}")
            else:
                walk.value(kind, key)
        ranges = _tensor_ranges(walk, tensors, gguf)
        start = -(-walk.at // alignment) * alignment
        end, before = 0, ""
        for first, count, name in sorted(ranges):
            if first < end:
                raise ValueError(f"tensors {shown(before)} and {shown(name)} overlap")
            end, before = first + count, name
        if start + end > len(data):
            raise ValueError(f"tensor {shown(before)} ends beyond the file")


def _tensor_ranges(walk: _Walk, tensors: int, gguf: ModuleType) -> list[tuple[int, int, str]]:
    """(first byte, bytes, name) of every tensor."""
    ranges, names = [], set()
    for _ in range(tensors):
        walk.count(1)
        name = walk.text()
        if name in names:
            raise ValueError(f"the tensor {shown(name)} is there twice")
        names.add(name)
        (dimensions,) = walk.numbers("<I")
        if not (1 <= dimensions <= MOST_DIMENSIONS):
            raise ValueError(f"tensor {shown(name)} has {dimensions} dimensions")
        shape = walk.numbers(f"<{dimensions}Q")
        kind, first = walk.numbers("<IQ")
        block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(kind)]
        if min(shape) == 0 or math.prod(shape) >= 1 << 62 or shape[0] % block:
            raise ValueError(f"tensor {shown(name)} cannot have the shape {list(reversed(shape))}")
        ranges.append((first, math.prod(shape) // block * size, name))
    return ranges


class _Walk:
    """A position in the file that moves forward; a step beyond the end raises ValueError."""

    def __init__(self, data: mmap.mmap):
        self.data, self.at, self.values = data, 0, 0

    def numbers(self, form: str) -> tuple[int, ...]:
        self.skip(struct.calcsize(form))
        return struct.unpack_from(form, self.data, self.at - struct.calcsize(form))

    def skip(self, count: int) -> None:
        self.at += count
        if self.at > len(self.data):
            raise ValueError("it ends before its header does")
        if self.at > MOST_BYTES:
            raise ValueError(f"its header has more than {MOST_BYTES} bytes")

    def text(self) -> str:
        (length,) = self.numbers("<Q")
        self.skip(length)
        return self.data[self.at - length : self.at].decode("utf-8")

    def count(self, more: int) -> None:
        self.values += more
        if self.values > MOST_VALUES:
            raise ValueError(f"its header has more than {MOST_VALUES} values")

    def value(self, kind: int, key: str) -> None:
        """Step over a value."""
        length = 1
        if kind == ARRAY:
            kind, length = self.numbers("<IQ")
            if kind == ARRAY:
                raise ValueError(f"{shown(key)} is an array of arrays, which no model needs")
        if kind not in SCALARS and kind != STRING:
            raise ValueError(f"{shown(key)} has the unknown type {kind}")
        self.count(length)
        if kind in SCALARS:
            self.skip(length * SCALARS[kind])
            return
        for _ in range(length):
            self.text()
