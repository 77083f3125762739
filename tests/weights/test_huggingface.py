"""Hugging Face directories: what is read and refused, on which devices it is placed, and its memory."""

import json
import os
import shutil
import struct
import sys
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save, save_file

from benchmarks.fuzz_targets import weights
from butler_jax.model.decoder import forward
from butler_jax.storage.files import file_in
from butler_jax.weights import huggingface, load_base
from butler_jax.weights.huggingface import INDEX, SINGLE
from tests import reference_models
from tests.weights.hostile import EMBEDDING, container, entry, refused
from tests.weights.llama_files import LLAMA, equal, llama_tensors, rewrite


def test_shards_with_an_index_load_like_one_file(directory, tmp_path_factory):
    split, tensors = tmp_path_factory.mktemp("split"), llama_tensors()
    shutil.copy(directory / "config.json", split)
    names = sorted(tensors)
    files = {"model-1.safetensors": names[::2], "model-2.safetensors": names[1::2]}
    for file, mine in files.items():
        save_file({name: tensors[name] for name in mine}, split / file)
    placed = {name: file for file, mine in files.items() for name in mine}
    (split / "model.safetensors.index.json").write_text(json.dumps({"weight_map": placed}))
    whole, sharded = load_base(directory), load_base(split)
    assert equal(whole, sharded) and whole.fingerprint == sharded.fingerprint

    (split / "model-2.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"model-2\.safetensors is missing"):
        load_base(split)
    placed[names[0]] = "../elsewhere.safetensors"
    (split / "model.safetensors.index.json").write_text(json.dumps({"weight_map": placed}))
    with pytest.raises(ValueError, match=r"not a \.safetensors file beside it"):
        load_base(split)


@pytest.mark.parametrize("dtype", [np.float16, jnp.bfloat16])
def test_half_precision_files_load_exactly(directory, dtype):
    tensors = {name: values.astype(dtype) for name, values in llama_tensors().items()}
    save_file(tensors, directory / "model.safetensors")
    base = load_base(directory)
    assert base.model.embedding[...].dtype == jnp.float32
    expected = tensors["model.embed_tokens.weight"].astype(np.float32)
    np.testing.assert_array_equal(base.model.embedding[...], expected)


# --- what is refused ------------------------------------------------------------------------------


def test_missing_directory_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no such directory: .*nowhere"):
        load_base(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="no such directory: nowhere"):
        load_base("nowhere")


def test_directory_without_config_is_named(directory):
    (directory / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"has no config\.json"):
        load_base(directory)


def test_config_that_is_no_json_is_named(directory):
    (directory / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json is not valid JSON"):
        load_base(directory)


def test_file_that_is_no_model_is_named(directory):
    with pytest.raises(ValueError, match="is a file, but neither"):
        load_base(directory / "config.json")


def test_pickle_is_never_opened(directory):
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match=r"pytorch_model\.bin, which is a pickle; only safetensors is read"):
        load_base(directory)


def test_directory_without_weights_is_named(directory):
    (directory / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"neither model\.safetensors nor model\.safetensors\.index\.json"):
        load_base(directory)


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_truncated_safetensors_is_named(directory, keep):
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"model\.safetensors is truncated or damaged"):
        load_base(directory)


@pytest.mark.parametrize("header", [b"x" * 40, b"[1, 2]", b'{"a": {}}'])
def test_damaged_safetensors_header_is_named(directory, header):
    (directory / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    with pytest.raises(ValueError, match=r"model\.safetensors is truncated or damaged"):
        load_base(directory)


def test_unknown_family_and_quantised_weights_are_named(directory):
    (directory / "config.json").write_text(json.dumps({**LLAMA, "model_type": "mamba"}))
    with pytest.raises(ValueError, match=r"config\.json: unknown model family 'mamba'"):
        load_base(directory)
    (directory / "config.json").write_text(json.dumps({**LLAMA, "quantization_config": {"bits": 4}}))
    with pytest.raises(ValueError, match="quantised"):
        load_base(directory)
    for nothing in (None, {}):
        (directory / "config.json").write_text(json.dumps({**LLAMA, "quantization_config": nothing}))
        load_base(directory)


def test_unsupported_tensor_type_is_named(directory):
    rewrite(directory, lambda t: t.update({"model.norm.weight": np.ones(64, np.int32)}))
    with pytest.raises(ValueError, match=r"model\.norm\.weight has type I32; supported are F32, F16, BF16"):
        load_base(directory)


# --- the hub --------------------------------------------------------------------------------------


def test_hub_asks_for_config_tokenizer_and_safetensors_only(directory, monkeypatch):
    asked = {}

    def snapshot_download(name, **options):
        asked.update(name=name, **options)
        return str(directory)

    fake = type(sys)("huggingface_hub")
    fake.snapshot_download = snapshot_download
    monkeypatch.setitem(sys.modules, "huggingface_hub", fake)
    base = load_base("some-org/some.model")
    assert base.name == asked["name"] == "some-org/some.model"
    assert asked["allow_patterns"] == list(huggingface.PATTERNS)
    assert not any(p.endswith((".bin", ".py", ".pt", "*")) for p in huggingface.PATTERNS)


def test_hub_without_its_package_or_connection_says_what_to_do(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(FileNotFoundError, match=r"pip install 'butler-jax\[hub\]'"):
        load_base("some-org/some-model")

    def fail(*_, **__):
        raise OSError("no route")

    fake = type(sys)("huggingface_hub")
    fake.snapshot_download = fail
    monkeypatch.setitem(sys.modules, "huggingface_hub", fake)
    with pytest.raises(FileNotFoundError, match=r"did not deliver it .*no route"):
        load_base("some-org/some-model")


# --- fingerprints, shardings, memory --------------------------------------------------------------


@pytest.mark.parametrize(
    "content",
    [
        b"",
        struct.pack("<Q", 2**63) + b"{}",  # a header longer than the file, than memory, than an int64
        struct.pack("<Q", 2**64 - 1) + b"{}",
        struct.pack("<Q", 99_000_000) + b"{}",
        container(b"[" * 100_000),
        container({"a": entry(0, 8), "b": entry(4, 12)}, bytes(12)),  # overlap
        container({"a": entry(0, 8), "b": entry(12, 20)}, bytes(20)),  # a hole
        container({"a": entry(8, 16)}, bytes(16)),  # a hole in front
        container({"a": entry(0, 8)}, bytes(12)),  # bytes of no tensor
        container({"a": entry(0, 2**62, (2**60,))}, bytes(8)),  # beyond the file
        container({"a": entry(8, 0)}, bytes(8)),
        container({"a": entry(-8, 0)}, bytes(8)),
        container({"a": entry(0, 8, (3,))}, bytes(8)),  # the shape says 12 bytes
        container({"a": entry(0, 8, (2**62, 2**62, 4))}, bytes(8)),  # 2**126 values: 0 in 64 bits
        container({"a": entry(0, 8, (-2, -1))}, bytes(8)),
        container({"a": entry(0, 8, (1e400,))}, bytes(8)),
        container({"a": entry(0, 8, dtype="F128")}, bytes(8)),
        container({"a": entry("0", "8")}, bytes(8)),
        container({"a": 1}),
        container(f'{{"a": {json.dumps(entry(0, 8))}, "a": {json.dumps(entry(8, 16))}}}'.encode(), bytes(16)),
    ],
)
def test_a_malformed_safetensors_file_is_refused(small_model, content):
    (small_model / SINGLE).write_bytes(content)
    refused(small_model, r"model\.safetensors is truncated or damaged")


@pytest.mark.parametrize("kind", ["I64", "F8_E4M3", "BOOL", "F64"])
def test_weights_of_a_type_that_is_no_weight_are_refused(small_model, kind):
    size = {"I64": 8, "F64": 8}.get(kind, 1)
    tensors = weights()
    rest = {name: values for name, values in tensors.items() if name != EMBEDDING}
    whole = save(rest)
    length = int.from_bytes(whole[:8], "little")
    header, data = json.loads(whole[8 : 8 + length]), whole[8 + length :]
    header[EMBEDDING] = entry(len(data), len(data) + 128 * size, (16, 8), kind)
    (small_model / SINGLE).write_bytes(container(header, data + bytes(128 * size)))
    refused(small_model, rf"tensor {EMBEDDING} has type {kind}; supported are F32, F16, BF16")


def shard(small_model, **placed):
    """Replace the model by two shards; returns the index for tests to spoil."""
    tensors = load_file(small_model / SINGLE)
    names = sorted(tensors)
    index = {name: f"model-{1 + at % 2}.safetensors" for at, name in enumerate(names)}
    for file in set(index.values()):
        save_file({name: tensors[name] for name in names if index[name] == file}, small_model / file)
    (small_model / SINGLE).unlink()
    (small_model / INDEX).write_text(json.dumps({"weight_map": {**index, **placed}}))
    return index


@pytest.mark.parametrize(
    "name",
    ["../model.safetensors", "/etc/passwd", "a/../b.safetensors", "..", "", "a.safetensors/", "x.bin", 5, None, ["a"]],
)
def test_an_index_names_only_files_beside_it(small_model, name):
    shard(small_model, **{EMBEDDING: name})
    refused(small_model, r"index\.json names .*, which is not a \.safetensors file beside it")


def test_an_index_and_its_shards_agree(small_model):
    index = shard(small_model, more="model-1.safetensors")
    refused(small_model, "lists tensor more, which is in none of its files")
    (small_model / INDEX).write_text(json.dumps({"weight_map": {**index, EMBEDDING: "model-3.safetensors"}}))
    refused(small_model, r"model-3\.safetensors is missing", FileNotFoundError)
    (small_model / "model-3.safetensors").write_bytes((small_model / "model-1.safetensors").read_bytes())
    (small_model / INDEX).write_text(json.dumps({"weight_map": {**index, EMBEDDING: "model-3.safetensors"}}))
    refused(small_model, r"model-3\.safetensors holds tensor .* once more; another shard has it already")
    for wrong in ({}, [], "x", None):
        (small_model / INDEX).write_text(json.dumps({"weight_map": wrong}))
        refused(small_model, "has no weight_map")


@pytest.mark.parametrize("name", ["config.json", SINGLE, "tokenizer.json", "tokenizer_config.json"])
def test_a_link_that_leaves_the_directory_is_refused(small_model, tmp_path, name):
    (tmp_path / "elsewhere").write_bytes((small_model / name).read_bytes())
    (small_model / name).unlink()
    (small_model / name).symlink_to("../elsewhere")
    refused(small_model, "is a link that leaves its directory")


def test_a_link_within_the_directory_and_the_cache_of_the_hub_load(small_model, tmp_path):
    plain = load_base(small_model)
    (small_model / SINGLE).rename(small_model / "weights")
    (small_model / SINGLE).symlink_to("weights")
    assert load_base(small_model).fingerprint == plain.fingerprint

    blobs, snapshot = tmp_path / "models--a--b" / "blobs", tmp_path / "models--a--b" / "snapshots" / "abc"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, path in enumerate(small_model.iterdir()):
        if not path.is_symlink():
            (blobs / str(number)).write_bytes(path.read_bytes())
            name = SINGLE if path.name == "weights" else path.name
            (snapshot / name).symlink_to(f"../../blobs/{number}")
    assert load_base(snapshot).fingerprint == plain.fingerprint
    (tmp_path / "link").symlink_to(snapshot)
    assert load_base(tmp_path / "link").fingerprint == plain.fingerprint
    (snapshot / SINGLE).unlink()
    (snapshot / SINGLE).symlink_to("../../secret")
    (tmp_path / "models--a--b" / "secret").write_bytes(save(weights()))
    refused(snapshot, "is a link that leaves its directory")


def test_what_is_no_regular_file_is_not_opened(small_model):
    """Reading a pipe would wait, and reading a device would not end."""
    (small_model / SINGLE).unlink()
    os.mkfifo(small_model / SINGLE)
    refused(small_model, "has neither", FileNotFoundError)
    (small_model / "config.json").unlink()
    (small_model / "config.json").symlink_to("/dev/zero")
    refused(small_model, r"has no config\.json", FileNotFoundError)
    with pytest.raises(ValueError, match="is not a file of this directory"):
        file_in(small_model, "../x")


def test_of_a_gemma3_with_images_the_text_model_is_read(tmp_path):
    import torch
    import transformers

    text = {**reference_models.SIZES, **reference_models.MODELS["gemma3"][1], "final_logit_softcapping": None}
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"image_size": 28, "patch_size": 14}
    config = transformers.Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    theirs = transformers.Gemma3ForConditionalGeneration._from_config(config, attn_implementation="eager").eval()
    theirs.save_pretrained(tmp_path)
    base = load_base(tmp_path)
    tokens = np.random.default_rng(0).integers(3, 90, (1, 20))
    with torch.no_grad():
        expected = theirs(input_ids=torch.from_numpy(tokens)).logits.numpy()
    np.testing.assert_allclose(forward(base.model, tokens.astype(np.int32)), expected, atol=2e-5)


def test_gpt_oss_with_mxfp4_experts_gives_the_logits_of_transformers(tmp_path, monkeypatch):
    """A directory as it is published: experts in blocks, everything else in a float type. All are read once."""
    import torch
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    theirs = reference_models.save_model("gpt_oss of even blocks", tmp_path)
    path = tmp_path / "model.safetensors"
    tensors, rng = load_file(path), np.random.default_rng(0)
    for name in [name for name in tensors if name.endswith("_proj") and ".experts." in name]:
        experts, inputs, outputs = tensors.pop(name).shape
        blocks = rng.integers(0, 256, (experts, outputs, inputs // 32, 16), np.uint8)
        scales = rng.integers(121, 125, (experts, outputs, inputs // 32), np.uint8)
        tensors |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        unpacked = convert_moe_packed_tensors(*map(torch.from_numpy, (blocks, scales)), dtype=torch.float32)
        theirs.get_parameter(name).data = unpacked
    save_file(tensors, path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    seen, read = [], huggingface._read_rows
    monkeypatch.setattr(huggingface, "_read_rows", lambda *where: seen.append(where) or read(*where))
    base = load_base(tmp_path)
    counts = Counter(where for where in seen if ".layers.0.mlp.experts." in where[1])
    assert set(counts.values()) == {1} and len(counts) == 6 * base.config.experts  # blocks, scales and biases of two
    tokens = rng.integers(3, 96, (2, 24), dtype=np.int32)
    wanted = reference_models.logits(theirs, tokens)
    np.testing.assert_allclose(jax.jit(forward)(base.model, tokens), wanted, atol=5e-5 * np.abs(wanted).max())
