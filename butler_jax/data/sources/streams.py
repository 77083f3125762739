"""The bytes of a file as UTF-8 text: compressed files are unpacked, and UTF-16 with a byte order mark is converted."""

from __future__ import annotations

import bz2
import codecs
import contextlib
import functools
import gzip
import io
import lzma
import re
import zlib
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from butler_jax.storage import open_regular

HEAD = 4_096  # bytes at a file's beginning that are looked at
BLOCK = 1 << 20  # bytes that are read at a time
LONGEST_LINE = 1 << 30  # bytes

_PACKED = 1 << 13  # bytes of a Zstandard file that are unpacked at a time; 8 KiB of zeros become 256 MiB

FOREIGN = (  # first bytes of files that are no text, and what to do with them
    (b"PK\x03\x04", "is a zip archive; unpack it first"),
    (b"%PDF-", "is a PDF document; write its text to a .txt file first"),
    (b"PAR1", "is a compressed parquet file; unpack it first, parquet files are compressed inside"),
    (b"ARROW1", "is a compressed arrow file; unpack it first"),
)
_MARKS = (  # longer ones first: that of UTF-32 begins as that of UTF-16 does
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


@dataclass(frozen=True)
class Block:
    """Whole lines of a text.

    Attributes:
        data: UTF-8 bytes with the lines' ends.
        start: The position of the first byte in the unpacked text.
        number: The number of the first line, from 1.
    """

    data: bytes
    start: int
    number: int

    @property
    def end(self) -> int:
        """The position after the last byte."""
        return self.start + len(self.data)


class _Converted(io.RawIOBase):
    """A binary stream whose bytes come from a generator that reads the stream below."""

    def __init__(self, chunks: Generator[bytes], below: BinaryIO):
        self._chunks, self._below, self._left = chunks, below, memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._left:
            chunk = next(self._chunks, None)
            if chunk is None:
                return 0
            self._left = memoryview(chunk)
        count = min(len(buffer), len(self._left))
        buffer[:count], self._left = self._left[:count], self._left[count:]
        return count

    def close(self) -> None:
        self._chunks.close()
        self._below.close()
        super().close()


def _ahead(chunks: Iterator[bytes]) -> Generator[bytes]:
    """The same chunks. The next one is unpacked in a thread while one is used."""
    with ThreadPoolExecutor(1, "unpack") as pool:
        coming = pool.submit(next, chunks, None)
        while (chunk := coming.result()) is not None:
            coming = pool.submit(next, chunks, None)
            yield chunk


def _read_zstandard(file: BinaryIO) -> Iterator[bytes]:
    try:
        from compression import zstd  # Python 3.14

        new = functools.partial(zstd.ZstdDecompressor, options={zstd.DecompressionParameter.window_log_max: 31})
    except ImportError:
        try:
            import zstandard as zstd
        except ImportError as error:
            raise ImportError("it is compressed by Zstandard: pip install 'butler-jax[data]'") from error
        new = zstd.ZstdDecompressor(max_window_size=1 << 31).decompressobj  # zstd --long=31 writes such windows
    frame, given = None, b""
    try:
        while given := given or file.read(_PACKED):
            frame = frame or new()
            yield frame.decompress(given)
            given, frame = (frame.unused_data, None) if frame.eof else (b"", frame)
    except zstd.ZstdError as error:
        raise zlib.error(str(error)) from None
    if frame is not None:
        raise EOFError("inside a frame")


def _read_gzip(file: BinaryIO) -> Iterator[bytes]:
    with gzip.GzipFile(fileobj=file) as unpacked:
        yield from iter(lambda: unpacked.read(BLOCK), b"")


def _read_xz(file: BinaryIO) -> Iterator[bytes]:
    with lzma.LZMAFile(file) as unpacked:
        yield from iter(lambda: unpacked.read(BLOCK), b"")


def _read_bzip2(file: BinaryIO) -> Iterator[bytes]:
    with bz2.BZ2File(file) as unpacked:
        yield from iter(lambda: unpacked.read(BLOCK), b"")


@dataclass(frozen=True)
class Compression:
    """A format of compressed files: the program's name, suffixes, a pattern of the first bytes, and its reader."""

    name: str
    suffixes: tuple[str, ...]
    first: bytes
    read: Callable[[BinaryIO], Iterator[bytes]]


COMPRESSIONS = (
    Compression("gzip", (".gz",), rb"\x1f\x8b", _read_gzip),
    Compression("Zstandard", (".zst", ".zstd"), rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18", _read_zstandard),
    Compression("xz", (".xz",), rb"\xfd7zXZ\0", _read_xz),
    Compression("bzip2", (".bz2",), rb"BZh[1-9](1AY&SY|\x17rE8P\x90)", _read_bzip2),
)


def inner_name(path: Path) -> str:
    """The file's name in small letters, without the suffix of a compression."""
    name = path.name.lower()
    return name.removesuffix(next((s for packed in COMPRESSIONS for s in packed.suffixes if name.endswith(s)), ""))


def open_text(path: Path) -> io.BufferedReader:
    """Open a file as UTF-8 bytes. The compression is found by the first bytes, and has to agree with the suffix.

    Half a character of UTF-16 becomes bytes that are no UTF-8, so that its line alone is refused.

    Raises:
        ValueError: It is no regular file or no text, or is not compressed as its name says.
        ImportError: A package for its compression is missing.
        OSError: It cannot be read.
    """
    file = open_regular(path)
    head = file.peek(HEAD)[:HEAD]
    packed = next((each for each in COMPRESSIONS if re.match(each.first, head)), None)
    named = next((each for each in COMPRESSIONS if path.name.lower().endswith(each.suffixes)), None)
    if named and packed is not named and head:
        raise ValueError(
            f"{path} is named {path.suffix}, and its bytes are not those of {named.name}: it was damaged, or it is "
            f"{'compressed by ' + packed.name if packed else 'not compressed'} and needs another name."
        )
    if packed:
        file = io.BufferedReader(_Converted(_ahead(packed.read(file)), file), BLOCK)
        with _naming(path):
            head = file.peek(HEAD)[:HEAD]
    for mark, encoding in _MARKS:
        if head.startswith(mark):
            return io.BufferedReader(_Converted(_converted(file, encoding), file), BLOCK)
    _check_text(path, head)
    return file


def read_blocks(path: Path) -> Iterator[Block]:
    """Read a text in whole lines of together about a MiB.

    Raises:
        ValueError: As `open_text`, or a compressed file is damaged or was cut short, or a line is too long.
        ImportError, OSError: As `open_text`.
    """
    with open_text(path) as file, _naming(path):
        start, number = 0, 1
        while data := file.read(BLOCK):
            if not data.endswith(b"\n"):
                data += file.readline(LONGEST_LINE)
                if len(data) >= LONGEST_LINE:
                    raise ValueError(f"{path}, after line {number}: more than {LONGEST_LINE} bytes; cut it into lines")
            block = Block(data, start, number)
            yield block
            start, number = block.end, number + data.count(b"\n")


@functools.lru_cache(maxsize=1 << 16)
def _count(path: Path, size: int, changed: int) -> int:
    return sum(len(block.data) for block in read_blocks(path))


def text_size(path: Path) -> int:
    """The bytes of a text after unpacking and conversion. Other files than plain ones are read for it."""
    found = path.stat()
    with open_text(path) as file:
        plain = isinstance(file.raw, io.FileIO)
    return found.st_size if plain else _count(path, found.st_size, found.st_mtime_ns)


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Turn what the unpackers raise into a ValueError that names the file."""
    try:
        yield
    except EOFError as error:
        raise ValueError(f"{path} ends too early ({error}): it was cut short; copy it here again.") from error
    except (zlib.error, lzma.LZMAError, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:  # of the system
            raise
        raise ValueError(f"{path} is damaged ({error}); copy it here again.") from error
    except ImportError as error:
        raise ImportError(f"{path} cannot be read: {error}") from error


def _converted(file: BinaryIO, encoding: str) -> Generator[bytes]:
    decoder, ending = codecs.getincrementaldecoder(encoding)("surrogatepass"), False
    try:
        while chunk := file.read(BLOCK):
            yield decoder.decode(chunk).encode("utf-8", "surrogatepass")
        ending = True
        yield decoder.decode(b"", final=True).encode("utf-8", "surrogatepass")
    except UnicodeDecodeError as error:
        raise EOFError("inside a character") if ending else zlib.error(str(error)) from None


def _check_text(path: Path, head: bytes) -> None:
    """Raise ValueError for a file whose first bytes are of no UTF-8 text; says what to do with it."""
    for begin, said in FOREIGN:
        if head.startswith(begin):
            raise ValueError(f"{path} {said}.")
    if head[257:262] == b"ustar":
        raise ValueError(f"{path} is a tar archive; unpack it first, for example with tar -xf.")
    if head.count(0) * 10 > len(head):
        raise ValueError(
            f"{path} is binary, or UTF-16 text without a mark; convert such text first, for example with iconv -f "
            "utf-16le -t utf-8."
        )
