"""The TPU kernels: `pallas_kernels.api` reaches them by these names."""

from pallas_kernels.tpu_attend import masked_topk_decode_attention
from pallas_kernels.tpu_scores import importance_scores, importance_totals
from pallas_kernels.tpu_select import select_top_k

__all__ = ["importance_scores", "importance_totals", "masked_topk_decode_attention", "select_top_k"]
