"""The frozen base model: its configuration, its families, its layers, and one scan over them.

Every pass is a call of `run_layers`: a mixer receives each layer's view and returns the attention output.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "attention": [
            "CHUNK",
            "LOWEST",
            "causal_attention",
            "chunk_mask",
            "document_starts",
            "exponentials",
            "make_bands",
            "masked_softmax",
            "merge_queries",
            "split_keys",
            "split_queries",
            "split_segments",
            "weighted_values",
        ],
        "config": ["BaseConfig", "RopeConfig"],
        "contributions": ["centred_squares", "output_gram", "project_values"],
        "decoder": [
            "BaseModel",
            "LOGICAL_AXES",
            "LayerView",
            "by_sliding_window",
            "check_length",
            "dense_mixer",
            "embed",
            "few_tokens",
            "sliding_windows",
            "forward",
            "logits",
            "parameter_count",
            "rope_angles",
            "run_layers",
        ],
        "families": ["FAMILIES", "base_config"],
        "layers": ["layer_norm", "rms_norm", "rope_frequencies", "rotary", "rotary_angles"],
    },
)
