"""The user's text files as a TFDS set."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import os
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

import tensorflow_datasets as tfds

from butler_jax.data.sources.passages import PASSAGE_CHARACTERS, PassageBuilder, cut, numbered, open_prepared
from butler_jax.storage import parse_object, read_lines

SUFFIXES = (".txt", ".md", ".jsonl")
END_OF_TEXT = "<|endoftext|>"
TEST_SHARE = 0.02
"""The share of each file, at its end, that belongs to the split "test"."""

TEST_LEAST = 4_000
"""The least size of that share in bytes, as long as it is below a tenth of the file."""

FOREIGN = (  # first bytes of files that are no text, and what to do with them
    (b"\x1f\x8b", "is compressed by gzip; unpack it first, for example with gzip -dk"),
    (b"\x28\xb5\x2f\xfd", "is compressed by Zstandard; unpack it first, for example with zstd -d"),
    (b"\xfd7zXZ\0", "is compressed by xz; unpack it first, for example with xz -dk"),
    (b"BZh", "is compressed by bzip2; unpack it first, for example with bzip2 -dk"),
    (b"PK\x03\x04", "is a zip archive; unpack it first"),
    (b"PAR1", 'is a parquet file; write its texts as .jsonl first, an object with a string "text" a line'),
    (b"\xff\xfe", "is UTF-16 text; convert it first, for example with iconv -f utf-16 -t utf-8"),
    (b"\xfe\xff", "is UTF-16 text; convert it first, for example with iconv -f utf-16 -t utf-8"),
)
HEAD = 4_096  # bytes at a file's beginning that are looked at

_PIECE = 1_000  # characters of a line that are placed in a split at a time
_READ = 1 << 20  # bytes read at a time for the digest
_LONGEST = 1 << 30  # bytes of a line
_LAYOUT = f"passages-{PASSAGE_CHARACTERS}-{TEST_SHARE}-{TEST_LEAST}"


@dataclasses.dataclass(eq=False)
class TextConfig(tfds.core.BuilderConfig):
    """One set of files; `name` is a digest of their content."""

    paths: tuple[str, ...] = ()


class TextFiles(PassageBuilder):
    """Passages of about 16,000 characters from text files; the last 2 % of each file are the split test."""

    def _split_generators(self, download_manager):
        found = {split: self._generate_examples(split) for split in ("train", "test")}
        # TFDS refuses a split without examples, and a file of a single line has no test passage.
        first = {split: next(examples, None) for split, examples in found.items()}
        return {split: itertools.chain([first[split]], found[split]) for split in found if first[split]}

    def _generate_examples(self, split: str):
        paths = (Path(path) for path in self.builder_config.paths)
        return numbered((path.name, text) for path in paths for part, text in read_passages(path) if part == split)


def open_builder(paths: Sequence[str | os.PathLike[str]], data_dir: str | None = None) -> TextFiles:
    """Open the set of these files. It is prepared on first use and found again by the content of the files.

    Args:
        paths: Files and directories. A file is read whatever its suffix. In a directory, the files *.txt, *.md and
            *.jsonl are read (.jsonl: each line is a JSON object with a string "text"). Text is UTF-8, and
            "<|endoftext|>" ends a document. A warning names the files of a directory that are left out.
        data_dir: Where prepared sets are kept; None is TFDS_DATA_DIR or TFDS's default.

    Raises:
        FileNotFoundError: A path does not exist.
        ValueError: A file is empty, compressed, no regular file or not UTF-8, or a line is no such JSON object;
            the file and the byte or line are named.
    """
    files = find_files(paths)
    return open_prepared(TextFiles, TextConfig(name=_content_hash(files), paths=tuple(map(str, files))), data_dir)


def find_files(paths: Sequence[str | os.PathLike[str]]) -> list[Path]:
    """The files of `paths` in order; those of a directory in alphabetical order."""
    if not paths:
        raise ValueError("no text files given: write text:PATH or text:PATH,PATH.")
    files: list[Path] = []
    for given in paths:
        path = Path(os.path.expanduser(given))
        if path.is_dir():
            held = sorted(p for p in path.rglob("*") if p.is_file())
            found = [p for p in held if p.suffix.lower() in SUFFIXES]
            others = [p.relative_to(path) for p in held if p.suffix.lower() not in SUFFIXES]
            others = [p for p in others if not any(part.startswith(".") for part in p.parts)]
            names = ", ".join(map(str, others[:5])) + (", ..." if len(others) > 5 else "")
            if not found:
                has = f" (it holds {names})" if others else ""
                raise ValueError(f"no text in directory {path}: it holds no {', '.join(SUFFIXES)} file{has}.")
            if others:
                warnings.warn(
                    f"text:{path} leaves out {len(others)} files that are no {', '.join(SUFFIXES)}: {names}. Name a "
                    "file to read it whatever its suffix.",
                    stacklevel=2,
                )
            files.extend(found)
        elif path.is_file():
            files.append(path)
        elif path.exists() or str(path) == "-":
            raise ValueError(
                f"text:{path} is no regular file. A text is read several times, and again when a run continues: write "
                "it to a file first, for example with cat > text.txt."
            )
        else:
            raise FileNotFoundError(f"no such text file or directory: {path}")
    return [path.resolve() for path in dict.fromkeys(files)]


def read_passages(path: Path) -> Iterator[tuple[str, str]]:
    """Read the passages (split, text) of one file in order. Memory holds one passage or line at a time."""
    size = path.stat().st_size
    border = size - max(TEST_SHARE * size, min(0.1 * size, TEST_LEAST))
    kept: list[str] = []
    length, kept_split = 0, "train"
    first = True
    for end, text, ends_document in _pieces(path):
        split = "train" if first or end <= border else "test"
        first = False
        paragraph = length > PASSAGE_CHARACTERS * 3 // 4 and kept[-1].isspace()
        if split != kept_split or paragraph or length + len(text) > PASSAGE_CHARACTERS:
            yield from ((kept_split, passage) for passage in cut("".join(kept)))
            kept, length, kept_split = [], 0, split
        kept.append(text)
        length += len(text)
        if ends_document:
            yield from ((kept_split, passage) for passage in cut("".join(kept)))
            kept, length = [], 0
    yield from ((kept_split, passage) for passage in cut("".join(kept)))


def _pieces(path: Path) -> Iterator[tuple[int, str, bool]]:
    """The lines, or the records of a .jsonl file, as (byte where it ends, text, whether a document ends there)."""
    end = 0
    for number, raw in read_lines(path, longest=_LONGEST):
        start, end = end, end + len(raw)
        try:
            line = raw.decode("utf-8-sig" if number == 1 else "utf-8").replace("\r\n", "\n")
        except UnicodeDecodeError as error:
            remedy = "Convert it first, for example with iconv -f latin1 -t utf-8."
            if end == path.stat().st_size and error.end == len(raw) and error.reason == "unexpected end of data":
                remedy = "The file ends inside a character: it was cut short; copy it here again."
            raise ValueError(
                f"{path} is not UTF-8: byte 0x{raw[error.start]:02x} at offset {start + error.start} "
                f"(line {number}). {remedy}"
            ) from error
        if path.suffix.lower() == ".jsonl":
            if line.strip():
                yield end, _record(path, number, line), True
            continue
        *documents, rest = line.split(END_OF_TEXT)
        for document in documents:
            yield start + 1, document, True
        for at in range(0, len(rest), _PIECE):
            piece = rest[at : at + _PIECE]
            yield start + (end - start) * (at + len(piece)) // max(len(rest), 1), piece, False


def _record(path: Path, number: int, line: str) -> str:
    where = f"{path}, line {number}"
    record = parse_object(line, where)
    if not isinstance(record.get("text"), str):
        found = ", ".join(sorted(record)[:8])[:200]
        raise ValueError(f'{where}: expected an object with a string "text", found: {found}.')
    return record["text"]


def _check_text(path: Path, head: bytes) -> None:
    """Raise ValueError for a file whose first bytes are of no UTF-8 text; says what to do with it."""
    for begin, said in FOREIGN:
        if head.startswith(begin):
            raise ValueError(f"{path} {said}.")
    if head.count(0) * 10 > len(head):
        raise ValueError(f"{path} is binary, or UTF-16 text without a mark; give UTF-8 text.")


def _content_hash(files: Sequence[Path]) -> str:
    """A digest of the files' names and bytes. Raises ValueError for a file of white space alone."""
    digest = hashlib.sha256(_LAYOUT.encode())
    for path in files:
        digest.update(f"{path.name}:{path.stat().st_size}\n".encode())
        blank = True
        with path.open("rb") as file:
            _check_text(path, file.read(HEAD))
            file.seek(0)
            while chunk := file.read(_READ):
                blank = blank and not chunk.strip()
                digest.update(chunk)
        if blank:
            raise ValueError(f"{path} is empty: it holds no text to read.")
    return digest.hexdigest()[:20]
