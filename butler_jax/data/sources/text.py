"""The user's text files as a TFDS set."""

from __future__ import annotations

import bisect
import dataclasses
import functools
import hashlib
import itertools
import os
from collections.abc import Callable, Iterator, Sequence

import tensorflow_datasets as tfds

from butler_jax.data.sources.passages import (
    PASSAGE_CHARACTERS,
    Passage,
    PassageBuilder,
    cut,
    open_prepared,
    say_once,
)
from butler_jax.data.sources.passed_over import PassedOver
from butler_jax.data.sources.pieces import TEST_LEAST, TEST_SHARE, read_pieces
from butler_jax.data.sources.text_files import TextFile, find_files

_READ = 1 << 20  # bytes read at a time for the digest
_ENOUGH = PASSAGE_CHARACTERS * 3 // 4
_LAYOUT = f"passages-{PASSAGE_CHARACTERS}-{TEST_SHARE}-{TEST_LEAST}"


@dataclasses.dataclass(eq=False)
class TextConfig(tfds.core.BuilderConfig):
    """One set of files; `name` is a digest of their content."""

    files: tuple[TextFile, ...] = ()
    strict: bool = False


class TextFiles(PassageBuilder):
    """Passages of about 16,000 characters from text files; the last 2 % of each file are the split test."""

    def read_passages(self, note: Callable[[int, int], None]) -> Iterator[Passage]:
        """As `PassageBuilder` says. What is said of lines that are passed over is kept in the set's metadata."""
        files, passed = self.builder_config.files, PassedOver(self.builder_config.strict)
        sizes = [file.path.stat().st_size for file in files]
        before, found = [0, *itertools.accumulate(sizes)], set()
        for file, done, size in zip(files, before, sizes, strict=False):

            def note_share(share: float, done: int = done, size: int = size) -> None:
                note(done + int(share * size), before[-1])

            for split, text in read_passages(file, passed, note_share):
                found.add(split)
                yield split, file.name, text
        if not found:
            names = ", ".join(str(file.path) for file in files[:3])
            if passed.count:
                raise ValueError(f"{names}: no text could be read. {passed.summary()}")
            raise ValueError(f"{names} is empty: it holds no text to read.")
        if passed.count:
            self.info.metadata["passed_over"] = passed.summary()


def open_builder(
    paths: Sequence[str | os.PathLike[str]], data_dir: str | None = None, *, strict: bool = False
) -> TextFiles:
    """Open the set of these files. It is prepared on first use and found again by the content of the files.

    Args:
        paths: As `find_files` takes them. Text is UTF-8, or UTF-16 with a byte order mark, and "<|endoftext|>" ends a
            document. Every JSON object of a .jsonl file and every row of a table is a document.
        data_dir: Where prepared sets are kept; None is TFDS_DATA_DIR or TFDS's default.
        strict: Refuse a line or record that cannot be read. Otherwise they are passed over, and a line on stderr says
            how many there are.

    Raises:
        FileNotFoundError: A path does not exist.
        ValueError: A file holds no text or is damaged, or the feature to read is not clear; the file is named.
        ImportError: A package for the format of a file is missing.
    """
    files = find_files(paths, say_once)
    config = TextConfig(name=_content_hash(files), files=tuple(files), strict=strict)
    builder = open_prepared(TextFiles, config, data_dir)
    if passed := (builder.info.metadata or {}).get("passed_over"):
        if strict:
            raise ValueError(f"the text has {passed} Mend the files, or leave out --strict-data to pass them over.")
        say_once(f"passed over {passed} --strict-data makes that an error.")
    return builder


def read_passages(
    file: TextFile, passed: PassedOver, note: Callable[[float], None] = lambda share: None
) -> Iterator[tuple[str, str]]:
    """Read the passages (split, text) of one file in order, as `read_pieces` does with pieces.

    A passage ends at the first empty line beyond three quarters of its longest size, else before the piece that does
    not fit.
    """
    kept: list[str] = []
    length, kept_split = 0, "train"
    for split, texts, ends_document in read_pieces(file, passed, note):
        ends, at = [0, *itertools.accumulate(map(len, texts))], 0
        while at < len(texts):
            begin = ends[at] - length  # of the passage, among `ends`
            fits = bisect.bisect_right(ends, begin + PASSAGE_CHARACTERS, at) - 1
            enough = length > _ENOUGH and kept[-1].isspace()
            if kept and (fits <= at or enough or split != kept_split):
                yield from ((kept_split, passage) for passage in cut("".join(kept)))
                kept, length = [], 0
                continue
            kept_split, stop = split, max(fits, at + 1)
            beyond = range(bisect.bisect_right(ends, begin + _ENOUGH, at + 1), stop + 1)
            stop = next((end for end in beyond if texts[end - 1].isspace()), stop)
            kept += texts[at:stop]
            length, at = ends[stop] - begin, stop
        if ends_document:
            yield from ((kept_split, passage) for passage in cut("".join(kept)))
            kept, length = [], 0
    yield from ((kept_split, passage) for passage in cut("".join(kept)))


def _content_hash(files: Sequence[TextFile]) -> str:
    """A digest of the files' names and bytes, and of what is read of them."""
    found = [file.path.stat() for file in files]
    return _hash_files(tuple(files), tuple((each.st_size, each.st_mtime_ns) for each in found))


@functools.lru_cache(maxsize=16)  # a run opens its set several times
def _hash_files(files: tuple[TextFile, ...], found: tuple[tuple[int, int], ...]) -> str:
    digest = hashlib.sha256(_LAYOUT.encode())
    for file, (size, _) in zip(files, found, strict=True):
        digest.update(f"{file.name}:{size}\n".encode())
        if file.features or file.split:
            digest.update(f"{file.features} {file.split}\n".encode())
        with file.path.open("rb") as opened:
            while chunk := opened.read(_READ):
                digest.update(chunk)
    return digest.hexdigest()[:20]
