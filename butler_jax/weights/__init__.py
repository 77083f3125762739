"""Loading frozen base models: names in, parameters out."""

from butler_jax.weights.loading import Base, fingerprint, load_base

__all__ = ["Base", "fingerprint", "load_base"]
