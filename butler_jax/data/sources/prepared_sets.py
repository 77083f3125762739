"""Any prepared TFDS set with text, read by random access from its array_record files without TensorFlow."""

from __future__ import annotations

import re

import tensorflow_datasets as tfds
from google.protobuf import json_format

from butler_jax.data.sources.features import choose_features, split_features
from butler_jax.data.sources.passages import TextField, first_line
from butler_jax.data.sources.text_files import choose_splits

TEST_PERCENT = 2
"""The share of "train", at its end, that is held out where a set has no other split."""


def open_prepared_set(name: str, split: str, data_dir: str | None = None) -> TextField:
    """Open the documents of a prepared TFDS set.

    Args:
        name: NAME, NAME/CONFIG or NAME:VERSION, as TFDS writes it. NAME#FEATURE names a text feature, by default "text"
            or the only one; NAME#FEATURE+FEATURE names several.
        split: "train" or "test". Test documents are the set's split "test" or "validation". A set with neither gives
            the last 2 % of "train", and training uses the rest.
        data_dir: Where the set was prepared, also `gs://`; None is TFDS_DATA_DIR or TFDS's default.

    Raises:
        FileNotFoundError: The set is not prepared there.
        ValueError: It has no text feature, no split to read, or its format has no random access.
    """
    name, asked = split_features(name)
    if not re.fullmatch(r"\w+(/\w[\w.+-]*)*(:[\d.*]+)?", name, re.ASCII):  # TFDS would run foreign code for a namespace
        raise ValueError(f"tfds:{name} is no name of a TFDS set; write NAME, NAME/CONFIG or NAME:VERSION.")
    place = data_dir or tfds.core.constants.DATA_DIR
    advice = f"Prepare it once with: tfds build {name} --file_format=array_record --data_dir={place}"
    try:
        builder = tfds.builder(name, data_dir=data_dir)
        prepared = builder.is_prepared()
    except (tfds.core.registered.DatasetNotFoundError, ImportError) as error:
        raise FileNotFoundError(f"no prepared TFDS set {name!r} in {place}. {advice}") from error
    except (ValueError, AssertionError, RuntimeError, json_format.Error) as error:
        raise ValueError(f"tfds:{name} cannot be opened from {place}: {first_line(error)}") from error
    if not prepared:
        raise FileNotFoundError(f"the TFDS set {name!r} is not prepared in {place}. {advice}")
    own = dict(builder.info.features)
    texts = [name for name, feature in own.items() if isinstance(feature, tfds.features.Text)]
    features = choose_features(asked, texts, list(own), f"tfds:{name}")
    parts = choose_splits(tuple(builder.info.splits), f"tfds:{name}")
    if len(parts) == 1:  # no split is held out
        parts = {"train": f"train[:{100 - TEST_PERCENT}%]", "test": f"train[{100 - TEST_PERCENT}%:]"}
        if split == "test" and not builder.info.splits[parts["test"]].num_examples:
            raise ValueError(
                f"tfds:{name} has no other split than train, and too few documents to hold out {TEST_PERCENT} % of "
                "them; take a larger set, or mix it with one that has a split test"
            )
    try:
        return TextField(builder, parts[split], features)
    except (NotImplementedError, ValueError) as error:
        kind = builder.info.file_format
        kind = getattr(kind, "value", kind)
        raise ValueError(
            f"tfds:{name} in {place} is prepared as {kind}, which has no random access; "
            f"array_record is needed. {advice}"
        ) from error
