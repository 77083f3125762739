"""One token at a time: prefill the caches, then score, choose and attend at every step.

`generate` puts text around it: ragged prompts, sampling and streaming.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "capacity": ["bucket"],
        "choice": ["empty_memory"],
        "config": ["SAMPLING_FILES", "SamplingConfig", "read_sampling"],
        "conversation": ["chat"],
        "plan": ["make_plan"],
        "eviction": ["EvictedRows", "evict_rows"],
        "generated": ["Generated", "Piece"],
        "generation": ["generate", "generate_stream"],
        "prefill_pass": ["prefill"],
        "prompt_cache": ["PromptCache"],
        "requests": ["Completion", "Request"],
        "sampling": ["GREEDY"],
        "score_cache": ["check_score_dtype", "rounded"],
        "serving": ["serve"],
        "step": ["Found", "decode_step"],
    },
)
