"""Hugging Face directories: config.json and safetensors files. Pickle files and code are never opened."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from butler_jax.model import BaseConfig, base_config
from butler_jax.storage import file_in, read_object, shown
from butler_jax.weights.placement import StoredTensor

TYPES = ("F32", "F16", "BF16")
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PATTERNS = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "model*.safetensors",
    INDEX,
)


@dataclass(frozen=True)
class Source:
    """A stored model: its configuration, and its tensors by their Hugging Face names."""

    config: BaseConfig
    tensors: dict[str, StoredTensor]


def open_directory(directory: Path) -> Source:
    """Read config.json and the headers of model.safetensors or its shards. Weights are read later, from the tensors.

    Raises:
        FileNotFoundError: The directory, config.json or a safetensors file is missing; it is named.
        ValueError: A file is damaged or not supported; it is named.
    """
    if not directory.is_dir():
        raise FileNotFoundError(f"no such directory: {directory}")
    path = file_in(directory, "config.json")
    if path is None:
        raise FileNotFoundError(
            f"{directory} has no config.json; a Hugging Face model directory holds config.json, "
            f"{SINGLE} (or {INDEX} and its shards) and tokenizer.json"
        )
    values = read_object(path)
    if values.get("quantization_config"):
        raise ValueError(
            f"{path}: quantised Hugging Face weights are not supported; "
            "use the model's unquantised directory or a .gguf file"
        )
    try:
        config = base_config(values)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return Source(config, open_tensors(directory))


def open_tensors(directory: Path) -> dict[str, StoredTensor]:
    """All tensors of a directory's model.safetensors, or of the shards that its index lists."""
    if single := file_in(directory, SINGLE):
        return open_safetensors(single)
    index = file_in(directory, INDEX)
    if index is None:
        pickles = sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth") for p in directory.glob(pattern))
        only = (
            f" It holds {pickles[0]}, which is a pickle; only safetensors is read: "
            "save the model again with save_pretrained(..., safe_serialization=True)."
            if pickles
            else ""
        )
        raise FileNotFoundError(f"{directory} has neither {SINGLE} nor {INDEX}.{only}")
    placed = read_object(index).get("weight_map")
    if not isinstance(placed, dict) or not placed:
        raise ValueError(f"{index} has no weight_map")
    for name in placed.values():
        if not isinstance(name, str) or not name.endswith(".safetensors") or Path(name).name != name:
            raise ValueError(f"{index} names {shown(name)}, which is not a .safetensors file beside it")
    tensors: dict[str, StoredTensor] = {}
    for name in sorted(set(placed.values())):
        path = file_in(directory, name)
        if path is None:
            raise FileNotFoundError(f"{directory / name} is missing; {INDEX} lists it. Download the model again")
        found = open_safetensors(path)
        twice = sorted(tensors.keys() & found.keys())
        if twice:
            raise ValueError(f"{path} holds tensor {twice[0]} once more; another shard has it already")
        tensors |= found
    lost = [name for name in placed if name not in tensors]
    if lost:
        raise ValueError(f"{index} lists tensor {lost[0]}, which is in none of its files")
    return tensors


def open_safetensors(path: Path) -> dict[str, StoredTensor]:
    """The tensors of one safetensors file; their values are read on request.

    The safetensors library checks the header: byte ranges lie within the file, leave no gap, do not overlap, and fit
    the tensors' shapes and types. Raises ValueError naming the file where it finds a fault.
    """
    tensors = {}
    with _opened(path) as file:
        for name in file.keys():  # noqa: SIM118 (the library's handle is no dict)
            stored = file.get_slice(name)
            shape, kind = tuple(stored.get_shape()), stored.get_dtype()
            # Another type is an error only when the tensor is read, since buffers that the model ignores may have it.
            read = partial(_read_rows, path, name) if kind in TYPES else partial(_unsupported, path, name, kind)
            tensors[name] = StoredTensor(shape, read)
    return tensors


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """The library's handle of a file. It is closed soon, because the pages it maps count as memory."""
    try:
        with safe_open(path, framework="np") as file:
            yield file
    except SafetensorError as error:
        raise ValueError(
            f"{path} is truncated or damaged: {path.stat().st_size} bytes ({error}). Download or copy the file again"
        ) from error


def _read_rows(path: Path, name: str, start: int, stop: int) -> np.ndarray:
    with _opened(path) as file:
        return file.get_slice(name)[start:stop]


def _unsupported(path: Path, name: str, kind: str, start: int, stop: int) -> np.ndarray:
    raise ValueError(f"{path}: tensor {name} has type {kind}; supported are {', '.join(TYPES)}")


def download(name: str) -> Path:
    """Download the configuration, tokenizer and safetensors files of "organisation/name" from the hub to a directory.

    Raises:
        FileNotFoundError: The package huggingface_hub is missing, or the hub does not deliver the model.
    """
    try:
        import huggingface_hub
    except ImportError as error:
        raise FileNotFoundError(
            f"{name!r} is no directory here. To load it from the hub: pip install 'butler-jax[hub]'"
        ) from error
    try:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=list(PATTERNS)))
    except Exception as error:  # network, authorisation and naming errors have no common class
        raise FileNotFoundError(
            f"{name!r} is no directory here, and the hub did not deliver it ({type(error).__name__}: {error}). Check "
            "the name and the connection, or give the path of a downloaded directory"
        ) from error
