"""Hugging Face directories: config.json and safetensors files. Pickle files and code are never opened."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from butler_jax.model import FAMILIES, BaseConfig, base_config
from butler_jax.storage import file_in, read_object, shown
from butler_jax.weights.stored import StoredTensor

TYPES = ("F32", "F16", "BF16")
WITH_IMAGES = {"gemma3": "gemma3_text"}  # a family that takes images, and that of the language model inside
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PATTERNS = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "additional_chat_templates/*.jinja",
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
    quantised = values.get("quantization_config")
    mxfp4 = isinstance(quantised, dict) and quantised.get("quant_method") == "mxfp4"
    if quantised and not (mxfp4 and values.get("model_type") == "gpt_oss"):
        raise ValueError(
            f"{path}: quantised Hugging Face weights are not supported; "
            "use the model's unquantised directory or a .gguf file"
        )
    with_images = str(values.get("model_type")) in WITH_IMAGES and isinstance(values.get("text_config"), dict)
    if with_images:
        tied = values.get("tie_word_embeddings", True)
        values = {"tie_word_embeddings": tied, **values["text_config"], "model_type": WITH_IMAGES[values["model_type"]]}
    try:
        config = base_config(values)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    tensors = open_tensors(directory)
    if with_images:
        tensors = _text_tensors(tensors)
    if FAMILIES[config.family].offset_norms:
        tensors |= {name: _plus_one(tensor) for name, tensor in tensors.items() if name.endswith("norm.weight")}
    return Source(config, tensors)


def _text_tensors(tensors: dict[str, StoredTensor]) -> dict[str, StoredTensor]:
    """The tensors of the language model inside a model that takes images too, by the names of a language model."""
    found = {}
    for name, tensor in tensors.items():
        part = re.fullmatch(r"(?:model\.)?language_model\.(?:model\.)?(.*)", name)
        if part:
            own = part[1]
            found[own if own.startswith("lm_head.") else f"model.{own}"] = tensor
        elif name.startswith("lm_head."):
            found[name] = tensor
    return found


def _plus_one(tensor: StoredTensor) -> StoredTensor:
    """The scale 1 + w of a norm, float32; w is stored."""
    return StoredTensor(tensor.shape, lambda start, stop: tensor.read(start, stop).astype(np.float32) + 1)


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


def open_safetensors(path: Path, types: Sequence[str] = TYPES) -> dict[str, StoredTensor]:
    """The tensors of one safetensors file; their values are read on request, where they are of these types.

    The safetensors library checks the header: byte ranges lie within the file, leave no gap, do not overlap, and fit
    the tensors' shapes and types. Raises ValueError naming the file where it finds a fault.
    """
    tensors = {}
    with _opened(path) as file:
        for name in file.keys():  # noqa: SIM118 (the library's handle is no dict)
            stored = file.get_slice(name)
            shape, kind = tuple(stored.get_shape()), stored.get_dtype()
            # Another type is an error only when the tensor is read, since buffers that the model ignores may have it.
            packed = kind == "U8" and name.endswith(("_blocks", "_scales"))  # MXFP4
            read = (
                partial(_read_rows, path, name) if kind in types or packed else partial(_unsupported, path, name, kind)
            )
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


HUB_ID = re.compile(r"([A-Za-z0-9][\w.-]*/[\w.-]+)(?:@([\w./-]+))?")


def parse_hub_id(spec: str) -> tuple[str, str | None] | None:
    """The name and the revision of "organisation/name" or "organisation/name@revision"; None for other texts."""
    found = HUB_ID.fullmatch(spec)
    return None if found is None else (found[1], found[2])


def cached_id(directory: Path) -> tuple[str, str | None]:
    """The name and the revision of a model's directory. Outside of the hub's cache, its own name and None."""
    directory = directory.resolve()
    home = directory.parent.parent.name
    if directory.parent.name != "snapshots" or not home.startswith("models--"):
        return directory.name, None
    return home.removeprefix("models--").replace("--", "/"), directory.name


@cache
def download(name: str, revision: str | None = None) -> Path:
    """Download the configuration, tokenizer and safetensors files of "organisation/name" from the hub to a directory.

    A process asks the hub once for a name and revision.

    Args:
        revision: A commit, branch or tag. Default: the newest commit.

    Returns:
        The directory. Its name is the commit.

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
        return Path(huggingface_hub.snapshot_download(name, revision=revision, allow_patterns=list(PATTERNS)))
    except Exception as error:  # network, authorisation and naming errors have no common class
        at = "" if revision is None else f" at revision {revision}"
        raise FileNotFoundError(
            f"{name!r} is no directory here, and the hub did not deliver it{at} ({_in_one_line(error)}). Check the "
            "name and the connection, or give the path of a downloaded directory"
        ) from error


def upload(directory: Path, name: str, *, private: bool = False) -> str:
    """Send a directory's files to the repository "organisation/name" of the hub; returns the address of the commit.

    Raises:
        ImportError: The package huggingface_hub is missing.
        OSError: The hub refuses them.
    """
    try:
        import huggingface_hub
    except ImportError as error:
        raise ImportError("sending files to the hub takes its package: pip install 'butler-jax[hub]'") from error
    try:
        hub = huggingface_hub.HfApi()
        hub.create_repo(name, private=private, exist_ok=True)
        return hub.upload_folder(repo_id=name, folder_path=directory, commit_message="Upload a predictor").commit_url
    except Exception as error:  # as above
        raise OSError(
            f"the hub did not take {name!r} ({_in_one_line(error)}). Log in with `hf auth login`, and check "
            "the name and the connection"
        ) from error


def _in_one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())
