"""Decoding simulated on a whole text in one pass, in which every row reads only its own choice.

The package also has recall, calibrated thresholds and the statistics of results.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "calibration": ["calibrate_thresholds", "calibrate_tolerance"],
        "choice": ["chosen_mask", "sparse_chunk"],
        "chunks": ["Importance", "importance_walk", "map_chunks", "merge_rows"],
        "nan_scores": ["measure_nan_scores"],
        "prompts": ["ReadPrompts", "read_prompts"],
        "recall": ["LEAST_KEYS", "Recall", "choose_best", "choose_half", "measure_recall"],
        "simulator": ["Simulated", "count_keys", "simulate"],
        "statistics": ["Estimate", "estimate_ratio", "estimate_share"],
    },
)
