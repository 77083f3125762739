"""The operations for any platform that XLA compiles for, fast on CPU."""

from pallas_kernels.xla.attention import masked_topk_decode_attention
from pallas_kernels.xla.scores import importance_scores, importance_totals
from pallas_kernels.xla.selection import select_top_k

__all__ = ["importance_scores", "importance_totals", "masked_topk_decode_attention", "select_top_k"]
