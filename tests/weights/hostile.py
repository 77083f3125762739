"""Damaged model files, and the check that load_base refuses them, which tests of hostile input share."""

import json
import struct
from pathlib import Path

import pytest

from benchmarks.fuzz_targets import CONFIG, tokenizer_file
from butler_jax.weights import load_base

REPOSITORY = Path(__file__).parent.parent.parent

EMBEDDING = "model.embed_tokens.weight"


def refused(path, match, kind=ValueError):
    """load_base must raise `kind` with a message that matches and that names the path."""
    with pytest.raises(kind, match=match) as caught:
        load_base(path)
    assert str(path) in str(caught.value)
    return caught.value


def change_config(directory, **values):
    (directory / "config.json").write_text(json.dumps({**CONFIG, **values}))


def container(header, data=b""):
    """A safetensors file with this header, well formed or not."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw)) + raw + data


def entry(begin, end, shape=(2,), dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


def text(value):
    raw = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(raw)) + raw


def gguf_file(*entries, tensors=b"", entry_count=None, tensor_count=0, version=3):
    """A GGUF file from raw metadata entries and raw tensor entries."""
    counts = struct.pack("<IQQ", version, tensor_count, len(entries) if entry_count is None else entry_count)
    return b"GGUF" + counts + b"".join(entries) + tensors


def gguf_tensor(name, *shape, kind=0, offset=0):
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


def array(kind, length, content=b"", key="k"):
    return text(key) + struct.pack("<IIQ", 9, kind, length) + content


def change_tokenizer(directory, **values):
    (directory / "tokenizer.json").write_text(json.dumps({**tokenizer_file(), **values}))
