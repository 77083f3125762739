"""The pieces of text of a file in order: lines of a text, records of a .jsonl file, or rows of a table."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator

from butler_jax.data.sources.features import SEPARATOR, choose_features, join_features
from butler_jax.data.sources.passed_over import PassedOver
from butler_jax.data.sources.streams import Block, read_blocks, text_size
from butler_jax.data.sources.tables import open_table
from butler_jax.data.sources.text_files import TextFile
from butler_jax.storage import parse_object

END_OF_TEXT = "<|endoftext|>"
TEST_SHARE = 0.02
"""The share of each file, at its end, that belongs to the split "test"."""

TEST_LEAST = 4_000
"""The least size of that share in bytes, as long as it is below a tenth of the file."""

TEST_LEAST_ROWS = 8
"""The same for the rows of a table."""

LONGEST_PIECE = 1_000
"""Characters of a line that are placed in a split at a time."""

Pieces = tuple[str, list[str], bool]
"""The split, texts in order, and whether a document ends after the last one."""


def read_pieces(
    file: TextFile, passed: PassedOver, note: Callable[[float], None] = lambda share: None
) -> Iterator[Pieces]:
    """Read the pieces of a file in order. The first one is always of the split "train" where the end is held out.

    Args:
        file: What to read.
        passed: Counts the lines and records that cannot be read.
        note: Receives the share of the file that is read, now and then.

    Raises:
        ValueError: The file is damaged, or the feature to read is not clear.
        ImportError: A package for its format is missing.
        OSError: It cannot be read.
    """
    read = {"text": _read_lines, "records": _read_records}.get(file.kind, _read_rows)
    return read(file, passed, note)


def _border(size: int, least: int) -> float:
    return size - max(TEST_SHARE * size, min(0.1 * size, least))


def _read_lines(file: TextFile, passed: PassedOver, note: Callable[[float], None]) -> Iterator[Pieces]:
    size = text_size(file.path)
    border, first = _border(size, TEST_LEAST), True
    for block in read_blocks(file.path):
        note(block.end / size)
        split = file.split or ("train" if block.end <= border else "test" if block.start >= border else None)
        text = _decoded(block) if split else None
        if text is not None:
            first, lines = False, io.StringIO(text, newline="\n").readlines()
            if END_OF_TEXT in text:
                yield from ((split, [piece], ends) for line in lines for piece, ends, _, _ in _cut_line(line))
            elif max(map(len, lines)) > LONGEST_PIECE:
                yield split, [piece for line in lines for piece, _, _, _ in _cut_line(line)], False
            else:
                yield split, lines, False
            continue
        for number, start, raw in _lines(block):
            try:
                line = raw.decode("utf-8-sig" if number == 1 else "utf-8").replace("\r\n", "\n")
            except UnicodeDecodeError as error:
                remedy = "If the file is in another encoding, convert it, for example with iconv -f latin1 -t utf-8."
                if start + len(raw) == size and error.end == len(raw) and error.reason == "unexpected end of data":
                    remedy = "The file ends inside a character: it was cut short; copy it here again."
                said = f"byte 0x{raw[error.start]:02x} at offset {start + error.start} is not UTF-8"
                passed.add(f"{file.path}, line {number}: {said}", remedy)
                continue
            for piece, ends, done, of in _cut_line(line):
                end = start + len(raw) * done // of
                yield file.split or ("train" if first or end <= border else "test"), [piece], ends
                first = False


def _cut_line(line: str) -> Iterator[tuple[str, bool, int, int]]:
    """The documents that end in a line, and the rest in pieces: (text, whether it ends, characters so far, of all)."""
    *documents, rest = line.split(END_OF_TEXT)
    done = 0
    for document in documents:
        done += len(document) + len(END_OF_TEXT)
        yield document, True, done, len(line)
    for at in range(0, len(rest), LONGEST_PIECE):
        piece = rest[at : at + LONGEST_PIECE]
        yield piece, False, done + at + len(piece), len(line)


def _decoded(block: Block) -> str | None:
    """The block as text; None where a line of it is no UTF-8."""
    try:
        return block.data.decode("utf-8-sig" if block.number == 1 else "utf-8").replace("\r\n", "\n")
    except UnicodeDecodeError:
        return None


def _lines(block: Block) -> Iterator[tuple[int, int, bytes]]:
    """The lines of a block: (number, position of the first byte, bytes with the line's end)."""
    start = block.start
    for number, raw in enumerate(io.BytesIO(block.data), block.number):
        yield number, start, raw
        start += len(raw)


def _read_records(file: TextFile, passed: PassedOver, note: Callable[[float], None]) -> Iterator[Pieces]:
    size = text_size(file.path)
    border, first, features = _border(size, TEST_LEAST), True, file.features
    for block in read_blocks(file.path):
        note(block.end / size)
        for number, start, raw in _lines(block):
            if not raw.strip():
                continue
            where = f"{file.path}, line {number}"
            try:
                record = parse_object(raw.removeprefix(b"\xef\xbb\xbf").strip(), where)
            except ValueError as error:
                passed.add(str(error))
                continue
            if not features:
                texts = [name for name, value in record.items() if isinstance(value, str) or name == "text"]
                features = choose_features((), texts or ["text"], list(record), f"text:{file.path}")
            try:
                text = join_features(record, features)
            except ValueError as error:
                passed.add(f"{where}: {error}")
                continue
            yield file.split or ("train" if first or start + len(raw) <= border else "test"), [text], True
            first = False


def _read_rows(file: TextFile, passed: PassedOver, note: Callable[[float], None]) -> Iterator[Pieces]:
    table = open_table(file.path, file.kind)
    features = choose_features(file.features, table.texts, table.names, f"text:{file.path}")
    border, first = _border(table.rows, TEST_LEAST_ROWS), True
    for number, values in enumerate(table.read(features), 1):
        if number % 1_000 == 0:
            note(number / table.rows)
        try:
            if None in values:
                raise ValueError(f"{features[values.index(None)]} is null")
            text = SEPARATOR.join(value.decode() for value in values)
        except ValueError as error:
            passed.add(f"{file.path}, row {number}: {error}")
            continue
        yield file.split or ("train" if first or number <= border else "test"), [text], True
        first = False
