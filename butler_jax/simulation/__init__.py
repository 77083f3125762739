"""A whole text in one pass in which every row reads its own choice only, as decoding would.

Recall, calibrated thresholds and the statistics of results stand beside it.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "calibration": ["calibrate_thresholds"],
        "chunks": ["Importance", "importance_walk", "map_chunks"],
        "recall": ["LEAST_KEYS", "Recall", "best", "measure_recall", "top_half"],
        "choice": ["chosen_mask", "sparse_chunk", "with_rule"],
        "simulator": ["Simulated", "count_keys", "simulate"],
        "statistics": ["Estimate", "ratio", "share"],
    },
)
