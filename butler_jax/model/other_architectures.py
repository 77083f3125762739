"""Keys of a Hugging Face configuration that change the arithmetic of other families. They are refused in known ones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from butler_jax.model.expert_keys import honoured_by_experts
from butler_jax.model.families import Family
from butler_jax.storage import shown

# The key, and the values besides None, False, 0 and what is empty that leave the arithmetic of a known family as it is.
# Where 1 or True does, False and 0 do not unless they are named too.
KEYS: Mapping[str, tuple[Any, ...]] = {
    "is_causal": (True,),
    # rotary embedding and positions
    "rotary_dim": (),
    "rotary_pct": (1,),
    "rotary_percent": (1,),
    "rotary_emb_base": (),
    "rope_local_base_freq": (),
    "local_rope_theta": (),
    "global_rope_theta": (),
    "swa_rope_theta": (),
    "layer_rope_theta": (),
    "compress_rope_theta": (),
    "rope_interleave": (),
    "use_rope": (True,),
    "no_rope_layers": (),
    "no_rope_layer_interval": (),
    "alibi": (),
    "position_embedding_type": ("rope", "rotary"),
    # attention
    "attn_logit_softcapping": (),
    "query_pre_attn_scalar": (),
    "attention_multiplier": (),
    "attention_in_multiplier": (1,),
    "attention_out_multiplier": (1,),
    "attention_value_scale": (1,),
    "key_multiplier": (1,),
    "qk_scale_factor": (1,),
    "qk_l2_clip_threshold": (),
    "attn_scale": (),
    "scale_attn_by_inverse_layer_idx": (),
    "use_attention_gate": (),
    "gating": (),
    "qkv_bias": (),
    "use_qkv_bias": (),
    "clip_qkv": (),
    "qk_layernorm": (),
    "use_qk_norm": (),
    "qk_norm": (),
    "attn_temperature_tuning": (),
    "attention_chunk_size": (),
    "attention_k_eq_v": (),
    "sliding_window_pattern": (),
    "sliding_window_size": (),
    "attention_window_size": (),
    "window_size": (),
    "local_attention": (),
    "global_attn_every_n_layers": (),
    "num_attention_heads_per_layer": (),
    "num_key_value_heads_per_layer": (),
    "num_kv_shared_layers": (),
    "multi_query": (),
    "kv_lora_rank": (),
    "q_lora_rank": (),
    "qk_nope_head_dim": (),
    "qk_rope_head_dim": (),
    "v_head_dim": (),
    "index_topk": (),
    "lambda_std_dev": (),
    "use_bidirectional_attention": (),
    "prefix_lm": (),
    "is_encoder_decoder": (),
    "cross_attention_layers": (),
    # layers that are no attention, or run otherwise
    "layers_block_type": (),
    "block_types": (),
    "attn_layer_indices": (),
    "full_attn_idxs": (),
    "linear_num_key_heads": (),
    "mamba_d_state": (),
    "conv_L_cache": (),
    "lru_width": (),
    "parallel_attn": (),
    "use_parallel_residual": (),
    "new_decoder_architecture": (),
    "use_post_norm": (),
    "use_sandwich_norm": (),
    "hc_mult": (),
    "laurel_rank": (),
    "altup_num_inputs": (),
    "hidden_size_per_layer_input": (),
    "n_recurrent_loops": (0, 1),
    "loop_num_passes": (0, 1),
    "hc_count": (),
    "norm_type": ("rms_norm", "rmsnorm"),
    # scales
    "embedding_multiplier": (1,),
    "embedding_scale": (1,),
    "scale_embedding": (),
    "full_attn_alpha_factor": (1,),
    "scale_emb": (1,),
    "scale_depth": (),
    "dim_model_base": (),
    "mup_enabled": (),
    "residual_multiplier": (1,),
    "residual_scale": (1,),
    "lm_head_multiplier": (1,),
    "output_multiplier": (1,),
    "mlp_multipliers": (),
    "logit_scale": (1,),
    "logits_scaling": (1,),
    "logits_soft_cap": (),
    "output_logit_soft_cap": (),
    "lm_head_bias": (),
    "final_logit_softcapping": (),
    # feed-forward blocks
    "hidden_activation": ("silu", "swish"),
    "activation_function": ("silu", "swish"),
    "swiglu_limit": (),
    "swiglu_alpha": (),
    "mlp_gate_softcap": (),
    "activation_sparsity_pattern": (),
    "num_experts": (0, 1),
    "num_local_experts": (0, 1),
    "n_routed_experts": (0, 1),
    "moe_num_experts": (0, 1),
    "num_shared_experts": (),
    "n_shared_experts": (),
    "shared_expert_intermediate_size": (),
    "n_group": (1,),
    "first_k_dense_replace": (),
    "moe_layer_freq": (1,),
    "routed_scaling_factor": (1,),
    "scoring_func": ("softmax",),
    "shared_intermediate_size": (),
    "intermediate_size_mlp": (),
}


def refuse_other_architectures(values: dict[str, Any], family: Family) -> None:
    """Raise ValueError for a configuration whose keys ask for arithmetic that its family does not have.

    Args:
        values: The content of config.json.
    """
    known = (*honoured(family), *honoured_by_experts(values.get("model_type")))
    asked = [key for key, neutral in neutral_values(family).items() if not _is_neutral(values.get(key), neutral)]
    asked = [key for key in asked if key not in known and not _keeps_every_rope(key, values[key])]
    if asked:
        raise ValueError(
            f"the model's config says {', '.join(f'{key}={shown(values[key])}' for key in asked)}, which a model of "
            f"the family {shown(values.get('model_type'))} does not have: it is another architecture, which is not "
            "supported"
        )


def _is_neutral(value: Any, neutral: tuple[Any, ...]) -> bool:
    """Whether a value leaves the arithmetic as it is."""
    off = () if 1 in neutral else (False, 0)
    return value in (None, "", [], {}, *off, *neutral)


def neutral_values(family: Family) -> Mapping[str, tuple[Any, ...]]:
    """KEYS as they are for a family: a value that says what the family has anyway changes nothing."""
    found = dict(KEYS)
    if family.qk_norm:
        found |= dict.fromkeys(("use_qk_norm", "qk_norm"), (True,))
    if family.qkv_bias:
        found |= dict.fromkeys(("use_qkv_bias", "qkv_bias"), (True,))
    if family.full_every is not None:
        found["sliding_window_pattern"] = (family.full_every,)
    return found


def honoured(family: Family) -> tuple[str, ...]:
    """The keys of KEYS that a family gives a meaning to."""
    found = [family.activation]
    if family.query_scalar:
        found += ["query_pre_attn_scalar"]
    found += family.soft_caps
    if family.multipliers:
        found += ["embedding_multiplier", "attention_multiplier", "residual_multiplier", "logits_scaling"]
    if family.patterned:
        found += ["sliding_window_pattern"]
    if family.sliding_theta is not None:
        found += ["rope_local_base_freq"]
    if family.unrotated_every is not None:
        found += ["no_rope_layers", "no_rope_layer_interval"]
    return tuple(found)


def _keeps_every_rope(key: str, value: Any) -> bool:
    """Whether no_rope_layers, 1 for a layer with rotary embedding, lets every layer have it."""
    return key == "no_rope_layers" and isinstance(value, list) and all(value)
