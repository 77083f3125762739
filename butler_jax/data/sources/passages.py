"""The common part of the prepared sets: passages of text in array_record, written once by TFDS without TensorFlow."""

from __future__ import annotations

import contextlib
import hashlib
import io
import logging
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds
from etils import epath
from google.protobuf import json_format
from rich.console import Console

PASSAGE_CHARACTERS = 16_000
"""The longest passage. A longer text is cut, at the end of a paragraph where possible."""

PROBES = 64
"""The number of documents in a set's digest."""


class PassageBuilder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """Base class of the package's TFDS builders. Records are {"text", "source"} in reading order.

    A subclass defines the splits. `numbered` turns its pairs of a source's name and a passage into examples.
    """

    VERSION = tfds.core.Version("1.0.0")
    # Without it, TFDS looks for the class's file through importlib_resources, which it does not install.
    code_path = epath.Path(__file__)

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description=self.__doc__,
            features=tfds.features.FeaturesDict({"text": tfds.features.Text(), "source": tfds.features.Text()}),
            disable_shuffling=True,
        )


def numbered(passages: Iterable[tuple[str, str]]) -> Iterator[tuple[int, dict[str, str]]]:
    """Turn pairs (source, text) into TFDS examples with the keys 0, 1, ..."""
    for key, (source, text) in enumerate(passages):
        yield key, {"text": text, "source": source}


def open_prepared(
    builder_class: type[PassageBuilder], config: tfds.core.BuilderConfig, data_dir: str | None
) -> PassageBuilder:
    """Open a set, and write its array_record files if they are not there yet.

    Raises:
        ValueError: The prepared files are damaged.
        OSError: They cannot be written.
    """
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(max(level, logging.ERROR))  # TFDS warns of every configuration that is made at run time
    try:
        builder = builder_class(config=config, data_dir=data_dir, file_format="array_record")
        if not builder.is_prepared():
            try:
                with _preparing(builder):
                    builder.download_and_prepare()
            except OSError:
                builder = builder_class(config=config, data_dir=data_dir, file_format="array_record")
                if not builder.is_prepared():  # otherwise another process has written it meanwhile
                    raise
    except (json_format.Error, AssertionError) as error:
        place = Path(data_dir or tfds.core.constants.DATA_DIR, builder_class.name, config.name, "1.0.0")
        raise _damaged(place, f"dataset_info.json: {first_line(error)}") from error
    finally:
        logger.setLevel(level)
    return builder


@contextlib.contextmanager
def _preparing(builder: PassageBuilder) -> Iterator[None]:
    """Show on stderr that a set is being written, in place of TFDS' own lines and bars."""
    tfds.disable_progress_bar()
    said = f"preparing {builder.info.full_name} in {builder.data_dir}"
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    with contextlib.redirect_stdout(io.StringIO()):
        if console.is_terminal:
            with console.status(said):
                yield
        else:
            console.print(said, markup=False)
            yield


def cut(text: str, limit: int = PASSAGE_CHARACTERS) -> Iterator[str]:
    """Cut a text into passages of at most `limit` characters, at the ends of paragraphs, lines or words.

    The passages in order make up the text. Passages of white space alone are left out.
    """
    start = 0
    while len(text) - start > limit:
        window = text[start : start + limit]
        end = 0
        for border in ("\n\n", "\n", " "):
            end = window.rfind(border, limit // 2) + len(border)
            if end >= len(border):
                break
        else:
            end = limit
        if window[:end].strip():
            yield window[:end]
        start += end
    if text[start:].strip():
        yield text[start:]


class TextField:
    """Random access to one text feature of a split of a prepared set.

    Reading a damaged file raises ValueError, which names the file.
    """

    def __init__(self, builder: tfds.core.DatasetBuilder, split: str, key: str = "text"):
        self._key, self._builder = key, builder
        try:
            self._source = builder.as_data_source(split)
        except KeyError as error:
            raise _damaged(builder.data_dir, f"dataset_info.json has no split {split}") from error

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> str:
        try:
            value = self._source[int(index)][self._key]
        except RuntimeError as error:  # array_record names no file
            raise _damaged(self._builder.data_dir, _broken(self._builder) or error) from error
        if not isinstance(value, (bytes, str)):  # array_record returns something else for a missing record
            raise _damaged(self._builder.data_dir, _broken(self._builder) or f"document {index} is missing")
        return value.decode("utf-8", errors="replace") if isinstance(value, bytes) else value

    def content(self) -> str:
        """A digest of the set's full name, its number of documents, and 64 evenly spaced documents."""
        found = hashlib.sha256(f"{self._builder.info.full_name} {len(self)}".encode())
        for number in range(min(PROBES, len(self))):
            found.update(self[number * len(self) // min(PROBES, len(self))].encode())
        return found.hexdigest()[:16]

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._source!r}, key={self._key!r})"


def _damaged(place: Any, why: Any) -> ValueError:
    return ValueError(
        f"the prepared data in {place} are damaged ({why}); remove that directory and prepare the set again: text: and "
        "python_docs do so by themselves"
    )


def _broken(builder: tfds.core.DatasetBuilder) -> str:
    """The first array_record file that cannot be read or lacks records, and why; "" where none is found."""
    from array_record.python.array_record_data_source import ArrayRecordDataSource

    for split in builder.info.splits.values():
        for path, records in zip(map(Path, split.filepaths), split.shard_lengths, strict=False):
            try:
                source = ArrayRecordDataSource([str(path)])
                if len(source) != records:
                    return f"{path.name}: it has {len(source)} of {records} records"
                source[0]
            except RuntimeError as error:
                return f"{path.name}: {str(error).strip() or 'it was cut short'}"
    return ""


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its type where it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
