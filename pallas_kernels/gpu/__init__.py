"""The operations as Pallas kernels for GPU, through Triton: single tokens or pages.

Triton's blocks are powers of two, and the sides of its products are at least 16. So query heads and widths are padded,
and loads mask the padding.
"""

from pallas_kernels.gpu.attention import masked_topk_decode_attention
from pallas_kernels.gpu.decode import choose_by_importance, sparse_decode_attention
from pallas_kernels.gpu.scores import importance_scores, importance_totals
from pallas_kernels.gpu.selection import select_top_k

__all__ = [
    "choose_by_importance",
    "importance_scores",
    "importance_totals",
    "masked_topk_decode_attention",
    "select_top_k",
    "sparse_decode_attention",
]
