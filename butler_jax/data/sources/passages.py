"""What the prepared sets share: passages of text in array_record, written once by TFDS without TensorFlow."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds
from etils import epath
from google.protobuf import json_format

PASSAGE_CHARACTERS = 16_000
"""A passage is cut at the last paragraph border before it grows beyond this."""


PROBES = 64
"""Documents of a set that its digest covers."""


class PassageBuilder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """Base of the TFDS builders of this package: records {"text", "source"}, in reading order.

    Subclasses give the splits; each example is made by `numbered` from pairs of a source's name and a
    passage.
    """

    VERSION = tfds.core.Version("1.0.0")
    # TFDS would look for the file of the class through importlib_resources, which it does not install.
    code_path = epath.Path(__file__)

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description=self.__doc__,
            features=tfds.features.FeaturesDict({"text": tfds.features.Text(), "source": tfds.features.Text()}),
            disable_shuffling=True,
        )


def numbered(passages: Iterable[tuple[str, str]]) -> Iterator[tuple[int, dict[str, str]]]:
    """Turns (source, text) pairs into TFDS examples with keys 0, 1, ..."""
    for key, (source, text) in enumerate(passages):
        yield key, {"text": text, "source": source}


def open_prepared(
    builder_class: type[PassageBuilder], config: tfds.core.BuilderConfig, data_dir: str | None
) -> PassageBuilder:
    """The builder for `config`; its array_record files are written now unless they are there already.

    `data_dir` is where prepared sets are kept; None means the environment's TFDS_DATA_DIR or TFDS's own
    default. TFDS shows a progress bar while it writes.
    """
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(max(level, logging.ERROR))  # TFDS warns of every configuration made at run time, as ours are
    try:
        builder = builder_class(config=config, data_dir=data_dir, file_format="array_record")
        if not builder.is_prepared():
            try:
                builder.download_and_prepare()
            except OSError:
                builder = builder_class(config=config, data_dir=data_dir, file_format="array_record")
                if not builder.is_prepared():  # or else another process was faster
                    raise
    except (json_format.Error, AssertionError) as error:
        place = Path(data_dir or tfds.core.constants.DATA_DIR, builder_class.name, config.name, "1.0.0")
        raise _damaged(place, f"dataset_info.json: {first_line(error)}") from error
    finally:
        logger.setLevel(level)
    return builder


def cut(text: str, limit: int = PASSAGE_CHARACTERS) -> Iterator[str]:
    """Cuts `text` into passages of at most `limit` characters, at borders of paragraphs, lines or words.

    Joined together the passages are the text again; passages that hold only white space are left out.
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
    """One text feature of a prepared set's split, as random access to strings.

    Reading raises ValueError naming the file that is damaged.
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
        if not isinstance(value, (bytes, str)):  # what array_record gives for records that are not there
            raise _damaged(self._builder.data_dir, _broken(self._builder) or f"document {index} is missing")
        return value.decode("utf-8", errors="replace") if isinstance(value, bytes) else value

    def content(self) -> str:
        """A short digest of the set's full name, of the number of its documents, and of 64 of them, evenly spaced."""
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
    """The first array_record file that cannot be read or has lost records, and why."""
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
    """What an error says first, or its kind."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
