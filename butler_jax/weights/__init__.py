"""Stored models become base models.

Hugging Face directories, GGUF files, the embedded model and decoders of other libraries all become a `Base`.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "adapted": ["adapt_model"],
        "export": ["save_model"],
        "huggingface": ["download", "open_safetensors", "parse_hub_id", "upload"],
        "loading": ["Base", "fingerprint", "is_spec_of", "load_base"],
    },
)
