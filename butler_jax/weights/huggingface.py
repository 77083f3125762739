"""Hugging Face directories: config.json and safetensors files, never pickle and never code."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import ml_dtypes
import numpy as np

from butler_jax.configs import BaseConfig, require
from butler_jax.families import base_config
from butler_jax.weights.placing import StoredTensor

DTYPES = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16)}
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
    """A model on disk: its configuration and its tensors under their Hugging Face names."""

    config: BaseConfig
    tensors: dict[str, StoredTensor]


def open_directory(directory: Path) -> Source:
    """Read the configuration and the headers of a Hugging Face directory; no weights yet.

    Raises FileNotFoundError for a missing directory, config.json or safetensors file, and ValueError for a file that is
    damaged or of an unsupported kind; each names the file.
    """
    if not directory.is_dir():
        raise FileNotFoundError(f"no such directory: {directory}")
    path = directory / "config.json"
    if not path.is_file():
        raise FileNotFoundError(
            f"{directory} has no config.json; a Hugging Face model directory holds config.json, "
            f"{SINGLE} (or {INDEX} and its shards) and tokenizer.json"
        )
    values = read_json(path)
    require(
        "quantization_config" not in values,
        f"{path}: quantised Hugging Face weights are not supported; "
        "use the model's unquantised directory or a .gguf file",
    )
    try:
        config = base_config(values)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return Source(config, open_tensors(directory))


def open_tensors(directory: Path) -> dict[str, StoredTensor]:
    """Every tensor of a directory's model.safetensors, or of the shards its index lists."""
    if (directory / SINGLE).is_file():
        return open_safetensors(directory / SINGLE)
    if not (directory / INDEX).is_file():
        pickles = sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth") for p in directory.glob(pattern))
        only = (
            f" It holds {pickles[0]}, which is a pickle; only safetensors is read: "
            "save the model again with save_pretrained(..., safe_serialization=True)."
            if pickles
            else ""
        )
        raise FileNotFoundError(f"{directory} has neither {SINGLE} nor {INDEX}.{only}")
    placed = read_json(directory / INDEX).get("weight_map")
    require(isinstance(placed, dict) and bool(placed), f"{directory / INDEX} has no weight_map")
    files = sorted(set(placed.values()))
    tensors: dict[str, StoredTensor] = {}
    for name in files:
        require(Path(name).name == name, f"{directory / INDEX} names {name!r}, which is not a file beside it")
        path = directory / name
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing; {INDEX} lists it. Download the model again")
        tensors |= open_safetensors(path)
    lost = [name for name in placed if name not in tensors]
    require(not lost, f"{directory / INDEX} lists tensor {lost[0] if lost else ''}, which is in none of its files")
    return tensors


def open_safetensors(path: Path) -> dict[str, StoredTensor]:
    """The tensors of one safetensors file, read from disk when asked for."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        require(
            size >= 8 + length,
            f"{path} is truncated: {size} bytes, but its header alone has {length}. Download or copy the file again",
        )
        try:
            header = json.loads(file.read(length))
            entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
            ends = [entry["data_offsets"][1] for entry in entries.values()]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} is not a safetensors file: its header cannot be read") from error
    expected = 8 + length + max(ends, default=0)
    require(size >= expected, f"{path} is truncated: {size} bytes of {expected}. Download or copy the file again")
    tensors = {}
    for name, entry in entries.items():
        kind, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        dtype = DTYPES.get(kind)
        if dtype is None:  # an error only where it is asked for: buffers of other types may be harmless
            tensors[name] = StoredTensor(shape, partial(_unsupported, path, name, kind))
            continue
        require(
            end - begin == math.prod(shape) * dtype.itemsize,
            f"{path}: tensor {name} of shape {list(shape)} and type {kind} cannot have {end - begin} bytes",
        )
        tensors[name] = StoredTensor(shape, partial(_read_rows, path, 8 + length + begin, shape, dtype))
    return tensors


def _read_rows(path: Path, offset: int, shape: tuple[int, ...], dtype: np.dtype, start: int, stop: int) -> np.ndarray:
    row = math.prod(shape[1:])
    raw = np.fromfile(
        path, np.uint8, (stop - start) * row * dtype.itemsize, offset=offset + start * row * dtype.itemsize
    )
    return raw.view(dtype).reshape(stop - start, *shape[1:])


def _unsupported(path: Path, name: str, kind: str, start: int, stop: int) -> np.ndarray:
    raise ValueError(f"{path}: tensor {name} has type {kind}; supported are {', '.join(DTYPES)}")


def read_json(path: Path) -> dict:
    """A JSON object from a file; ValueError naming the file where it is not one."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    require(isinstance(values, dict), f"{path} must hold a JSON object")
    return values


def download(name: str) -> Path:
    """Fetch a model of the hub, config, tokenizer and safetensors files only, and return its local directory."""
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
