"""A small Llama as a Hugging Face directory, for the tests of weights."""

import jax
import numpy as np
from safetensors.numpy import load_file, save_file

from tests import reference_models

LLAMA = {
    **reference_models.SIZES,
    "model_type": "llama",
    "num_hidden_layers": 2,
    "tie_word_embeddings": True,
}


def llama_tensors(seed=0):
    rng = np.random.default_rng(seed)
    shapes = {"model.embed_tokens.weight": (96, 64), "model.norm.weight": (64,)}
    for layer in range(2):
        own = {
            "input_layernorm": (64,),
            "post_attention_layernorm": (64,),
            "self_attn.q_proj": (64, 64),
            "self_attn.k_proj": (32, 64),
            "self_attn.v_proj": (32, 64),
            "self_attn.o_proj": (64, 64),
            "mlp.gate_proj": (48, 64),
            "mlp.up_proj": (48, 64),
            "mlp.down_proj": (64, 48),
        }
        shapes |= {f"model.layers.{layer}.{name}.weight": shape for name, shape in own.items()}
    return {name: rng.normal(size=shape).astype(np.float32) * 0.1 for name, shape in shapes.items()}


def rewrite(directory, change):
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors")


def equal(a, b):
    pairs = zip(jax.tree.leaves(a.model), jax.tree.leaves(b.model), strict=True)
    return all(np.array_equal(np.asarray(x), np.asarray(y)) for x, y in pairs)
