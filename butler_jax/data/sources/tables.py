"""Parquet and Arrow files as rows of text, through pyarrow."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROWS = 256  # that are read at a time


@dataclass(frozen=True)
class TextTable:
    """The text features of an open file.

    Attributes:
        rows: How many rows it has.
        names: Its features.
        texts: Those that hold text.
    """

    path: Path
    rows: int
    names: list[str]
    texts: list[str]
    _batches: Any

    def read(self, features: Sequence[str]) -> Iterator[tuple[bytes | None, ...]]:
        """Read the rows in order: the bytes of each feature, None for null.

        Raises:
            ValueError: The file is damaged.
        """
        with _naming(self.path):
            for batch in self._batches(list(features)):
                for start in range(0, batch.num_rows, ROWS):
                    part = batch.slice(start, ROWS)
                    yield from zip(*[_bytes_of(part.column(name)) for name in features], strict=True)


def open_table(path: Path, kind: str) -> TextTable:
    """Open a file of kind "parquet" or "arrow".

    Raises:
        ValueError: It is damaged, or no such file.
        ImportError: pyarrow is not installed.
    """
    try:
        import pyarrow as pa
        from pyarrow import ipc, parquet
    except ImportError as error:
        raise ImportError(f"{path} cannot be read: it needs pyarrow: pip install 'butler-jax[data]'") from error
    with _naming(path):
        if kind == "parquet":
            file = parquet.ParquetFile(path, pre_buffer=False, buffer_size=1 << 20)
            schema, rows = file.schema_arrow, file.metadata.num_rows

            def batches(columns):
                return file.iter_batches(batch_size=ROWS, columns=columns, use_threads=False)
        else:
            with path.open("rb") as head:
                opening = ipc.open_file if head.read(6) == b"ARROW1" else ipc.open_stream

            def batches(columns=None):
                opened = opening(pa.OSFile(str(path)))
                if opening is ipc.open_stream:
                    return iter(opened)
                return (opened.get_batch(number) for number in range(opened.num_record_batches))

            schema = opening(pa.OSFile(str(path))).schema
            rows = sum(batch.num_rows for batch in batches())
        if twice := [name for name in schema.names if schema.names.count(name) > 1]:
            raise ValueError(f"{path} has several columns of the name {twice[0]}; rename them")
        texts = [field.name for field in schema if _is_text(field.type)]
        return TextTable(path, rows, schema.names, texts, batches)


def _is_text(kind: Any) -> bool:
    import pyarrow.types as types

    kind = kind.value_type if types.is_dictionary(kind) else kind
    return types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)


def _bytes_of(column: Any) -> list[bytes | None]:
    """The values of a column of text, not checked to be UTF-8.

    Arrow files are not checked when they are read, and values that lie outside of the file would end the process.
    """
    import pyarrow as pa

    if pa.types.is_dictionary(column.type):
        column.indices.validate(full=True)
        values = _bytes_of(column.dictionary)
        return [None if index is None else values[index] for index in column.indices.to_pylist()]
    kinds = {pa.string(): pa.binary(), pa.large_string(): pa.large_binary()}
    column = column.view(kinds.get(column.type) or pa.binary_view())
    column.validate(full=True)
    return column.to_pylist()


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Turn what pyarrow raises into a ValueError that names the file."""
    import pyarrow as pa

    try:
        yield
    except (pa.ArrowException, OSError, LookupError, EOFError, UnicodeDecodeError) as error:
        if isinstance(error, OSError) and error.errno is not None:  # of the system
            raise
        said = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"{path} is damaged or of another format ({said}); copy it here again.") from error
