"""Base models by name: damaged and hostile directories, and fingerprints."""

import json
import os
import pickle
import re
import struct
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from benchmarks.fuzz_targets import CONFIG, tokenizer_file, write_model
from butler_jax.model.decoder import BaseModel, forward
from butler_jax.model.hugging_face_config import base_config
from butler_jax.text import encode
from butler_jax.weights import fingerprint, is_spec_of, load_base, loading
from butler_jax.weights.huggingface import SINGLE
from tests.weights.hostile import (
    EMBEDDING,
    REPOSITORY,
    array,
    change_config,
    change_tokenizer,
    container,
    entry,
    gguf_file,
    gguf_tensor,
    refused,
)
from tests.weights.llama_files import LLAMA, llama_tensors


class Touches:
    """Its pickle writes a file when it is loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_nothing_of_a_model_directory_is_executed(small_model, tmp_path):
    marker = tmp_path / "executed"
    code = f"import os\nos.mkdir({str(marker)!r})\n"
    for name in ("modeling_x.py", "tokenization_x.py", "configuration_x.py", "__init__.py", "sitecustomize.py"):
        (small_model / name).write_text(code)
    for name in ("pytorch_model.bin", "model.pt", "training_args.bin", "model.pkl"):
        (small_model / name).write_bytes(pickle.dumps(Touches(str(marker))))
    own = {
        "AutoConfig": "configuration_x.C",
        "AutoModel": "modeling_x.M",
        "AutoTokenizer": ["tokenization_x.T", None],
    }
    change_config(
        small_model, auto_map=own, architectures=["modeling_x.M"], custom_pipelines={"x": {"impl": "modeling_x.M"}}
    )
    template = "{{ cycler.__init__.__globals__.os.mkdir('" + str(marker) + "') }}"
    values = {"bos_token": "<s>", "auto_map": own, "tokenizer_class": "T", "chat_template": template}
    (small_model / "tokenizer_config.json").write_text(json.dumps(values))
    (small_model / "chat_template.jinja").write_text(template)
    base = load_base(small_model)
    base.tokenizer.decode(encode(base.tokenizer, base.config.vocab_size, "abc")[0])
    assert not marker.exists()
    loaded = [getattr(m, "__file__", None) or "" for m in list(sys.modules.values())]
    assert not [file for file in loaded if file.startswith(str(small_model))]
    for name in (SINGLE, "config.json"):  # nor where there is nothing else to read
        (small_model / name).unlink(missing_ok=True)
        refused(small_model, "has neither .* which is a pickle|has no config", FileNotFoundError)
    assert not marker.exists()


def test_bombs_are_refused_before_memory_is_taken(small_model, tmp_path):
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

        load_base({str(small_model)!r})
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
        [sys.executable, "-c", textwrap.dedent(code)],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
    )
    assert done.returncode == 0, done.stderr
    grown = json.loads(done.stdout)
    assert len(grown) == len(bombs)
    assert not {name: size for name, size in grown.items() if type(size) is not int or size > 16 << 20}, grown


@pytest.mark.parametrize("bad", ["8", 8.0, float("nan"), float("inf"), -8, 0, True, [8], {"a": 8}, 10**10, 10**400])
@pytest.mark.parametrize(
    "key",
    [
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "max_position_embeddings",
    ],
)
def test_sizes_that_are_no_sizes_are_named(small_model, key, bad):
    if key == "max_position_embeddings" and bad == 0:
        return  # silent: 2048
    change_config(small_model, **{key: bad})
    refused(small_model, r"config\.json: .*(must be|positive)")


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
        {"rope_scaling": {"rope_type": "llama3", "factor": 2, "low_freq_factor": 2, "high_freq_factor": 2}},
        {"rope_scaling": {"rope_type": "yarn", "factor": 2, "beta_fast": 0}},
        {"rope_scaling": {"rope_type": "longrope", "short_factor": 3, "long_factor": [1.0]}},
        {"rope_scaling": {"rope_type": "longrope", "short_factor": [None, 1.0], "long_factor": [1.0, 1.0]}},
        {"partial_rotary_factor": 1e-9},
        {"hidden_act": ["silu"]},
        {"model_type": "qwen3", "use_sliding_window": True, "layer_types": 5},
        {"model_type": "qwen3", "use_sliding_window": True, "max_window_layers": "all"},
        {"model_type": "mistral", "sliding_window": "wide"},
        {"tie_word_embeddings": "false"},
        {"attention_bias": 1},
    ],
)
def test_settings_of_wrong_types_are_named(small_model, values):
    change_config(small_model, **values)
    refused(small_model, r"config\.json: ")


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
def test_json_that_is_none_is_named(small_model, name, content, said):
    (small_model / name).write_bytes(content)
    refused(small_model, rf"{re.escape(name)}.*{said}")


def test_ids_beyond_the_embedding_are_refused(small_model):
    model = tokenizer_file()["model"]
    change_tokenizer(small_model, model={**model, "vocab": {**model["vocab"], "f": 16}})
    refused(small_model, "its tokenizer has the id 16, but the model has 16 embeddings")
    change_tokenizer(small_model)
    (small_model / "tokenizer_config.json").write_text("{}")
    for bad, said in (
        (16, "has the id 16"),
        (-1, "bos_token_id must be"),
        (1e400, "must be"),
        ("<s>", "must be"),
        (True, "must be"),
    ):
        change_config(small_model, bos_token_id=bad)
        refused(small_model, said)


def test_the_home_of_nobody_is_no_traceback():
    with pytest.raises(FileNotFoundError):
        load_base("~nobody-of-that-name/model")


def test_absent_embedded_model_says_how_to_make_it(monkeypatch, tmp_path):
    monkeypatch.setattr(loading, "TINY", tmp_path)
    with pytest.raises(FileNotFoundError, match="make it with `butler-jax pretrain`"):
        load_base("tiny")


@pytest.mark.parametrize("dtype", ["int8", "fp16", "float64", jnp.float8_e4m3fn])
def test_a_precision_of_fewer_bits_is_a_clear_error(directory, dtype):
    with pytest.raises(ValueError, match="dtype must be one of float32, bfloat16, float16, got "):
        load_base(directory, dtype=dtype)


def test_a_base_knows_where_it_was_loaded_from_and_is_shown_in_a_line(directory, monkeypatch):
    base = load_base(directory)
    monkeypatch.chdir(directory.parent)
    assert base.source == str(directory) == load_base(directory.name).source and load_base("tiny").source == "tiny"
    assert is_spec_of(directory.name, base) and is_spec_of(str(directory), base) and not is_spec_of("tiny", base)
    assert repr(base).startswith(f"Base('{directory.name}': ") and len(repr(base)) < 200


def test_fingerprint_ignores_dtype_and_tells_models_apart(directory):
    first = load_base(directory)
    assert first.fingerprint == load_base(directory, dtype=jnp.bfloat16).fingerprint == fingerprint(first.model)
    assert len(first.fingerprint) == 16 and int(first.fingerprint, 16) >= 0

    save_file(llama_tensors(seed=1), directory / "model.safetensors")
    assert load_base(directory).fingerprint != first.fingerprint
    save_file(llama_tensors(), directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps({**LLAMA, "rope_theta": 5e5}))
    assert load_base(directory).fingerprint != first.fingerprint


@pytest.mark.slow
def test_every_parameter_counts_in_the_fingerprint():
    model = BaseModel(base_config(LLAMA), jax.random.key(0))
    leaves, tree = jax.tree.flatten(model)
    seen = {fingerprint(model)}
    for index, leaf in enumerate(leaves):
        changed = [*leaves[:index], leaf.at[(0,) * leaf.ndim].add(1.0), *leaves[index + 1 :]]
        seen.add(fingerprint(jax.tree.unflatten(tree, changed)))
    assert len(seen) == len(leaves) + 1


def test_loaded_models_run(directory):
    logits = forward(load_base(directory).model, np.ones((1, 4), np.int32))
    assert logits.shape == (1, 4, 96) and np.isfinite(logits).all()


def test_a_context_is_extended_as_by_rope_scaling(directory):
    """Beside the same directory with YaRN in its configuration."""
    short, long = load_base(directory), load_base(directory, context=3 * LLAMA["max_position_embeddings"] - 1)
    scaling = {"rope_type": "yarn", "factor": 3.0, "original_max_position_embeddings": LLAMA["max_position_embeddings"]}
    longer = {"max_position_embeddings": 3 * LLAMA["max_position_embeddings"], "rope_scaling": scaling}
    (directory / "config.json").write_text(json.dumps({**LLAMA, **longer}))
    wanted = load_base(directory)
    assert long.config == wanted.config and long.fingerprint == wanted.fingerprint != short.fingerprint
    tokens = np.arange(2 * LLAMA["max_position_embeddings"])[None] % 90
    np.testing.assert_array_equal(forward(long.model, tokens), forward(wanted.model, tokens))
    assert load_base(directory, context=100).config == wanted.config  # which is longer already
    with pytest.raises(ValueError, match=r"scaled already .yarn. and cannot be extended; give at most"):
        load_base(directory, context=10**6)
    with pytest.raises(ValueError, match="context must be a whole number"):
        load_base(directory, context=0)
