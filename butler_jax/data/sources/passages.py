"""The common part of the prepared sets: passages of text in array_record, written once by TFDS without TensorFlow."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordWriter
from etils import epath
from google.protobuf import json_format
from rich.console import Console
from tensorflow_datasets.proto import tf_example_pb2

from butler_jax.data.sources.features import join_features

PASSAGE_CHARACTERS = 16_000
"""The longest passage. A longer text is cut, at the end of a paragraph where possible."""

SHARD = 1 << 29
"""Bytes of the records of one file."""

INTERVAL = 10.0
"""Seconds between lines that say how far a preparation is, where there is no terminal."""

Passage = tuple[str, str, str]
"""Split, name of the source, text."""

PROBES = 64
"""The number of documents in a set's digest."""


class PassageBuilder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """Base class of the package's TFDS builders. Records are {"text", "source"} in reading order.

    A subclass has `read_passages`. TFDS' own writer keeps a set in memory until all of it is read; here records are
    written as they come.
    """

    VERSION = tfds.core.Version("1.0.0")
    # Without it, TFDS looks for the class's file through importlib_resources, which it does not install.
    code_path = epath.Path(__file__)

    def read_passages(self, note: Callable[[int, int], None]) -> Iterator[Passage]:
        """Read the passages of all splits; those of a split are in order. note: receives bytes done, and of all."""
        raise NotImplementedError

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description=self.__doc__,
            features=tfds.features.FeaturesDict({"text": tfds.features.Text(), "source": tfds.features.Text()}),
            disable_shuffling=True,
            metadata=tfds.core.MetadataDict(),
        )

    def _split_generators(self, dl_manager):
        raise NotImplementedError

    def _generate_examples(self):
        raise NotImplementedError

    def _download_and_prepare(self, dl_manager, download_config):
        shards = {split: Shards(self._get_filename_template(split)) for split in ("train", "test")}
        with contextlib.ExitStack() as stack, _preparing(self) as note:
            for each in shards.values():
                stack.callback(each.close)
            for split, source, text in self.read_passages(note):
                shards[split].write(text, source)
        splits = [each.finish(split) for split, each in shards.items() if each.lengths]
        self.info.set_splits(tfds.core.SplitDict(splits))


class Shards:
    """The array_record files of one split; each has about SHARD bytes of text."""

    def __init__(self, template: Any):
        self.lengths: list[int] = []
        self._template, self._writer, self._bytes, self._room = template, None, 0, 0

    def write(self, text: str, source: str) -> None:
        """Add a record."""
        example = tf_example_pb2.Example()
        features = example.features.feature
        features["text"].bytes_list.value.append(text.encode())
        features["source"].bytes_list.value.append(source.encode())
        record = example.SerializeToString()
        if self._room <= 0:
            self.close()
            self._writer = ArrayRecordWriter(os.fspath(self._path(len(self.lengths))), "group_size:1,zstd:1")
            self._room = SHARD
            self.lengths.append(0)
        with self._naming():
            self._writer.write(record)
        self.lengths[-1] += 1
        self._bytes += len(record)
        self._room -= len(record)

    def close(self) -> None:
        """Finish the file that is written."""
        writer, self._writer = self._writer, None
        if writer is not None:
            with self._naming():
                writer.close()

    def finish(self, split: str) -> tfds.core.SplitInfo:
        """Name the files after their number, and describe them."""
        for number in range(len(self.lengths)):
            named = self._template.sharded_filepath(shard_index=number, num_shards=len(self.lengths))
            self._path(number).rename(named)
        return tfds.core.SplitInfo(
            name=split, shard_lengths=self.lengths, num_bytes=self._bytes, filename_template=self._template
        )

    @contextlib.contextmanager
    def _naming(self) -> Iterator[None]:
        """Turn the RuntimeError of array_record into an OSError that says what to do."""
        try:
            yield
        except RuntimeError as error:
            self._writer = None  # it takes nothing more
            why = str(error).split(";")[0]
            place = self._template.data_dir
            raise OSError(
                f"{place} cannot be written ({why}); free some space there, or choose another --data-dir"
            ) from error

    def _path(self, number: int) -> epath.Path:
        return self._template.data_dir / f"{self._template.split}-{number}.unfinished"


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
            tfds.disable_progress_bar()
            try:
                with contextlib.redirect_stdout(io.StringIO()):
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
def _preparing(builder: PassageBuilder) -> Iterator[Callable[[int, int], None]]:
    """Show on stderr that a set is being written, and how far it is. Yields what receives bytes done, and of all."""
    console = _console()
    name = f"{builder.info.full_name} in {epath.Path(builder.data_dir).parent / str(builder.version)}"
    began = told = time.monotonic()

    def how_far(done: int, size: int) -> str:
        rate = done / max(time.monotonic() - began, 1e-9)
        left = f", {(size - done) / rate:.0f} s left" if rate else ""
        return f"{done / 1e6:,.0f} of {size / 1e6:,.0f} MB, {rate / 1e6:,.1f} MB/s{left}"

    if console.is_terminal:
        with console.status(f"preparing {name}") as status:
            yield lambda done, size: status.update(f"preparing: {how_far(done, size)}; {name}")
        return

    def note(done: int, size: int) -> None:
        nonlocal told
        if time.monotonic() - told >= INTERVAL:
            told = time.monotonic()
            say(f"preparing: {how_far(done, size)}")

    say(f"preparing {name}")
    yield note
    if told != began:
        say(f"prepared in {time.monotonic() - began:,.0f} s")


def say(line: str) -> None:
    """Write a line to stderr."""
    _console().print(line, markup=False)


@functools.cache
def say_once(line: str) -> None:
    """Write a line to stderr, the first time that this process says it."""
    say(line)


def _console() -> Console:
    return Console(stderr=True, highlight=False, soft_wrap=True)


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
    """Random access to text features of a split of a prepared set; empty lines stand between those of a document.

    Reading a damaged file raises ValueError, which names the file.
    """

    def __init__(self, builder: tfds.core.DatasetBuilder, split: str, features: Sequence[str] = ("text",)):
        self._features, self._builder = features, builder
        try:
            self._source = builder.as_data_source(split)
        except KeyError as error:
            raise _damaged(builder.data_dir, f"dataset_info.json has no split {split}") from error

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> str:
        try:
            record = self._source[int(index)]
            values = {name: record[name] for name in self._features}
        except RuntimeError as error:  # array_record names no file
            raise _damaged(self._builder.data_dir, _broken(self._builder) or error) from error
        for name, value in values.items():
            if not isinstance(value, (bytes, str)):  # array_record returns something else for a missing record
                raise _damaged(self._builder.data_dir, _broken(self._builder) or f"document {index} is missing")
            values[name] = value.decode("utf-8", errors="replace") if isinstance(value, bytes) else value
        return join_features(values, self._features)

    def content(self) -> str:
        """A digest of the set's full name, its number of documents, and 64 evenly spaced documents."""
        found = hashlib.sha256(f"{self._builder.info.full_name} {len(self)}".encode())
        for number in range(min(PROBES, len(self))):
            found.update(self[number * len(self) // min(PROBES, len(self))].encode())
        return found.hexdigest()[:16]

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._source!r}, features={self._features!r})"


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
