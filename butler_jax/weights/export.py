"""Writing a model as a directory in Hugging Face layout."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

from butler_jax.model import BaseConfig, BaseModel, base_config
from butler_jax.storage import write_whole
from butler_jax.text import Tokenizer


def save_model(directory: Path, model: BaseModel, tokenizer: Tokenizer) -> None:
    """Write a plain Llama model as a Hugging Face directory: bfloat16 safetensors, config.json, tokenizer.json.

    Raises:
        ValueError: It is of another family, or has settings that config.json would not tell.
    """
    config, values = model.config, _hugging_face_config(model.config, tokenizer)
    if base_config(values) != config:
        raise ValueError(
            f"a model of the family {config.family} with these settings is not written; only plain Llama models are, "
            "without biases, scaled rotary embeddings or sliding windows"
        )
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {"model.embed_tokens.weight": model.embedding, "model.norm.weight": model.final_norm}
    if model.unembedding is not None:
        tensors["lm_head.weight"] = model.unembedding
    layers, width = model.layers, config.width
    for name, stacked, inputs in (
        ("input_layernorm", layers.attention_norm, None),
        ("self_attn.q_proj", layers.q, width),
        ("self_attn.k_proj", layers.k, width),
        ("self_attn.v_proj", layers.v, width),
        ("self_attn.o_proj", layers.o, config.heads * config.head_dim),
        ("post_attention_layernorm", layers.mlp_norm, None),
        ("mlp.gate_proj", layers.gate, width),
        ("mlp.up_proj", layers.up, width),
        ("mlp.down_proj", layers.down, config.hidden),
    ):
        for index in range(config.layers):
            weight = stacked[index]
            tensors[f"model.layers.{index}.{name}.weight"] = weight if inputs is None else weight.reshape(inputs, -1).T
    host = {n: np.ascontiguousarray(jnp.asarray(t[...], jnp.bfloat16)) for n, t in tensors.items()}
    write_whole(directory / "model.safetensors", lambda path: save_file(host, path, metadata={"format": "pt"}))
    tokenizer.save(directory)
    write_whole(directory / "config.json", json.dumps(values, indent=2) + "\n")


def _hugging_face_config(config: BaseConfig, tokenizer: Tokenizer) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "intermediate_size": config.hidden,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.context,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope.theta,
        "tie_word_embeddings": config.tied,
        "bos_token_id": tokenizer.bos,
        "eos_token_id": tokenizer.eos,
        "torch_dtype": "bfloat16",
    }
