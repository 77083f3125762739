"""Decode attention that reads only the chosen tokens of a cache: in jax.numpy, and in Pallas for TPU and GPU.

It depends on JAX alone. The operations are in `api.py`, and in one call in `composed.py`. `reference.py` defines what
they compute.
"""

from pallas_kernels.api import (
    importance_scores,
    importance_totals,
    masked_topk_decode_attention,
    quantise_k_imp,
    select_top_k,
)
from pallas_kernels.checks import check_implementation
from pallas_kernels.choice import (
    BARRED,
    TOP,
    Rules,
    Selection,
    contested_range,
    from_image,
    image_of,
    ordered_image,
    rank_image,
    unit_image,
)
from pallas_kernels.composed import choose_by_importance, sparse_decode_attention
from pallas_kernels.spans import Spans, span_sums
from pallas_kernels.xla.selection import compact, top_mask

__all__ = [
    "BARRED",
    "TOP",
    "Rules",
    "Selection",
    "Spans",
    "check_implementation",
    "choose_by_importance",
    "compact",
    "contested_range",
    "from_image",
    "image_of",
    "importance_scores",
    "importance_totals",
    "masked_topk_decode_attention",
    "ordered_image",
    "quantise_k_imp",
    "rank_image",
    "select_top_k",
    "span_sums",
    "sparse_decode_attention",
    "top_mask",
    "unit_image",
]
