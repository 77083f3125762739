"""The command `butler-jax`: one module for each subcommand.

Heavy imports happen inside the functions that need them, so that --help is quick.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(__name__, submod_attrs={"program": ["main"]})
