"""The two distillation losses, exact over all the pairs they are about, without a T x T matrix.

Both compare the scores of a predictor with the logits of a frozen attention layer: `cross_entropy.py` and
`squared_error.py`. The other modules are their passes, targets and kernels.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "cross_entropy": ["attend_with_cross_entropy"],
        "target": ["ErrorRule", "ErrorTarget", "FarKeys"],
        "squared_error": ["attend_with_squared_error", "require_products"],
    },
)
