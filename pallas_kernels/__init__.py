"""Decode attention that reads only the chosen tokens of a cache: in jax.numpy, and in Pallas for TPU and GPU."""

from pallas_kernels.api import (
    Selection,
    importance_scores,
    importance_totals,
    masked_topk_decode_attention,
    quantise_k_imp,
    select_top_k,
    sparse_decode_attention,
)

__all__ = [
    "Selection",
    "importance_scores",
    "importance_totals",
    "masked_topk_decode_attention",
    "quantise_k_imp",
    "select_top_k",
    "sparse_decode_attention",
]
