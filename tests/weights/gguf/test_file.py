"""GGUF files written by the gguf library against the Hugging Face directories they were made from."""

import dataclasses
import math
import sys

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from butler_jax.model.decoder import forward
from butler_jax.model.layers import rope_frequencies
from butler_jax.weights import load_base
from tests import reference_models
from tests.marked import slow

TYPE = gguf.GGMLQuantizationType


TEXT = "The cat's 3 hats cost 12345 dollars;  don't\n\n ask WHY… naïve 漢字 🎉\tend "


def interleave(rows, heads):
    """Rows of q or k from two halves a head to rotary pairs, as llama.cpp's converter stores Llama models."""
    per_head = rows.shape[0] // heads
    out = np.empty_like(rows)
    for head in range(heads):
        for pair in range(per_head // 2):
            out[head * per_head + 2 * pair] = rows[head * per_head + pair]
            out[head * per_head + 2 * pair + 1] = rows[head * per_head + per_head // 2 + pair]
    return out


def write(path, model, architecture, *, kind=TYPE.F32, metadata=None, extra=None, tokenizer=None, parts=1):
    """A transformers model as a GGUF file: names by the gguf library's own map, matrices in type `kind`."""
    config = model.config
    writer = gguf.GGUFWriter(path, architecture)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    rope = config.rope_parameters.get("full_attention", config.rope_parameters)
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_rope_dimension_count(int(head_dim * rope.get("partial_rotary_factor", 1.0)))
    if config.sliding_window if architecture == "phi3" else getattr(config, "sliding_window", None):
        writer.add_sliding_window(config.sliding_window)
    if experts := getattr(config, "num_local_experts", None):
        writer.add_expert_count(experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
        if architecture == "qwen3moe":
            writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    for key, value in (metadata or {}).items():
        key = f"{architecture}.{key}"
        (
            writer.add_string
            if isinstance(value, str)
            else writer.add_array
            if isinstance(value, list)
            else writer.add_uint32
            if isinstance(value, int)
            else writer.add_float32
        )(key, value)
    if parts > 1:
        writer.add_uint16("split.count", parts)
    for add, values in (tokenizer or {}).items():
        getattr(writer, f"add_{add}")(values)
    names = getattr(gguf.MODEL_ARCH, architecture.upper().replace("-", "_"))
    names = gguf.get_tensor_name_map(names, config.num_hidden_layers)
    for name, parameter in model.named_parameters():
        values = parameter.detach().numpy()
        if architecture in ("llama", "smollm3", "granite") and ("q_proj" in name or "k_proj" in name):
            heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
            values = interleave(values, heads)
        if architecture in ("gemma2", "gemma3") and "norm" in name:
            values = values + 1
        if ".experts." in name:  # gate_up_proj [experts, 2 outputs, inputs] or down_proj
            layer = name.split(".")[2]
            suffix = "bias" if name.endswith("bias") else "weight"
            if architecture == "gpt-oss":  # inputs come first, and gate and up are interleaved
                values = values.swapaxes(1, 2) if suffix == "weight" else values
                parts = {"gate": values[:, ::2], "up": values[:, 1::2]}
            else:
                parts = {"gate": values[:, : values.shape[1] // 2], "up": values[:, values.shape[1] // 2 :]}
            for part, array in parts.items() if "gate_up" in name else [("down", values)]:
                array = gguf.quantize(np.ascontiguousarray(array), kind)
                writer.add_tensor(f"blk.{layer}.ffn_{part}_exps.{suffix}", array, raw_dtype=kind)
            continue
        stem, suffix = (name, "weight") if name.endswith("sinks") else name.rsplit(".", 1)
        stored = kind if values.ndim > 1 else TYPE.F32
        writer.add_tensor(f"{names.get_name(stem)}.{suffix}", gguf.quantize(values, stored), raw_dtype=stored)
    for name, values in (extra or {}).items():
        writer.add_tensor(name, np.asarray(values, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def pair(name, architecture, tmp_path, **options):
    directory = tmp_path / "directory"
    model = reference_models.save_model(name, directory)
    return load_base(directory), load_base(write(tmp_path / "model.gguf", model, architecture, **options))


def assert_equal(a, b, **tolerance):
    for x, y in zip(jax.tree.leaves(a.model), jax.tree.leaves(b.model), strict=True):
        np.testing.assert_allclose(np.asarray(x), np.asarray(y), **tolerance)


@pytest.mark.parametrize(
    ("name", "architecture"),
    [
        ("llama", "llama"),
        ("llama of all KV heads, tied", "llama"),
        ("phi3", "phi3"),
        ("mixtral", "llama"),
        slow("mistral with a sliding_window", "llama"),
        slow("mixtral with a sliding_window", "llama"),
        slow("qwen3", "qwen3"),
        slow("qwen3_moe, normalised", "qwen3moe"),
    ],
)
def test_float32_files_load_like_their_directories(name, architecture, tmp_path):
    directory, file = pair(name, architecture, tmp_path)
    assert_equal(directory, file, rtol=0)  # nothing is rounded
    assert directory.config == file.config
    assert directory.fingerprint == file.fingerprint


SCALES = {"embedding_scale": 6.0, "attention.scale": 0.2, "residual_scale": 0.3, "logit_scale": 4.0}
LINEAR = {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0, "rope.freq_base_swa": 100.0}
YARN = {
    "rope.scaling.type": "yarn",
    "rope.scaling.factor": 4.0,
    "rope.scaling.original_context_length": 64,
}
PATTERN = {"attention.sliding_window_pattern": [True, False, True]}


@pytest.mark.parametrize(
    ("name", "metadata"),
    [
        ("gpt_oss", YARN),
        ("gemma3", LINEAR | PATTERN | {"final_logit_softcapping": 3.0}),
        slow("gemma2", {"attn_logit_softcapping": 1.5, "final_logit_softcapping": 3.0}),
        slow("olmo2", {}),
        slow("smollm3", {}),
        slow("granite", SCALES),
    ],
)
def test_files_of_the_newer_families_load_like_their_directories(name, metadata, tmp_path):
    directory, file = pair(name, name.replace("_", "-"), tmp_path, metadata=metadata)
    assert_equal(directory, file, rtol=0)  # nothing is rounded
    different = {
        "gemma2": ("attention_scale",),
        "gemma3": ("attention_scale",),  # a file does not say it; the head dimension counts
        "smollm3": ("rotated_layers",),  # nor this; every fourth layer counts
        "granite": ("attention_scale", "residual_scale"),  # float32 in a file
    }.get(name, ())
    for field in dataclasses.fields(directory.config):
        mine, theirs = (getattr(base.config, field.name) for base in (directory, file))
        if field.name not in different:
            assert mine == theirs, field.name
        elif name == "granite":
            assert mine == pytest.approx(theirs, rel=1e-6)


def test_granite_without_its_scale_divides_by_the_root_of_the_head_dimension(tmp_path):
    _, file = pair("granite", "granite", tmp_path, metadata={n: v for n, v in SCALES.items() if "attention" not in n})
    assert file.config.attention_scale == file.config.head_dim**-0.5


def test_qwen2_biases_and_yarn_load(tmp_path):
    directory, file = pair("qwen2", "qwen2", tmp_path, metadata=YARN)
    assert_equal(directory, file, rtol=0)  # nothing is rounded
    assert directory.config.rope == file.config.rope


def test_llama_biases_and_smoothed_scaling_load(tmp_path):
    rope = reference_models.LLAMA3
    plain = 1000.0 ** -(np.arange(0, 16, 2) / 16)
    turns = rope["original_max_position_embeddings"] * plain / (2 * math.pi)
    smooth = np.clip((turns - 1.0) / (4.0 - 1.0), 0, 1)
    divisors = 1 / ((1 - smooth) / 8.0 + smooth)
    directory, file = pair("llama with biases", "llama", tmp_path, extra={"rope_freqs.weight": divisors})
    assert_equal(directory, file, rtol=0)  # nothing is rounded
    for length in (8, 200):
        tables = [rope_frequencies(b.config.rope, 16, context=256, length=length) for b in (directory, file)]
        np.testing.assert_allclose(tables[0][0], tables[1][0], rtol=1e-6)  # float32 divisors
        assert tables[0][1] == tables[1][1] == 1.0


@pytest.mark.slow
def test_phi3_longrope_factors_load(tmp_path):
    rope = reference_models.LONGROPE
    attention = math.sqrt(1 + math.log(256 / 32) / math.log(32))
    directory, file = pair(
        "phi3 longrope",
        "phi3",
        tmp_path,
        metadata={"rope.scaling.original_context_length": 32, "rope.scaling.attn_factor": attention},
        extra={
            "rope_factors_short.weight": rope["short_factor"],
            "rope_factors_long.weight": rope["long_factor"],
        },
    )
    assert_equal(directory, file, rtol=0)  # nothing is rounded
    tokens = np.random.default_rng(0).integers(0, 96, (1, 48), dtype=np.int32)
    for length in (24, 48):
        a, b = (forward(base.model, tokens[:, :length]) for base in (directory, file))
        np.testing.assert_allclose(a, b, atol=1e-5)  # the attention factor is stored in float32


def test_linear_scaling_loads(tmp_path):
    scaling = {"rope.scaling.type": "linear", "rope.scaling.factor": 2.0}
    directory, file = pair("llama with wide heads", "llama", tmp_path, metadata=scaling)
    assert directory.config.rope == file.config.rope
    assert_equal(directory, file, rtol=0)  # nothing is rounded


def test_divisors_and_linear_scaling_count_together(tmp_path):
    scaling = {"rope.scaling.type": "linear", "rope.scaling.factor": 2.0}
    ones = {"rope_freqs.weight": np.ones(12)}
    directory, file = pair("llama with wide heads", "llama", tmp_path, metadata=scaling, extra=ones)
    width = directory.config.head_dim
    ours, theirs = (rope_frequencies(b.config.rope, width, context=256, length=8)[0] for b in (file, directory))
    np.testing.assert_allclose(ours, theirs, rtol=1e-6)
    with pytest.raises(ValueError, match=r"rope\.scaling\.type is 'yarn' beside the tensor rope_freqs\.weight"):
        pair("llama with wide heads", "llama", tmp_path, metadata={"rope.scaling.type": "yarn"}, extra=ones)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("attention.scale", 0.5),
        ("attention.causal", 0),
        ("attention.clamp_kqv", 1.0),
        ("logit_scale", 2.0),
        ("attention.value_length", 8),
    ],
)
def test_arithmetic_that_the_decoder_does_not_have_is_refused(key, value, tmp_path):
    path = write(tmp_path / "m.gguf", reference_models.make_model("llama"), "llama", metadata={key: value})
    with pytest.raises(ValueError, match=rf"m\.gguf: llama\.{key}={value} is not supported; it must be "):
        load_base(path)


def test_a_part_of_a_model_is_named(tmp_path):
    path = write(tmp_path / "m-00001-of-00002.gguf", reference_models.make_model("llama"), "llama", parts=2)
    with pytest.raises(ValueError, match="is one of 2 parts of a model; join them with llama-gguf-split --merge"):
        load_base(path)


@pytest.mark.parametrize(
    ("kind", "error"),  # half a step of the type, relative to the largest value of a block
    [("F16", 2**-11), ("BF16", 2**-8), ("Q8_0", 1 / 254), ("Q4_0", 1 / 8), ("Q4_1", 1 / 15)],
)
def test_stored_types_round_no_more_than_their_step(kind, error, tmp_path):
    directory, file = pair("llama of even blocks", "llama", tmp_path, kind=TYPE[kind])
    for x, y in zip(jax.tree.leaves(directory.model), jax.tree.leaves(file.model), strict=True):
        x, y = np.asarray(x), np.asarray(y)
        assert np.abs(x - y).max() <= error * np.abs(x).max() * 1.01


@pytest.mark.parametrize("kind", ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "MXFP4"])
def test_block_types_are_read_as_the_library_dequantises_them(kind, tmp_path):
    from butler_jax.weights.gguf.file import _read_rows

    block, size = gguf.GGML_QUANT_SIZES[TYPE[kind]]
    raw = np.random.default_rng(1).integers(0, 120, (37, 3 * size), dtype=np.uint8)  # no float16 is infinite
    path = tmp_path / "rows"
    path.write_bytes(b"12345" + raw.tobytes())
    expected = gguf.dequantize(raw, TYPE[kind])
    got = _read_rows(path, 5, (37, 3 * block), TYPE[kind], gguf, 4, 30)
    np.testing.assert_array_equal(got, expected[4:30])


# --- what is refused ------------------------------------------------------------------------------


def test_bad_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no such file: .*nothing"):
        load_base(tmp_path / "nothing.gguf")
    path = tmp_path / "text.gguf"
    path.write_text("a text")
    with pytest.raises(ValueError, match="is not a GGUF file"):
        load_base(path)


def test_truncated_file_is_named(tmp_path):
    path = write(tmp_path / "model.gguf", reference_models.make_model("llama"), "llama")
    whole = path.read_bytes()
    for keep in (6, 200, 2000, len(whole) - 64):
        path.write_bytes(whole[:keep])
        with pytest.raises(ValueError, match=r"model\.gguf is truncated or damaged"):
            load_base(path)


def test_unknown_architecture_is_named(tmp_path):
    path = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(path, "mamba")
    writer.add_tensor("token_embd.weight", np.ones((4, 4), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ValueError, match=r"unknown architecture 'mamba'.*llama, mistral, qwen2, qwen3, phi3"):
        load_base(path)


def test_absent_library_says_what_to_install(tmp_path, monkeypatch):
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ValueError, match=r"pip install 'butler-jax\[gguf\]'"):
        load_base(tmp_path / "model.gguf")


# --- tokenizers -----------------------------------------------------------------------------------


@pytest.mark.slow
def test_smollm2_file_equals_its_directory(shared_data, smollm2_dir):
    file, directory = load_base(next(smollm2_dir.glob("*.gguf"))), load_base(smollm2_dir)
    assert file.config == directory.config
    assert_equal(file, directory, rtol=2**-11, atol=2**-25)  # the directory is rounded to float16
    text = (shared_data / "data" / "text" / "wikitext2_test.txt").read_text(encoding="utf-8")[:300_000]
    text += "<|im_start|>user\n" + TEXT
    assert file.tokenizer.encode(text) == directory.tokenizer.encode(text)
    assert (file.tokenizer.bos, file.tokenizer.eos) == (directory.tokenizer.bos, directory.tokenizer.eos)


def test_bfloat16_is_placed_from_quantised_files(tmp_path):
    drawn = {"sampling_temp": 0.6, "sampling_top_k": 20}
    path = write(tmp_path / "model.gguf", reference_models.make_model("llama"), "llama", tokenizer=drawn)
    narrow = load_base(path, dtype=jnp.bfloat16)
    assert narrow.generation == {"do_sample": True, "temperature": 0.6, "top_k": 20}
    assert all(leaf.dtype == jnp.bfloat16 for leaf in jax.tree.leaves(narrow.model))
    assert narrow.fingerprint == load_base(path).fingerprint
