"""GGUF files with malformed headers or metadata are refused."""

import struct
import time

import gguf
import numpy as np
import pytest

from benchmarks.fuzz_targets import write_gguf
from butler_jax.weights import load_base
from butler_jax.weights.gguf.header import MOST_VALUES
from tests.weights.hostile import array, gguf_file, gguf_tensor, refused, text

ALIGNED = text("general.alignment") + struct.pack("<I", 4)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"GGUF", "ends before"),
        (gguf_file(version=1), "version 1 is not supported"),
        (gguf_file(version=2**32 - 1), "version 4294967295"),
        (gguf_file(entry_count=2**64 - 1), "ends before"),
        (gguf_file(tensor_count=2**64 - 1), "ends before"),
        (gguf_file(struct.pack("<Q", 2**64 - 1)), "ends before"),
        (gguf_file(text("k") + struct.pack("<IQ", 8, 2**63)), "ends before"),
        (gguf_file(array(0, 2**62)), "more than 2097152 values"),
        (gguf_file(array(8, 2**21, bytes(64))), "ends before"),
        (gguf_file(array(0, 3 << 20, bytes(3 << 20))), "more than 2097152 values"),  # fits: gigabytes in the library
        (gguf_file(array(8, 1, struct.pack("<Q", 1 << 28) + bytes(1 << 28))), "more than 268435456 bytes"),
        (gguf_file(array(9, 1, struct.pack("<IQ", 9, 1) * 5000)), "array of arrays"),
        (gguf_file(array(13, 1)), "unknown type 13"),
        (gguf_file(text("k") + struct.pack("<I", 77)), "unknown type 77"),
        (gguf_file(text(b"\xff") + struct.pack("<II", 4, 1)), "utf-8"),
        (gguf_file(*[text("k") + struct.pack("<II", 4, 1)] * 2), "the key 'k' is there twice"),
        (gguf_file(ALIGNED + struct.pack("<I", 0)), "must be a power of 2, got 0"),
        (gguf_file(ALIGNED + struct.pack("<I", 48)), "must be a power of 2, got 48"),
        (gguf_file(text("general.alignment") + struct.pack("<IQ", 10, 32)), "general.alignment is no uint32"),
        (gguf_file(tensors=gguf_tensor("a"), tensor_count=1), "0 dimensions"),
        (gguf_file(tensors=gguf_tensor("a", 1, 1, 1, 1, 1), tensor_count=1), "5 dimensions"),
        (gguf_file(tensors=text("a") + struct.pack("<I", 2**32 - 1), tensor_count=1), "4294967295 dimensions"),
        (gguf_file(tensors=gguf_tensor("a", 0, 4), tensor_count=1), r"shape \[4, 0\]"),
        (gguf_file(tensors=gguf_tensor("a", 2**63, 2**63, 4), tensor_count=1), "cannot have the shape"),
        (gguf_file(tensors=gguf_tensor("a", 10**10, 64), tensor_count=1), "ends beyond the file"),
        (gguf_file(tensors=gguf_tensor("a", 1, offset=2**63), tensor_count=1), "ends beyond the file"),
        (gguf_file(tensors=gguf_tensor("a", 31, 2, kind=8), tensor_count=1), r"shape \[2, 31\]"),
        (gguf_file(tensors=gguf_tensor("a", 4, kind=999), tensor_count=1), "999 is not a valid"),
        (gguf_file(tensors=gguf_tensor("a", 4) * 2 + bytes(64), tensor_count=2), "tensor 'a' is there twice"),
        (
            gguf_file(tensors=gguf_tensor("a", 4) + gguf_tensor("b", 4, offset=8) + bytes(99), tensor_count=2),
            "'a' and 'b' overlap",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_malformed_gguf_file_is_refused(tmp_path, content, said):
    path = tmp_path / "a.gguf"
    path.write_bytes(content)
    began = time.process_time()
    refused(path, rf"a\.gguf is truncated or damaged: .*{said}")
    assert time.process_time() - began < 5.0  # seconds; nothing of it is a loop over a count


def test_a_gguf_file_of_another_byte_order_is_named(tmp_path):
    path = tmp_path / "a.gguf"
    path.write_bytes(b"GGUF" + struct.pack(">IQQ", 3, 0, 0))
    refused(path, "is big-endian")


def rewrite_gguf(path, name, value):
    """Replace a scalar or a text of a whole file's metadata; the text must have the same length."""
    raw = bytearray(path.read_bytes())
    at = raw.index(text(name)) + 8 + len(name)
    raw[at : at + len(value)] = value
    path.write_bytes(raw)


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("llama.attention.head_count", struct.pack("<II", 4, 0), "head_count must be a whole number"),
        ("llama.attention.head_count", struct.pack("<If", 6, 2.0), "head_count must be a whole number"),
        ("llama.embedding_length", struct.pack("<Ii", 5, -8), "embedding_length must be"),
        ("llama.block_count", struct.pack("<II", 4, 2**32 - 1), "num_hidden_layers must be below"),
        ("llama.context_length", struct.pack("<II", 4, 2**31), "context must be below"),
        ("llama.attention.layer_norm_rms_epsilon", struct.pack("<If", 6, np.nan), "must be a finite number"),
        ("llama.rope.freq_base", struct.pack("<If", 6, np.inf), "must be a finite number"),
        ("llama.rope.dimension_count", struct.pack("<II", 4, 0), "dimension_count must be"),
        ("tokenizer.ggml.bos_token_id", struct.pack("<II", 4, 99), "its tokenizer has the id 99"),
        ("tokenizer.ggml.token_type", struct.pack("<II", 9, 6), "token_type cannot be"),
        ("general.architecture", struct.pack("<IQ", 8, 5) + b"mamba", "unknown architecture 'mamba'"),
    ],
)
def test_gguf_metadata_of_wrong_types_is_named(tmp_path, key, value, said):
    path = write_gguf(tmp_path / "a.gguf")
    load_base(path)
    rewrite_gguf(path, key, value)
    refused(path, said)


def test_a_tensor_of_a_layer_without_a_part_is_another_tensor(tmp_path):
    path = write_gguf(tmp_path / "a.gguf")
    path.write_bytes(path.read_bytes().replace(b"blk.0.attn_norm.weight", b"blk.0_attn_norm_weight"))
    refused(path, r"model\.layers\.0\.input_layernorm")


def test_gguf_values_that_are_not_finite_and_rows_of_no_block_are_named(tmp_path):
    path = write_gguf(tmp_path / "a.gguf")
    path.write_bytes(path.read_bytes()[:-4] + struct.pack("<f", np.nan))
    refused(path, r"tensor model\.layers\.0\..* has values that are not finite")

    writer = gguf.GGUFWriter(path, "llama")
    kind = gguf.GGMLQuantizationType.Q8_0
    writer.add_tensor("output_norm.weight", gguf.quantize(np.ones(32, np.float32), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    refused(path, r"output_norm\.weight is one row of type Q8_0; it must be F32, F16, BF16")


def test_the_largest_vocabularies_stay_below_the_limit_of_gguf_values():
    tokens, merges = 262_144, 514_906  # Gemma 3's
    assert 3 * tokens + merges < MOST_VALUES
