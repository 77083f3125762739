"""Any prepared TFDS set with text, read by random access from its array_record files without TensorFlow."""

from __future__ import annotations

import re

import tensorflow_datasets as tfds
from google.protobuf import json_format

from butler_jax.data.sources.passages import TextField, first_line

TEST_PERCENT = 2
"""The share of "train", at its end, that is held out where a set has no other split."""


def open_prepared_set(name: str, split: str, data_dir: str | None = None) -> TextField:
    """Open the documents of a prepared TFDS set.

    Args:
        name: NAME, NAME/CONFIG or NAME:VERSION, as TFDS writes it. NAME#FEATURE names a text feature, by default "text"
            or the only one.
        split: "train" or "test". Test documents are the set's split "test" or "validation". A set with neither gives
            the last 2 % of "train", and training uses the rest.
        data_dir: Where the set was prepared, also `gs://`; None is TFDS_DATA_DIR or TFDS's default.

    Raises:
        FileNotFoundError: The set is not prepared there.
        ValueError: It has no text feature, no split to read, or its format has no random access.
    """
    name, _, feature = name.partition("#")
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
    key = _text_key(name, feature, builder.info.features)
    chosen = _split(name, tuple(builder.info.splits), split)
    try:
        return TextField(builder, chosen, key)
    except (NotImplementedError, ValueError) as error:
        kind = builder.info.file_format
        kind = getattr(kind, "value", kind)
        raise ValueError(
            f"tfds:{name} in {place} is prepared as {kind}, which has no random access; "
            f"array_record is needed. {advice}"
        ) from error


def _text_key(name: str, asked: str, features: tfds.features.FeaturesDict) -> str:
    texts = [key for key, feature in dict(features).items() if isinstance(feature, tfds.features.Text)]
    if asked:
        if asked not in texts:
            raise ValueError(f"tfds:{name} has no text feature {asked}; it has: {', '.join(texts) or 'none'}.")
        return asked
    if "text" in texts:
        return "text"
    if len(texts) == 1:
        return texts[0]
    found = ", ".join(map(str, features))
    if not texts:
        raise ValueError(f"tfds:{name} has no text feature (features: {found}); choose a set of text.")
    raise ValueError(
        f"tfds:{name} has several text features ({', '.join(texts)}) and none is called text. "
        f"Name one: tfds:{name}#{texts[0]}."
    )


def _split(name: str, splits: tuple[str, ...], split: str) -> str:
    held_out = next((own for own in ("test", "validation") if own in splits), None)
    if "train" not in splits:
        raise ValueError(f"tfds:{name} has no split train (splits: {', '.join(splits) or 'none'}).")
    if split == "train":
        return "train" if held_out else f"train[:{100 - TEST_PERCENT}%]"
    return held_out or f"train[{100 - TEST_PERCENT}%:]"
