"""GGUF files written by the gguf library against the Hugging Face directories they were made from."""

import json
import math
import sys
from pathlib import Path

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, trainers

from butler_jax.model.decoder import forward
from butler_jax.model.layers import rope_frequencies
from butler_jax.weights import load_base
from butler_jax.weights.gguf.tokenizer import WORD_SPLITTERS, byte_level_bpe, read_tokenizer
from tests import reference_models

TYPE = gguf.GGMLQuantizationType
SOURCE = Path(__file__).read_text(encoding="utf-8").replace("<s>", "").replace("</s>", "")
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


def write(path, model, architecture, *, kind=TYPE.F32, metadata=None, extra=None, tokenizer=None):
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
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(int(head_dim * config.rope_parameters.get("partial_rotary_factor", 1.0)))
    if config.sliding_window if architecture == "phi3" else getattr(config, "sliding_window", None):
        writer.add_sliding_window(config.sliding_window)
    for key, value in (metadata or {}).items():
        key = f"{architecture}.{key}"
        (writer.add_string if isinstance(value, str) else
         writer.add_uint32 if isinstance(value, int) else writer.add_float32)(key, value)  # fmt: skip
    for add, values in (tokenizer or {}).items():
        getattr(writer, f"add_{add}")(values)
    names = gguf.get_tensor_name_map(getattr(gguf.MODEL_ARCH, architecture.upper()), config.num_hidden_layers)
    for name, parameter in model.named_parameters():
        values = parameter.detach().numpy()
        if architecture == "llama" and ("q_proj" in name or "k_proj" in name):
            heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
            values = interleave(values, heads)
        stem, suffix = name.rsplit(".", 1)
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
        ("mistral with a window", "llama"),
        ("qwen3", "qwen3"),
        ("phi3", "phi3"),
    ],
)
def test_float32_files_load_like_their_directories(name, architecture, tmp_path):
    directory, file = pair(name, architecture, tmp_path)
    assert_equal(directory, file, rtol=0)  # nothing is rounded
    assert directory.config == file.config
    assert directory.fingerprint == file.fingerprint


def test_qwen2_biases_and_yarn_load(tmp_path):
    scaling = {
        "rope.scaling.type": "yarn",
        "rope.scaling.factor": 4.0,
        "rope.scaling.original_context_length": 64,
    }
    directory, file = pair("qwen2", "qwen2", tmp_path, metadata=scaling)
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


@pytest.mark.parametrize(
    ("kind", "error"),  # half a step of the type, relative to the largest value of a block
    [("F16", 2**-11), ("BF16", 2**-8), ("Q8_0", 1 / 254), ("Q4_0", 1 / 8), ("Q4_1", 1 / 15)],
)
def test_stored_types_round_no_more_than_their_step(kind, error, tmp_path):
    directory, file = pair("llama of even blocks", "llama", tmp_path, kind=TYPE[kind])
    for x, y in zip(jax.tree.leaves(directory.model), jax.tree.leaves(file.model), strict=True):
        x, y = np.asarray(x), np.asarray(y)
        assert np.abs(x - y).max() <= error * np.abs(x).max() * 1.01


@pytest.mark.parametrize("kind", ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"])
def test_k_quants_are_read_as_the_library_dequantises_them(kind, tmp_path):
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


def bpe_fields(backend, **fields):
    model = json.loads(backend.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    merges = [" ".join(m) if isinstance(m, list) else m for m in model["merges"]]
    values = {"model": "gpt2", "tokens": tokens, "merges": merges, **fields}
    return {f"tokenizer.ggml.{key}": value for key, value in values.items()}


@pytest.fixture(scope="module")
def trained():
    """A byte-level BPE of 400 tokens, trained on this file's text."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator([TEXT, __doc__, SOURCE], trainer)
    return backend


def test_byte_level_tokenizer_equals_the_one_it_was_made_from(trained):
    types = [3, 3] + [1] * (trained.get_vocab_size() - 2)
    fields = bpe_fields(trained, token_type=types, bos_token_id=0, eos_token_id=1, pre="gpt-2")
    tokenizer = read_tokenizer(fields)
    assert tokenizer.encode(TEXT) == trained.encode(TEXT).ids
    assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT
    assert (tokenizer.bos, tokenizer.eos, tokenizer.add_bos) == (0, 1, False)
    assert tokenizer.encode("a</s>")[-1] == 1


@pytest.mark.parametrize("pre", WORD_SPLITTERS)
def test_every_word_splitting_keeps_the_text(trained, pre):
    tokenizer = read_tokenizer(bpe_fields(trained, pre=pre))
    assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT


@pytest.mark.parametrize(
    ("pre", "pieces"),
    [
        ("gpt-2", ["I", "'m", " 12345", " up", "."]),
        ("smollm", ["I", "'m", " ", "1", "2", "3", "4", "5", " up", "."]),
        ("llama-bpe", ["I", "'m", " ", "123", "45", " up", "."]),
        ("qwen2", ["I", "'m", " ", "1", "2", "3", "4", "5", " up", "."]),
    ],
)
def test_words_are_cut_as_published(trained, pre, pieces):
    splitter = WORD_SPLITTERS[pre]()
    assert [p.replace("Ġ", " ") for p, _ in splitter.pre_tokenize_str("I'm 12345 up.")] == pieces


def test_whole_words_go_before_merges_for_llama_3():
    tokens = ["a", "b", "c", "ab", "abc"]  # "abc" has no merge that makes it
    assert byte_level_bpe(tokens, ["a b"], "llama-bpe").encode("abc").ids == [4]
    assert byte_level_bpe(tokens, ["a b"], "gpt-2").encode("abc").ids == [3, 2]


def test_first_token_follows_the_metadata(trained):
    fields = bpe_fields(trained, pre="llama-bpe", bos_token_id=0)
    assert read_tokenizer(fields).add_bos
    assert not read_tokenizer({**fields, "tokenizer.ggml.add_bos_token": False}).add_bos


def test_unknown_tokenizers_are_named(trained):
    with pytest.raises(ValueError, match="unknown tokenizer 't5'"):
        read_tokenizer({"tokenizer.ggml.model": "t5"})
    with pytest.raises(ValueError, match=r"unknown word splitting 'viking'.*smollm"):
        read_tokenizer(bpe_fields(trained, pre="viking"))
    assert read_tokenizer({}) is None


def test_sentencepiece_tokenizer_equals_sentencepiece(tmp_path):
    import sentencepiece

    source = tmp_path / "text.txt"
    source.write_text(SOURCE, encoding="utf-8")
    sentencepiece.SentencePieceTrainer.train(
        input=str(source),
        model_prefix=str(tmp_path / "pieces"),
        model_type="bpe",
        vocab_size=500,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "pieces.model"))
    ids = range(theirs.get_piece_size())
    types = [2 if theirs.is_unknown(i) else 3 if theirs.is_control(i) else 6 if theirs.is_byte(i) else 1 for i in ids]
    fields = {
        "model": "llama",
        "tokens": [theirs.id_to_piece(i) for i in ids],
        "scores": [theirs.get_score(i) for i in ids],
        "token_type": types,
        "bos_token_id": theirs.bos_id(),
        "eos_token_id": theirs.eos_id(),
        "unknown_token_id": theirs.unk_id(),
    }
    tokenizer = read_tokenizer({f"tokenizer.ggml.{key}": value for key, value in fields.items()})
    for text in (TEXT, source.read_text(encoding="utf-8"), "  two  spaces", "a"):
        ours = tokenizer.encode(text, bos=False)
        assert ours == theirs.encode(text)
        assert tokenizer.decode(ours) == text
    assert tokenizer.add_bos and tokenizer.encode("a")[0] == theirs.bos_id()


def test_stories_tokenizer_survives_as_pieces_and_scores(shared_data):
    """A SentencePiece tokenizer from its merges turned to scores, as converters store it."""
    directory = shared_data / "data" / "stories260K"
    original = Backend.from_file(str(directory / "tokenizer.json"))
    vocab = original.get_vocab()
    tokens = sorted(vocab, key=vocab.get)
    merges = json.loads(original.to_str())["model"]["merges"]
    rank = {"".join(m if isinstance(m, list) else m.split(" ")): -i for i, m in reversed(list(enumerate(merges)))}
    types = [2, 3, 3] + [6 if t.startswith("<0x") else 1 for t in tokens[3:]]
    fields = {
        "model": "llama",
        "tokens": tokens,
        "scores": [float(rank.get(t, -1e6)) for t in tokens],
        "token_type": types,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    tokenizer = read_tokenizer({f"tokenizer.ggml.{key}": value for key, value in fields.items()})
    text = (shared_data / "data" / "text" / "tinystories_valid_head.txt").read_text(encoding="utf-8")[:20000]
    assert tokenizer.encode(text, bos=False) == original.encode(text, add_special_tokens=False).ids


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
    path = write(tmp_path / "model.gguf", reference_models.make_model("llama"), "llama")
    narrow = load_base(path, dtype=jnp.bfloat16)
    assert all(leaf.dtype == jnp.bfloat16 for leaf in jax.tree.leaves(narrow.model))
    assert narrow.fingerprint == load_base(path).fingerprint
