"""Prepared TFDS sets as a source."""

from __future__ import annotations

import numpy as np
import pytest
import tensorflow_datasets as tfds

from butler_jax.data.sources import passages, prepared_sets
from butler_jax.data.sources.prepared_sets import open_prepared_set


class Letters(tfds.core.GeneratorBasedBuilder):
    """Letters to open by name."""

    VERSION = tfds.core.Version("1.0.0")
    code_path = passages.PassageBuilder.code_path
    KEYS = ("article", "label")
    COUNT = 100

    def _info(self):
        kinds = {"article": tfds.features.Text(), "label": tfds.features.Scalar(dtype=np.int32)}
        features = tfds.features.FeaturesDict({key: kinds[key] for key in self.KEYS})
        return tfds.core.DatasetInfo(builder=self, features=features)

    def _split_generators(self, download_manager):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        for i in range(self.COUNT):
            values = {"article": f"Dear {i}", "label": i}
            yield i, {key: values[key] for key in self.KEYS}


class Few(Letters):
    """Ten letters, of which 2 % are none."""

    COUNT = 10


class Numbers(Letters):
    """A set without text."""

    KEYS = ("label",)


def test_a_prepared_set_opens_by_name_with_its_last_part_held_out(tmp_path):
    Letters(data_dir=tmp_path, file_format="array_record").download_and_prepare()
    train = prepared_sets.open_prepared_set("letters", "train", str(tmp_path))
    test = prepared_sets.open_prepared_set("letters:1.0.0", "test", str(tmp_path))
    read = [train[i] for i in range(len(train))] + [test[i] for i in range(len(test))]
    assert len(test) == 2 and sorted(read) == sorted(f"Dear {i}" for i in range(100))


def test_a_set_too_small_to_hold_a_part_out_says_so(tmp_path):
    Few(data_dir=tmp_path, file_format="array_record").download_and_prepare()
    assert len(prepared_sets.open_prepared_set("few", "train", str(tmp_path))) == 10
    with pytest.raises(ValueError, match="tfds:few has no other split than train, and too few documents"):
        prepared_sets.open_prepared_set("few", "test", str(tmp_path))


def test_sets_that_cannot_be_read_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no_such_set.*tfds build no_such_set"):
        prepared_sets.open_prepared_set("no_such_set", "train", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="'letters' is not prepared"):
        prepared_sets.open_prepared_set("letters", "train", str(tmp_path))
    Numbers(data_dir=tmp_path, file_format="array_record").download_and_prepare()
    with pytest.raises(ValueError, match=r"numbers has no text feature \(features: label\)"):
        prepared_sets.open_prepared_set("numbers", "train", str(tmp_path))
    builder = Letters(data_dir=tmp_path, file_format="array_record")
    builder.download_and_prepare()
    info = builder.data_path / "dataset_info.json"
    info.write_text(info.read_text().replace("array_record", "tfrecord"))
    with pytest.raises(ValueError, match="prepared as tfrecord, which has no random access"):
        prepared_sets.open_prepared_set("letters", "train", str(tmp_path))


def test_names_of_prepared_sets_bring_in_no_foreign_code():
    for name in ("someone:their_set", "huggingface:x/y", "../x", "a/../b", ""):
        with pytest.raises(ValueError, match="is no name of a TFDS set; write NAME"):
            open_prepared_set(name, "train")


class Pairs(Letters):
    """A set with two text features."""

    KEYS = ("question", "answer")

    def _info(self):
        features = tfds.features.FeaturesDict({key: tfds.features.Text() for key in self.KEYS})
        return tfds.core.DatasetInfo(builder=self, features=features)

    def _generate_examples(self):
        yield from ((i, {"question": f"{i} + 1?", "answer": f"{i + 1}."}) for i in range(100))


def test_text_features_of_several_are_named(tmp_path):
    Pairs(data_dir=tmp_path, file_format="array_record").download_and_prepare()

    def read(name):
        opened = prepared_sets.open_prepared_set(name, "train", str(tmp_path))
        return {opened[i] for i in range(len(opened))}

    assert read("pairs#answer") < {f"{i + 1}." for i in range(100)}
    assert read("pairs#question+answer") < {f"{i} + 1?\n\n{i + 1}." for i in range(100)}
    with pytest.raises(
        ValueError, match=r"tfds:pairs has several text features .* Name one: tfds:pairs#(question|answer)"
    ):
        read("pairs")
    with pytest.raises(ValueError, match="tfds:pairs has no text feature label; it has: "):
        read("pairs#label")
