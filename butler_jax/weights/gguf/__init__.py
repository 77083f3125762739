"""GGUF files: the header is checked, the metadata becomes a configuration and a tokenizer, blocks become rows.

The library `gguf` reads a file only after its header was checked.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(__name__, submod_attrs={"file": ["open_file"]})
