"""Files and texts of strangers: whatever is wrong with them is an error that names the file, before memory is taken."""

import base64
import gc
import json
import os
import pickle
import re
import struct
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import gguf
import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save, save_file

from benchmarks.fuzz_targets import CONFIG, tokenizer_file, weights, write_gguf, write_model
from butler_jax.data.batches import parse_spec
from butler_jax.data.sources.prepared import open_prepared_set
from butler_jax.data.sources.text import read_passages
from butler_jax.evaluation.cells import Kept
from butler_jax.evaluation.config import EvalConfig
from butler_jax.evaluation.tasks.local_tasks import read_samples
from butler_jax.parallel.config import parse_hosts
from butler_jax.parallel.mesh import parse_mesh
from butler_jax.predictors.config import PredictorConfig
from butler_jax.runs.directory import run_config
from butler_jax.storage.files import file_in
from butler_jax.storage.json_objects import parse_object, read_lines, read_object
from butler_jax.storage.settings import from_dict, to_dict
from butler_jax.text.prompts import encode
from butler_jax.text.tokenizer import Tokenizer
from butler_jax.training.config import TrainConfig
from butler_jax.training.loop import check_run
from butler_jax.weights import load_base
from butler_jax.weights.gguf.header import MOST_VALUES
from butler_jax.weights.huggingface import INDEX, SINGLE
from butler_jax.weights.placing import check_memory

REPOSITORY = Path(__file__).parent.parent.parent
EMBEDDING = "model.embed_tokens.weight"


@pytest.fixture
def directory(tmp_path):
    """A valid model of one layer with its tokenizer; tests damage it."""
    return write_model(tmp_path / "model")


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


# --- safetensors ----------------------------------------------------------------------------------


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
)  # fmt: skip
def test_a_malformed_safetensors_file_is_refused(directory, content):
    (directory / SINGLE).write_bytes(content)
    refused(directory, r"model\.safetensors is truncated or damaged")


@pytest.mark.parametrize("kind", ["I64", "F8_E4M3", "BOOL", "F64"])
def test_weights_of_a_type_that_is_no_weight_are_refused(directory, kind):
    size = {"I64": 8, "F64": 8}.get(kind, 1)
    tensors = weights()
    rest = {name: values for name, values in tensors.items() if name != EMBEDDING}
    whole = save(rest)
    length = int.from_bytes(whole[:8], "little")
    header, data = json.loads(whole[8 : 8 + length]), whole[8 + length :]
    header[EMBEDDING] = entry(len(data), len(data) + 128 * size, (16, 8), kind)
    (directory / SINGLE).write_bytes(container(header, data + bytes(128 * size)))
    refused(directory, rf"tensor {EMBEDDING} has type {kind}; supported are F32, F16, BF16")


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", [EMBEDDING, "model.layers.0.mlp.down_proj.weight", "model.norm.weight"])
def test_a_weight_that_is_not_finite_is_named_and_nothing_stays(directory, name, bad, dtype):
    tensors = weights(dtype)
    tensors[name].flat[-1] = bad
    save_file(tensors, directory / SINGLE)
    gc.collect()
    alive = len(jax.live_arrays())
    refused(directory, rf"tensor {re.escape(name)} has values that are not finite")
    gc.collect()  # the error's traceback held what was being filled
    assert len(jax.live_arrays()) == alive


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("name", [EMBEDDING, "model.layers.0.mlp.down_proj.weight", "model.norm.weight"])
def test_a_weight_beyond_the_type_it_is_cast_to_is_named(directory, name, sign):
    """3.4e38 is a float32 and rounds to no finite bfloat16; the largest bfloat16 stays what it is."""
    tensors = weights()
    tensors[name].flat[-1] = sign * float(ml_dtypes.finfo(ml_dtypes.bfloat16).max)
    save_file(tensors, directory / SINGLE)
    model = load_base(directory, dtype=ml_dtypes.bfloat16).model
    assert all(np.isfinite(np.asarray(leaf)).all() for leaf in jax.tree.leaves(model))
    tensors[name].flat[-1] = sign * 3.4e38
    save_file(tensors, directory / SINGLE)
    load_base(directory, dtype=np.float32)
    with pytest.raises(ValueError, match=rf"{re.escape(name)} has values beyond 3\.39e\+38, the largest of bfloat16"):
        load_base(directory, dtype=ml_dtypes.bfloat16)


class Device:
    """A device of a platform that says how much memory it has, or that says nothing."""

    def __init__(self, platform, stats=None):
        self.platform, self.memory_stats = platform, lambda: stats

    def __str__(self):
        return "TPU_3"


def test_a_model_larger_than_memory_is_refused_by_arithmetic(monkeypatch):
    monkeypatch.setattr(os, "sysconf", {"SC_PHYS_PAGES": 1000, "SC_PAGE_SIZE": 4096}.get)
    check_memory({Device("cpu"): 4_096_000}, "m")
    with pytest.raises(ValueError, match=r"m needs 0\.1 GB for its weights, and this machine has 0\.0 GB"):
        check_memory({Device("cpu"): 100_000_000}, "m")
    with pytest.raises(ValueError, match=r"0\.6 GB for its weights \(0\.3 GB on each of 2 devices\), and this machine"):
        check_memory({Device("cpu"): 300_000_000, Device("cpu"): 300_000_000}, "m")
    small, large = (Device("tpu", {"bytes_limit": size}) for size in (16 * 10**9, 95 * 10**9))
    check_memory({small: 16 * 10**9, large: 95 * 10**9, Device("tpu"): 10**15, Device("gpu", {}): 10**15}, "m")
    with pytest.raises(ValueError, match=r"m needs 35\.0 GB .* on TPU_3, which has 16\.0 GB: split .* more devices"):
        check_memory({large: 35 * 10**9, small: 35 * 10**9}, "m")


def test_a_model_larger_than_memory_is_refused_on_simulated_devices_before_it_is_placed(directory):
    """2e9 embeddings of 8 float32: 64 GB that the file only claims, on two devices of a machine of 25 GB."""
    change_config(directory, vocab_size=2 * 10**9)
    header, at = {}, 0
    for name, values in weights().items():
        shape = (2 * 10**9, 8) if values.shape == weights()[EMBEDDING].shape else values.shape
        header[name], at = entry(at, at + 4 * int(np.prod(shape)), shape), at + 4 * int(np.prod(shape))
    raw = container(header)
    (directory / SINGLE).write_bytes(raw)
    os.truncate(directory / SINGLE, len(raw) + at)
    code = f"""
        import os, jax
        from butler_jax.parallel.mesh import make_mesh, shardings_for
        from butler_jax.weights import load_base, placing
        os.sysconf = {{"SC_PHYS_PAGES": 25 * 10**9 // 4096, "SC_PAGE_SIZE": 4096}}.get
        placing.Slot = None
        try:
            load_base({str(directory)!r}, shardings=shardings_for(make_mesh("data=2")))
        except ValueError as error:
            print(error)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], cwd=REPOSITORY, capture_output=True, text=True,
        env={**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=2"},
    )  # fmt: skip
    said = f"{directory} needs 64.0 GB for its weights (32.0 GB on each of 2 devices), and this machine has 25.0 GB: "
    assert done.stdout.startswith(said), done.stderr


# --- directories ----------------------------------------------------------------------------------


def shard(directory, **placed):
    """Replace the model by two shards; returns the index for tests to spoil."""
    tensors = load_file(directory / SINGLE)
    names = sorted(tensors)
    index = {name: f"model-{1 + at % 2}.safetensors" for at, name in enumerate(names)}
    for file in set(index.values()):
        save_file({name: tensors[name] for name in names if index[name] == file}, directory / file)
    (directory / SINGLE).unlink()
    (directory / INDEX).write_text(json.dumps({"weight_map": {**index, **placed}}))
    return index


@pytest.mark.parametrize(
    "name", ["../model.safetensors", "/etc/passwd", "a/../b.safetensors", "..", "", "a.safetensors/", "x.bin", 5, None,
             ["a"]]
)  # fmt: skip
def test_an_index_names_only_files_beside_it(directory, name):
    shard(directory, **{EMBEDDING: name})
    refused(directory, r"index\.json names .*, which is not a \.safetensors file beside it")


def test_an_index_and_its_shards_agree(directory):
    index = shard(directory, more="model-1.safetensors")
    refused(directory, "lists tensor more, which is in none of its files")
    (directory / INDEX).write_text(json.dumps({"weight_map": {**index, EMBEDDING: "model-3.safetensors"}}))
    refused(directory, r"model-3\.safetensors is missing", FileNotFoundError)
    (directory / "model-3.safetensors").write_bytes((directory / "model-1.safetensors").read_bytes())
    (directory / INDEX).write_text(json.dumps({"weight_map": {**index, EMBEDDING: "model-3.safetensors"}}))
    refused(directory, r"model-3\.safetensors holds tensor .* once more; another shard has it already")
    for wrong in ({}, [], "x", None):
        (directory / INDEX).write_text(json.dumps({"weight_map": wrong}))
        refused(directory, "has no weight_map")


@pytest.mark.parametrize("name", ["config.json", SINGLE, "tokenizer.json", "tokenizer_config.json"])
def test_a_link_that_leaves_the_directory_is_refused(directory, tmp_path, name):
    (tmp_path / "elsewhere").write_bytes((directory / name).read_bytes())
    (directory / name).unlink()
    (directory / name).symlink_to("../elsewhere")
    refused(directory, "is a link that leaves its directory")


def test_a_link_within_the_directory_and_the_cache_of_the_hub_load(directory, tmp_path):
    plain = load_base(directory)
    (directory / SINGLE).rename(directory / "weights")
    (directory / SINGLE).symlink_to("weights")
    assert load_base(directory).fingerprint == plain.fingerprint

    blobs, snapshot = tmp_path / "models--a--b" / "blobs", tmp_path / "models--a--b" / "snapshots" / "abc"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, path in enumerate(directory.iterdir()):
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


def test_what_is_no_regular_file_is_not_opened(directory):
    """A pipe would be waited for, a device read for ever."""
    (directory / SINGLE).unlink()
    os.mkfifo(directory / SINGLE)
    refused(directory, "has neither", FileNotFoundError)
    (directory / "config.json").unlink()
    (directory / "config.json").symlink_to("/dev/zero")
    refused(directory, r"has no config\.json", FileNotFoundError)
    with pytest.raises(ValueError, match="is not a file of this directory"):
        file_in(directory, "../x")


class Touches:
    """Its pickle writes a file when it is loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_nothing_of_a_model_directory_is_executed(directory, tmp_path):
    marker = tmp_path / "executed"
    code = f"import os\nos.mkdir({str(marker)!r})\n"
    for name in ("modeling_x.py", "tokenization_x.py", "configuration_x.py", "__init__.py", "sitecustomize.py"):
        (directory / name).write_text(code)
    for name in ("pytorch_model.bin", "model.pt", "training_args.bin", "model.pkl"):
        (directory / name).write_bytes(pickle.dumps(Touches(str(marker))))
    own = {
        "AutoConfig": "configuration_x.C",
        "AutoModel": "modeling_x.M",
        "AutoTokenizer": ["tokenization_x.T", None],
    }
    change_config(
        directory, auto_map=own, architectures=["modeling_x.M"], custom_pipelines={"x": {"impl": "modeling_x.M"}}
    )
    template = "{{ cycler.__init__.__globals__.os.mkdir('" + str(marker) + "') }}"
    values = {"bos_token": "<s>", "auto_map": own, "tokenizer_class": "T", "chat_template": template}
    (directory / "tokenizer_config.json").write_text(json.dumps(values))
    (directory / "chat_template.jinja").write_text(template)
    base = load_base(directory)
    base.tokenizer.decode(encode(base, "abc")[0])
    assert not marker.exists()
    loaded = [getattr(m, "__file__", None) or "" for m in list(sys.modules.values())]
    assert not [file for file in loaded if file.startswith(str(directory))]
    for name in (SINGLE, "config.json"):  # nor where there is nothing else to read
        (directory / name).unlink(missing_ok=True)
        refused(directory, "has neither .* which is a pickle|has no config", FileNotFoundError)
    assert not marker.exists()


# --- GGUF -----------------------------------------------------------------------------------------


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
        (gguf_file(tensors=gguf_tensor("a", 4) + gguf_tensor("b", 4, offset=8) + bytes(99), tensor_count=2),
         "'a' and 'b' overlap"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
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


# --- memory ---------------------------------------------------------------------------------------


def test_bombs_are_refused_before_memory_is_taken(directory, tmp_path):
    """Peak resident memory of one process over all of them: what a header promises must never be set aside."""
    bombs = {}

    def bomb(name, file, content):
        made = write_model(tmp_path / name)
        (made / file).write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
        bombs[name] = str(made)

    rows = 10**10
    bomb("header", SINGLE, struct.pack("<Q", 2**40) + b"{}")
    bomb("rows", SINGLE, container({EMBEDDING: entry(0, rows * 32, (rows, 8))}))
    for key in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"):
        bomb(key, "config.json", {**CONFIG, key: rows})
        bomb(f"{key}, below its limit", "config.json", {**CONFIG, key: 4000 if "layers" in key else 1 << 13})
    bomb(
        "window",
        "config.json",
        {**CONFIG, "model_type": "qwen2", "use_sliding_window": True, "num_hidden_layers": rows},
    )
    step = {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 1000}
    normalizer = {"type": "Sequence", "normalizers": [step] * 4}
    bomb("replacements", "tokenizer.json", {**tokenizer_file(), "normalizer": normalizer})
    bomb("brackets", "config.json", b"[" + b"[]," * (30 << 20) + b"[]]")
    for name, content in {
        "values": gguf_file(array(0, 3 << 20, bytes(3 << 20))),
        "length": gguf_file(array(8, 2**40)),
        "tensor": gguf_file(tensors=gguf_tensor("token_embd.weight", 8, rows), tensor_count=1),
    }.items():
        (tmp_path / f"{name}.gguf").write_bytes(content)
        bombs[name] = str(tmp_path / f"{name}.gguf")
    code = f"""
        import json
        from pathlib import Path
        from butler_jax.weights import load_base

        def resident(key):
            line = next(l for l in Path("/proc/self/status").read_text().splitlines() if l.startswith(key))
            return int(line.split()[1]) * 1024

        load_base({str(directory)!r})
        try:
            load_base({str(tmp_path / "values.gguf")!r})  # imports gguf
        except ValueError:
            pass
        grown = {{}}
        for name, path in json.loads({json.dumps(bombs)!r}).items():
            Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
            before = resident("VmRSS")
            try:
                load_base(path)
                grown[name] = "was loaded"
            except ValueError as error:
                grown[name] = resident("VmHWM") - before
        print(json.dumps(grown))
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], cwd=REPOSITORY, capture_output=True, text=True,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    grown = json.loads(done.stdout)
    assert len(grown) == len(bombs)
    assert not {name: size for name, size in grown.items() if type(size) is not int or size > 16 << 20}, grown


# --- config.json ----------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", ["8", 8.0, float("nan"), float("inf"), -8, 0, True, [8], {"a": 8}, 10**10, 10**400])
@pytest.mark.parametrize(
    "key", ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
            "max_position_embeddings"]
)  # fmt: skip
def test_sizes_that_are_no_sizes_are_named(directory, key, bad):
    if key == "max_position_embeddings" and bad == 0:
        return  # silent: 2048
    change_config(directory, **{key: bad})
    refused(directory, r"config\.json: .*(must be|positive)")


@pytest.mark.parametrize(
    "values",
    [
        {"model_type": ["llama"]},
        {"model_type": None},
        {"rms_norm_eps": "small"},
        {"rms_norm_eps": float("nan")},
        {"rope_theta": {"a": 1}},
        {"rope_scaling": 7},
        {"rope_scaling": {"rope_type": ["linear"]}},
        {"rope_scaling": {"rope_type": "linear", "factor": 0}},
        {"rope_scaling": {"rope_type": "linear", "factor": 10**400}},
        {"rope_scaling": {"rope_type": "llama3", "low_freq_factor": 2, "high_freq_factor": 2}},
        {"rope_scaling": {"rope_type": "yarn", "beta_fast": 0}},
        {"rope_scaling": {"rope_type": "longrope", "short_factor": 3, "long_factor": [1.0]}},
        {"rope_scaling": {"rope_type": "longrope", "short_factor": [None, 1.0], "long_factor": [1.0, 1.0]}},
        {"partial_rotary_factor": 1e-9},
        {"hidden_act": ["silu"]},
        {"model_type": "qwen3", "use_sliding_window": True, "layer_types": 5},
        {"model_type": "qwen3", "use_sliding_window": True, "max_window_layers": "all"},
        {"model_type": "mistral", "sliding_window": "wide"},
    ],
)
def test_settings_of_wrong_types_are_named(directory, values):
    change_config(directory, **values)
    refused(directory, r"config\.json: ")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"[" * 200_000, "nested too deeply"),
        (b'{"a":' * 200_000, "nested too deeply"),
        (b"\xff\xfe{}", "not valid JSON"),
        (b'{"vocab_size": ' + b"9" * 10_000 + b"}", "not valid JSON"),
        (b"[]", "must hold a JSON object"),
        (b'{"model_type": "\\ud800"}', "half a character"),
        (b"", "not valid JSON"),
        (b" " * (33 << 20), "nothing of its kind has more"),
    ],
)
@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json"])
def test_json_that_is_none_is_named(directory, name, content, said):
    (directory / name).write_bytes(content)
    refused(directory, rf"{re.escape(name)}.*{said}")


# --- tokenizers -----------------------------------------------------------------------------------


def change_tokenizer(directory, **values):
    (directory / "tokenizer.json").write_text(json.dumps({**tokenizer_file(), **values}))


def test_a_panic_of_the_tokenizers_library_is_an_error(directory):
    """Rust's panics derive from BaseException: `except Exception` would let them through."""
    change_tokenizer(directory, normalizer={"type": "Precompiled", "precompiled_charsmap": "AAAA"})
    refused(directory, r"tokenizer\.json is not a tokenizer\.json")


@pytest.mark.parametrize(
    "content", [b"{}", b'{"model": 5}', b"\x80", b'{"a":' * 100_000, b'{"version": "9.0", "model": {}}']
)
def test_a_broken_tokenizer_is_named(directory, content):
    (directory / "tokenizer.json").write_bytes(content)
    refused(directory, r"tokenizer\.json")


def test_ids_beyond_the_embedding_are_refused(directory):
    model = tokenizer_file()["model"]
    change_tokenizer(directory, model={**model, "vocab": {**model["vocab"], "f": 16}})
    refused(directory, "its tokenizer has the id 16, but the model has 16 embeddings")
    change_tokenizer(directory)
    (directory / "tokenizer_config.json").write_text("{}")
    for bad, said in (
        (16, "has the id 16"),
        (-1, "bos_token_id must be"),
        (1e400, "must be"),
        ("<s>", "must be"),
        (True, "must be"),
    ):
        change_config(directory, bos_token_id=bad)
        refused(directory, said)


@pytest.mark.parametrize("token", [5, ["<s>"], {"content": 5}, "<nowhere>", {"content": {}}])
def test_borders_that_are_no_tokens_are_named(directory, token):
    (directory / "tokenizer_config.json").write_text(json.dumps({"bos_token": token}))
    with pytest.raises(ValueError, match="bos_token"):
        Tokenizer.load(directory)


def test_whether_a_text_starts_with_the_first_token_is_true_or_false(directory):
    (directory / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "add_bos_token": "no"}))
    refused(directory, "add_bos_token must be true or false, got 'no'")


PADDING = {
    "strategy": {"Fixed": 10**12}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0, "pad_type_id": 0,
    "pad_token": "<s>",
}  # fmt: skip


def test_padding_that_a_tokenizer_asks_for_is_never_done(directory):
    change_tokenizer(directory, padding=PADDING)
    (directory / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>"}))  # add_bos is found by a probe
    assert len(Tokenizer.load(directory).encode("ab")) == 1


def test_replacements_that_blow_a_text_up_are_refused(directory):
    step = {"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}
    change_tokenizer(directory, normalizer={"type": "Sequence", "normalizers": [step] * 40})
    refused(directory, "its replacements make a text over 4096 times longer")
    change_tokenizer(directory, normalizer={"type": "Sequence", "normalizers": [step] * 3})
    assert load_base(directory).tokenizer.encode("a", bos=False) == [1] * 8


def test_a_table_of_characters_that_claims_gigabytes_is_refused(directory):
    table = base64.b64encode((2**33 - 8 & 0xFFFFFFFF).to_bytes(4, "little") + b"12345678").decode()
    change_tokenizer(directory, normalizer={"type": "Precompiled", "precompiled_charsmap": table})
    refused(directory, "its precompiled_charsmap of 12 bytes claims 4294967288")


def test_patterns_that_match_nothing_count_as_growth(directory):
    step = {"type": "Replace", "pattern": {"Regex": ""}, "content": "a"}
    change_tokenizer(directory, normalizer={"type": "Sequence", "normalizers": [step] * 40})
    refused(directory, "its replacements make a text over 4096 times longer")


def test_names_of_prepared_sets_bring_in_no_foreign_code():
    for name in ("someone:their_set", "huggingface:x/y", "../x", "a/../b", ""):
        with pytest.raises(ValueError, match="is no name of a TFDS set; write NAME"):
            open_prepared_set(name, "train")


def test_the_home_of_nobody_is_no_traceback():
    with pytest.raises(FileNotFoundError):
        load_base("~nobody-of-that-name/model")


def test_a_pattern_that_never_ends_is_ended_by_its_library(directory):
    split = {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False}
    change_tokenizer(directory, pre_tokenizer=split)
    tokenizer = Tokenizer.load(directory)
    with pytest.raises(ValueError, match=r"the tokenizer failed on this text: .*retry-limit"):
        tokenizer.encode("a" * 200 + "b")


# --- prompts --------------------------------------------------------------------------------------


def test_prompts_of_any_kind_are_tokens_or_an_error(directory):
    base = load_base("tiny")
    end = base.tokenizer.eos
    assert encode(base, "a\0b")[0] and base.tokenizer.decode(encode(base, "a\0b")[0]) == "a\0b"
    assert end in encode(base, "a<|endoftext|>b")[0]  # what spells a special token is that token
    assert encode(base, "") == [[base.tokenizer.bos]]
    for half in ("\ud800", "a\udfffb", "\udce9"):  # the last is what a Latin-1 argument becomes
        with pytest.raises(ValueError, match="half a character at"):
            encode(base, half)
    for wrong in ([[]], [], [[10**30]], [[-1]], [None], [[1.5]], 5, [["a"]], {"a": 1}, [object()]):
        with pytest.raises(ValueError, match="prompt"):
            encode(base, wrong)


def test_a_prompt_outside_the_vocabulary_of_the_tokenizer_is_an_error(directory):
    model = tokenizer_file()["model"]
    change_tokenizer(directory, model={**model, "unk_token": "<nowhere>"})
    with pytest.raises(ValueError, match="the tokenizer failed on this text"):
        load_base(directory).tokenizer.encode("xyz")


# --- lines, cells, runs ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "line",
    [
        b"\xff", b"[" * 200_000, b"NaN", b"\0", b"\xef\xbb\xbf{}", b'{"context": NaN, "continuation": "b"}',
        b'{"context": ["a"], "continuation": "b"}', b'{"context": "\\ud800", "continuation": "b"}',
        b'{"context": "a", "continuation": 1e400}',
    ],
)  # fmt: skip
def test_a_line_that_is_no_sample_is_named_with_its_number(tmp_path, line):
    (tmp_path / "lambada_openai.jsonl").write_bytes(b'{"context": "a", "continuation": "b"}\n\n' + line + b"\n")
    with pytest.raises(ValueError, match=r"lambada_openai\.jsonl, line 3") as caught:
        read_samples(tmp_path, "lambada")
    assert len(str(caught.value)) < 1000
    path = tmp_path / "text.jsonl"
    path.write_bytes(b'{"text": "a"}\n' + line + b"\n")
    with pytest.raises(ValueError, match=r"text\.jsonl.*line 2"):
        list(read_passages(path))


def test_a_giant_line_is_refused_without_being_read(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"{}\n" + b"a" * 1000)
    with pytest.raises(ValueError, match="line 2: more than 100 bytes"):
        list(read_lines(path, longest=100))


def test_damaged_cells_are_measured_anew_and_whole_ones_kept(tmp_path):
    estimate = [1.5, None, 3, 2]
    finding = {"metric": "m", "estimate": estimate, "budget": 0.5, "attended": 0.5, "where": {}}
    good = {"key": "good", "findings": [finding], "arrays": {}, "seconds": 1.0}
    bad = [
        {**good, "findings": []}, {**good, "findings": [5]}, {**good, "seconds": "1"}, {**good, "seconds": 10**400},
        {**good, "arrays": []},
        {**good, "key": 5}, {**good, "findings": [{**finding, "estimate": "abc"}]},
        {**good, "findings": [{**finding, "estimate": ["1", None, 3, 2]}]},
        {**good, "findings": [{**finding, "estimate": estimate[:3]}]},
        {**good, "findings": [{**finding, "more": 1}]}, {**good, "findings": [{**finding, "metric": None}]},
    ]  # fmt: skip
    lines = [json.dumps({**one, "key": "bad"} if one["key"] != 5 else one).encode() for one in bad]
    lines += [b"\xff\xfe", b"[" * 200_000, b"null", b'{"key": "bad"', json.dumps(good).encode()]
    (tmp_path / "cells.jsonl").write_bytes(b"\n".join(lines))
    assert list(Kept(tmp_path).cells) == ["good"]


def test_a_run_of_a_stranger_is_checked(tmp_path):
    path = tmp_path / "config.json"
    for content in ('{"base": 5}', '{"base": ["tiny"]}', '{"base": "tiny", "data": 5}', "[" * 100_000, "[]"):
        path.write_text(content)
        with pytest.raises(ValueError, match=r"config\.json"):
            run_config(tmp_path)
    path.write_text("[]")
    with pytest.raises(ValueError, match=r"config\.json must hold .*; remove it"):
        check_run(tmp_path, TrainConfig())
    path.write_text('{"base": ' + "[" * 900 + "]" * 900 + "}")
    with pytest.raises(ValueError, match=r"other settings .*base: \[\[.* there, 'tiny' now"):
        check_run(tmp_path, TrainConfig())
    for kind in (sparse, os.mkfifo, os.mkdir, lambda path: path.symlink_to("/dev/zero")):
        path.rmdir() if path.is_dir() else path.unlink()
        kind(path)
        with pytest.raises((ValueError, FileNotFoundError), match=rf"{tmp_path}.* (bytes|no config\.json)"):
            run_config(tmp_path)
        with pytest.raises(ValueError, match=r"config\.json (has \d+ bytes|is no regular file).*; remove it"):
            check_run(tmp_path, TrainConfig())
        with pytest.raises(ValueError, match=r"config\.json(, line 1: more than| is no regular file; move it away)"):
            next(read_lines(path))


def sparse(path):
    """10 GB that take no room."""
    path.touch()
    os.truncate(path, 10 << 30)


@pytest.mark.parametrize("kind", [TrainConfig, EvalConfig, PredictorConfig])
def test_settings_from_a_file_have_the_types_of_their_fields(kind):
    whole = json.loads(json.dumps(to_dict(kind())))
    assert from_dict(kind, whole) == kind()
    for name in whole:
        with pytest.raises(ValueError, match=f"{kind.__name__}: {name} cannot be"):
            from_dict(kind, {**whole, name: {"a": [1]}})
    with pytest.raises(ValueError, match="has no 'more'"):
        from_dict(kind, {**whole, "more": 1})
    with pytest.raises(ValueError, match="is made from a JSON object"):
        from_dict(kind, [whole])


def test_texts_of_the_command_line_are_read_or_refused():
    for text in ("data=" + "9" * 5000, "data=0", "data", "a=1", "data=-1", "data=\u00b2"):
        with pytest.raises(ValueError, match="mesh"):
            parse_mesh(text)
    assert parse_hosts("a.b:12,4,3") == ("a.b:12", 4, 3)
    for text in ("a:1,2,2", "a,1,0", "a:1,1", "a:123456,1,0", "a:1,9999999999,0"):
        with pytest.raises(ValueError, match="--distributed"):
            parse_hosts(text)
    for text in ("python_docs:0", "python_docs:" + "9" * 400, "text:", "x:1"):
        with pytest.raises(ValueError, match="data"):
            parse_spec(text)


def test_a_long_data_specification_takes_no_time():
    """Digits that end in a letter had as many splits as pairs of digits."""
    began = time.process_time()
    parse_spec("text:" + ":9" * 3 + "9" * 50_000 + "x")
    assert time.process_time() - began < 1.0  # seconds; before, some 20


def test_objects_are_read_whole_or_not(tmp_path):
    assert parse_object(b'{"a": "\\ud83d\\ude00"}', "x") == {"a": "\U0001f600"}
    path = tmp_path / "a.json"
    path.write_text('{"a": 1}')
    assert read_object(path) == {"a": 1}
    with pytest.raises(ValueError, match="has 8 bytes; nothing of its kind"):
        read_object(path, most=7)
