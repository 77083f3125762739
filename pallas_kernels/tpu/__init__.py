"""The operations as Pallas kernels for TPU: units of whole words: one token of float32, two of bfloat16, and more."""

from pallas_kernels.tpu.attention import masked_topk_decode_attention
from pallas_kernels.tpu.scores import importance_scores, importance_totals
from pallas_kernels.tpu.selection import select_top_k

__all__ = ["importance_scores", "importance_totals", "masked_topk_decode_attention", "select_top_k"]
