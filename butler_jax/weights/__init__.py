"""Stored models become base models.

Hugging Face directories, GGUF files and the embedded model all become a `Base`.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={"export": ["save_model"], "loading": ["Base", "fingerprint", "load_base"]},
)
