"""The frozen base model: its configuration, its families, its layers, and one scan over them.

Every pass is a call of `run_layers`: a mixer receives each layer's view and returns the attention output.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "adapter": ["AttentionInputs", "LayerWeights", "ModelAdapter", "place_model", "split_layers"],
        "angles": ["RotaryAngles", "rope_angles"],
        "attention": [
            "Band",
            "CHUNK",
            "LOWEST",
            "causal_attention",
            "chunk_mask",
            "document_places",
            "document_starts",
            "exponentials",
            "grouped_sinks",
            "make_bands",
            "masked_exponentials",
            "masked_softmax",
            "merge_groups",
            "merge_queries",
            "split_groups",
            "split_keys",
            "split_queries",
            "split_segments",
            "weighted_values",
        ],
        "checks": ["check_ids", "check_length", "check_tokens", "require_fit", "require_loaded", "require_model"],
        "config": ["BaseConfig", "RopeConfig"],
        "contributions": ["centred_squares", "output_gram", "output_projection", "project_values"],
        "decoder": [
            "BaseModel",
            "LOGICAL_AXES",
            "LayerView",
            "Mixer",
            "by_service",
            "by_sliding_window",
            "dense_mixer",
            "embed",
            "few_tokens",
            "is_served",
            "sliding_windows",
            "forward",
            "logits",
            "normed_stream",
            "parameter_count",
            "run_layers",
            "sink_logits",
            "weights_of",
        ],
        "families": ["FAMILIES", "Family"],
        "hugging_face_config": ["base_config"],
        "layers": ["layer_norm", "rms_norm", "rope_frequencies", "rotary", "rotary_angles", "soft_cap"],
        "partial_attention": ["PartialAttention"],
        "named_leaves": ["compare_leaves", "name_leaves", "place_leaves"],
    },
)
