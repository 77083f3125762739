"""The operations as Pallas kernels for GPU, through Triton: single tokens or pages.

Triton's blocks are powers of two, and its products at least 16 on every side: query heads and widths are padded, and
what is padded is masked when it is loaded.
"""

from pallas_kernels.gpu.attention import masked_topk_decode_attention
from pallas_kernels.gpu.scores import importance_scores, importance_totals
from pallas_kernels.gpu.selection import select_top_k

__all__ = ["importance_scores", "importance_totals", "masked_topk_decode_attention", "select_top_k"]
