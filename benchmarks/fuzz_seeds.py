"""What the fuzzer starts from: a small valid model in every form, and what a target is."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
from safetensors.numpy import save_file
from tokenizers import Tokenizer as Backend
from tokenizers import models, pre_tokenizers

from butler_jax.weights.huggingface import SINGLE
from tests import reference_models

ALLOWED = (ValueError, FileNotFoundError)

CONFIG = {
    "model_type": "llama",
    "vocab_size": 16,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
}
QWEN = {
    **CONFIG,
    "model_type": "qwen3",
    "use_sliding_window": True,
    "sliding_window": 8,
    "layer_types": ["full_attention"],
}
LONGROPE = {
    **CONFIG,
    "model_type": "phi3",
    "sliding_window": 8,
    "rope_theta": 1e4,
    "partial_rotary_factor": 1.0,
    "rope_scaling": {"type": "longrope", "short_factor": [1.0, 1.0], "long_factor": [1.5, 2.0]},
}
NEWER = tuple(  # families of this year, among them mixtures of experts
    {**reference_models.SIZES, **settings, "model_type": family}
    for family, settings in reference_models.MODELS.values()
    if family in ("gemma2", "gemma3_text", "gpt_oss", "granite", "mixtral", "olmo3", "qwen3_moe", "smollm3")
)
TENSORS = {
    "model.embed_tokens.weight": (16, 8),
    "model.norm.weight": (8,),
    **{
        f"model.layers.0.{name}.weight": shape
        for name, shape in {
            "input_layernorm": (8,),
            "post_attention_layernorm": (8,),
            "self_attn.q_proj": (8, 8),
            "self_attn.k_proj": (4, 8),
            "self_attn.v_proj": (4, 8),
            "self_attn.o_proj": (8, 8),
            "mlp.gate_proj": (12, 8),
            "mlp.up_proj": (12, 8),
            "mlp.down_proj": (8, 12),
        }.items()
    },
}
GGUF_NAMES = {
    "token_embd": (16, 8),
    "output_norm": (8,),
    "blk.0.attn_norm": (8,),
    "blk.0.ffn_norm": (8,),
    "blk.0.attn_q": (8, 8),
    "blk.0.attn_k": (4, 8),
    "blk.0.attn_v": (4, 8),
    "blk.0.attn_output": (8, 8),
    "blk.0.ffn_gate": (12, 8),
    "blk.0.ffn_up": (12, 8),
    "blk.0.ffn_down": (8, 12),
}
TOKENS = ["<s>", "a", "b", "c", "Ġ", "ab", "d", "e"]


def weights(dtype: type = np.float32) -> dict[str, np.ndarray]:
    """The tensors of the model that CONFIG describes."""
    return {name: np.full(shape, 0.5, dtype) for name, shape in TENSORS.items()}


def tokenizer_file() -> dict:
    """A tokenizer.json of TOKENS as an object."""
    backend = Backend(models.BPE(vocab={t: i for i, t in enumerate(TOKENS)}, merges=[("a", "b")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.add_special_tokens(["<s>"])
    return json.loads(backend.to_str())


def write_gguf(
    path: Path, *, architecture: str = "llama", pieces: bool = False, quantised: bool = False, **more: int
) -> Path:
    """Write the model of CONFIG as a GGUF file, with a byte-level tokenizer or one of pieces and scores.

    more: further metadata, by the names of gguf's methods.
    """
    writer = gguf.GGUFWriter(path, architecture)
    for add, value in (
        ("block_count", 1),
        ("context_length", 64),
        ("embedding_length", 8),
        ("feed_forward_length", 12),
        ("head_count", 2),
        ("head_count_kv", 1),
        ("layer_norm_rms_eps", 1e-5),
        ("rope_freq_base", 1e4),
        ("rope_dimension_count", 4),
        ("tokenizer_model", "llama" if pieces else "gpt2"),
        ("token_list", TOKENS),
        ("token_types", [3] + [1] * 7),
        ("bos_token_id", 0),
        *more.items(),
        *([("token_scores", [0.0] * 8)] if pieces else [("token_merges", ["a b"])]),
    ):
        getattr(writer, f"add_{add}")(value)
    for name, shape in GGUF_NAMES.items():
        writer.add_tensor(f"{name}.weight", np.full(shape, 0.5, np.float32))
    if quantised:
        kind = gguf.GGMLQuantizationType.Q8_0
        writer.add_tensor("more.weight", gguf.quantize(np.ones((2, 32), np.float32), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_model(directory: Path) -> Path:
    """Write the model of CONFIG as a Hugging Face directory with its tokenizer."""
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps(CONFIG))
    (directory / "tokenizer.json").write_text(json.dumps(tokenizer_file()))
    (directory / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "add_bos_token": True}))
    save_file(weights(), directory / SINGLE)
    return directory


@dataclasses.dataclass(frozen=True)
class Target:
    """A reader. seeds: valid inputs. run: reads the bytes of one input. named: its errors name the directory."""

    name: str
    seeds: tuple[bytes, ...]
    run: Callable[[bytes], object]
    named: bool = True


def encoded(*values: object) -> tuple[bytes, ...]:
    """JSON texts of the values."""
    return tuple(json.dumps(value).encode() for value in values)
