"""How the embedded base model `tiny` was made: tokenizer, weights and card.

`butler-jax pretrain` repeats the recipe.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={"config": ["PretrainConfig"], "recipe": ["pretrain"]},
)
