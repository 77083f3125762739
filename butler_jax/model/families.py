"""The table of model families."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class Family:
    """How a family differs from plain Llama.

    Attributes:
        qkv_bias, output_bias, mlp_bias: True, False, or the configuration key that holds the answer.
        qk_norm: Queries and keys have an RMS norm, over each head or ("joint") over all heads together.
        norms: Where a block has its RMS norm, as in BaseConfig.
        wide_norms: Norms multiply by their scale in float32.
        offset_norms: The stored scales of norms lack 1.
        activation: The key that names the activation of the gate.
        activation_default: The activation where the key is missing.
        scaled_embeddings: Embeddings are multiplied by the root of their width.
        query_scalar: query_pre_attn_scalar, to the power of -1/2, is the factor on the attention logits.
        soft_caps: Which of attn_logit_softcapping and final_logit_softcapping count.
        multipliers: embedding_multiplier, attention_multiplier, residual_multiplier and logits_scaling count.
        sinks: Query heads have attention sinks.
        fused: The projections are stored as qkv_proj and gate_up_proj.
        sliding: Which layers slide: "never", "always" (all, where sliding_window is set), "enabled" (all, where
            use_sliding_window is set too), "typed" (all, or those that layer_types names) or "switched" (as
            use_sliding_window, layer_types and max_window_layers say).
        full_every: In a typed family without layer_types, every so many layers one does not slide; None: all slide.
        patterned: sliding_window_pattern takes the place of full_every.
        sliding_theta: The base of the wavelengths in sliding layers, where they have a rotary embedding of their own:
            a number, or "rope_theta" for the base of the other layers. None: they have the embedding of the others.
        unrotated_every: Without no_rope_layers, every so many layers one has no rotary embedding; None: all have one.
        rotary_share: partial_rotary_factor of a head is rotated. Other families pass it over, as transformers does.
        rope: The rotary settings where a configuration has none.
        defaults: Values of keys that a configuration of the family leaves out.
    """

    qkv_bias: bool | str = False
    output_bias: bool | str = False
    mlp_bias: bool | str = False
    qk_norm: bool | str = False
    norms: str = "pre"
    wide_norms: bool = False
    offset_norms: bool = False
    activation: str = "hidden_act"
    activation_default: str = "silu"
    scaled_embeddings: bool = False
    query_scalar: bool = False
    soft_caps: tuple[str, ...] = ()
    multipliers: bool = False
    sinks: bool = False
    fused: bool = False
    sliding: str = "never"
    full_every: int | None = None
    patterned: bool = False
    sliding_theta: float | str | None = None
    unrotated_every: int | None = None
    rotary_share: bool = False
    rope: Mapping[str, object] = field(default_factory=dict)
    defaults: Mapping[str, object] = field(default_factory=dict)


ATTENTION_BIAS = dict(qkv_bias="attention_bias", output_bias="attention_bias")
GEMMA = dict(
    **ATTENTION_BIAS,
    norms="sandwich",
    wide_norms=True,
    offset_norms=True,
    activation="hidden_activation",
    activation_default="gelu_pytorch_tanh",
    scaled_embeddings=True,
    query_scalar=True,
    sliding="typed",
)
GEMMA_SIZES = {
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "tie_word_embeddings": True,
}
OLMO = dict(**ATTENTION_BIAS, qk_norm="joint", norms="post", wide_norms=True)
OLMO_SIZES = {"rms_norm_eps": 1e-5, "max_position_embeddings": 2048}

FAMILIES: dict[str, Family] = {
    "llama": Family(**ATTENTION_BIAS, mlp_bias="mlp_bias"),
    "mistral": Family(
        sliding="typed",
        defaults={"sliding_window": 4096, "num_key_value_heads": 8, "max_position_embeddings": 131072},
    ),
    "qwen2": Family(
        qkv_bias=True,
        sliding="switched",
        defaults={
            "num_key_value_heads": 32,
            "sliding_window": 4096,
            "max_window_layers": 28,
            "max_position_embeddings": 32768,
        },
    ),
    "qwen3": Family(
        **ATTENTION_BIAS,
        qk_norm=True,
        sliding="switched",
        defaults={
            "head_dim": 128,
            "num_key_value_heads": 32,
            "sliding_window": 4096,
            "max_window_layers": 28,
            "max_position_embeddings": 32768,
        },
    ),
    "phi3": Family(
        fused=True,
        sliding="always",
        rotary_share=True,
        defaults={
            "rms_norm_eps": 1e-5,
            "max_position_embeddings": 4096,
            "original_max_position_embeddings": 4096,
        },
    ),
    "mixtral": Family(
        sliding="always",
        defaults={
            "rms_norm_eps": 1e-5,
            "num_key_value_heads": 8,
            "max_position_embeddings": 131072,
            "rope_theta": 1e6,
        },
    ),
    "qwen3_moe": Family(
        **ATTENTION_BIAS,
        qk_norm=True,
        sliding="enabled",
        defaults={"num_key_value_heads": 4, "sliding_window": 4096, "max_position_embeddings": 32768},
    ),
    "gpt_oss": Family(
        **ATTENTION_BIAS,
        mlp_bias=True,
        wide_norms=True,
        sinks=True,
        sliding="typed",
        full_every=2,
        rope={
            "rope_type": "yarn",
            "factor": 32.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "truncate": False,
            "original_max_position_embeddings": 4096,
        },
        defaults={
            "vocab_size": 201088,
            "hidden_size": 2880,
            "intermediate_size": 2880,
            "num_hidden_layers": 36,
            "num_attention_heads": 64,
            "num_key_value_heads": 8,
            "head_dim": 64,
            "rms_norm_eps": 1e-5,
            "max_position_embeddings": 131072,
            "sliding_window": 128,
            "attention_bias": True,
            "rope_theta": 150000.0,
        },
    ),
    "gemma2": Family(
        **GEMMA,
        soft_caps=("attn_logit_softcapping", "final_logit_softcapping"),
        full_every=2,
        defaults={
            **GEMMA_SIZES,
            "vocab_size": 256000,
            "max_position_embeddings": 8192,
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
        },
    ),
    "gemma3_text": Family(
        **GEMMA,
        soft_caps=("final_logit_softcapping",),
        qk_norm=True,
        full_every=6,
        patterned=True,
        sliding_theta=10000.0,
        defaults={
            **GEMMA_SIZES,
            "vocab_size": 262208,
            "max_position_embeddings": 131072,
            "rope_theta": 1e6,
        },
    ),
    "olmo2": Family(**OLMO, defaults=OLMO_SIZES),
    "olmo3": Family(
        **OLMO,
        sliding="typed",
        full_every=4,
        sliding_theta="rope_theta",
        defaults={**OLMO_SIZES, "sliding_window": 4096, "rope_theta": 500000.0},
    ),
    "smollm3": Family(
        **ATTENTION_BIAS,
        mlp_bias="mlp_bias",
        sliding="switched",
        unrotated_every=4,
        defaults={
            "num_key_value_heads": 4,
            "max_position_embeddings": 32768,
            "rope_theta": 2e6,
            "tie_word_embeddings": True,
        },
    ),
    "granite": Family(
        **ATTENTION_BIAS,
        mlp_bias="mlp_bias",
        multipliers=True,
        defaults={"attention_multiplier": 1.0, "max_position_embeddings": 2048},
    ),
}
