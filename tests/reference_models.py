"""Random tiny models of every family, made and run by transformers on torch: the oracle of the parity tests."""

from pathlib import Path

import numpy as np

SIZES = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "rope_theta": 1000.0, "factor": 4.0, "original_max_position_embeddings": 64}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1000.0,
    "short_factor": [1.0, 1.25, 1.5, 1.75, 2.0, 2.25],
    "long_factor": [2.0, 3.0, 4.0, 5.0, 6.0, 7.0],
    "original_max_position_embeddings": 32,
}
MODELS = {  # name -> (family, settings)
    "llama": ("llama", {}),
    "llama of one KV head": ("llama", {"num_key_value_heads": 1}),
    "llama of all KV heads, tied": ("llama", {"num_key_value_heads": 4, "tie_word_embeddings": True}),
    "llama of even blocks": ("llama", {"intermediate_size": 64}),  # rows of whole quantisation blocks
    "llama with biases": ("llama", {"attention_bias": True, "mlp_bias": True, "rope_parameters": LLAMA3}),
    "llama with wide heads": ("llama", {"head_dim": 24, "rope_parameters": {"rope_type": "linear", "factor": 2.0}}),
    "mistral with a sliding_window": ("mistral", {"sliding_window": 5}),
    "mistral with layer types": (
        "ministral",  # what transformers makes of a mistral with layer_types
        {"head_dim": 16, "sliding_window": 5, "layer_types": ["full_attention", "sliding_attention", "full_attention"]},
    ),
    "mistral without a sliding window": ("mistral", {"sliding_window": None}),
    "qwen2": ("qwen2", {"tie_word_embeddings": True, "rope_parameters": YARN}),
    "qwen2 with sliding layers": ("qwen2", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}),
    "qwen3": ("qwen3", {"head_dim": 32, "num_key_value_heads": 1}),
    "qwen3 with sliding layers": (
        "qwen3",
        {
            "head_dim": 16,
            "attention_bias": True,
            "use_sliding_window": True,
            "sliding_window": 3,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1000.0, "partial_rotary_factor": 0.5},
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
    "gemma3": (
        "gemma3_text",
        {
            "head_dim": 16,
            "sliding_window": 6,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "query_pre_attn_scalar": 24,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 5000.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
            },
            "final_logit_softcapping": 3.0,
        },
    ),
    "gemma2": (
        "gemma2",
        {
            "head_dim": 16,
            "sliding_window": 6,
            "query_pre_attn_scalar": 24,
            "attn_logit_softcapping": 1.5,
            "final_logit_softcapping": 3.0,
            "rope_parameters": {"rope_theta": 1000.0},
        },
    ),
    "gpt_oss": (
        "gpt_oss",
        {
            "head_dim": 16,
            "sliding_window": 6,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "rope_parameters": {**YARN, "truncate": False},
        },
    ),
    "gpt_oss of even blocks": (  # rows of whole quantisation blocks
        "gpt_oss",
        {
            "head_dim": 16,
            "intermediate_size": 64,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "rope_parameters": {**YARN, "truncate": False},
        },
    ),
    "olmo2": ("olmo2", {}),
    "olmo3": (
        "olmo3",
        {
            "sliding_window": 5,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "rope_parameters": {"full_attention": YARN, "sliding_attention": {"rope_theta": 1000.0}},
        },
    ),
    "smollm3": ("smollm3", {"no_rope_layers": [1, 0, 1], "rope_parameters": {"rope_theta": 1000.0}}),
    "granite": (
        "granite",
        {
            "embedding_multiplier": 6.0,
            "attention_multiplier": 0.2,
            "residual_multiplier": 0.3,
            "logits_scaling": 4.0,
            "attention_bias": True,
        },
    ),
    "phi3": ("phi3", {"sliding_window": 6, "num_key_value_heads": 4}),
    "phi3 longrope": (
        "phi3",
        {
            "rope_parameters": {**LONGROPE, "partial_rotary_factor": 0.75},
            "original_max_position_embeddings": 32,
        },
    ),
    "mixtral": ("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 16}),
    "mixtral with a sliding_window": (
        "mixtral",
        {"num_local_experts": 3, "num_experts_per_tok": 1, "sliding_window": 5},
    ),
    "qwen3_moe": (
        "qwen3_moe",
        {
            "num_experts": 8,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 24,
            "head_dim": 16,
            "use_sliding_window": True,
            "sliding_window": 4,
        },
    ),
    "qwen3_moe, normalised": (
        "qwen3_moe",
        {
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "norm_topk_prob": True,
            "head_dim": 32,
        },
    ),
    "qwen3_moe, gelu": ("qwen3_moe", {"num_experts": 8, "moe_intermediate_size": 24, "hidden_act": "gelu"}),
}


def make_model(name: str, seed: int = 0):
    """A transformers model in float32 whose parameters, norms and biases too, are random."""
    import torch
    import transformers

    family, settings = MODELS[name]
    config = transformers.AutoConfig.for_model(family, **{**SIZES, **settings}, attn_implementation="eager")
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    for parameter_name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        inputs = parameter.shape[-1] if parameter.ndim > 1 else 25
        parameter.data = noise * inputs**-0.5 + (1.0 if "norm" in parameter_name else 0.0)
    return model.eval()


def save_model(name: str, directory: Path, **options):
    """Make a model and write it with save_pretrained; returns it."""
    model = make_model(name)
    model.save_pretrained(directory, **options)
    path = directory / "config.json"
    path.write_text(path.read_text().replace('"ministral"', '"mistral"'))
    return model


def logits(model, tokens: np.ndarray) -> np.ndarray:
    """Logits [B, T, V] of a transformers model for tokens [B, T] without padding."""
    import torch

    with torch.no_grad():
        return model(torch.from_numpy(np.asarray(tokens, np.int64))).logits.numpy()
