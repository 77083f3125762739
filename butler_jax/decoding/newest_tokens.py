"""The newest token of every row: where it stands, and which tokens a layer lets it see."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from butler_jax.model import BaseConfig, sliding_windows


class Newest(NamedTuple):
    """The newest tokens of a batch; several a row where a prompt is prefilled in chunks.

    Attributes:
        cached: Tokens before them in each row.
        sliding_windows: Tokens that each layer sees; None where no layer slides.
    """

    cached: Int[Array, " B"]
    sliding_windows: Int[np.ndarray, " L"] | None

    @property
    def total(self) -> Int[Array, " B"]:
        """Tokens of each row, one new token included."""
        return self.cached + 1

    def sliding_window(self, layer: Int[Array, "*P"]) -> Int[Array, "*P"] | None:
        """How many tokens a layer sees; None where no layer slides."""
        return None if self.sliding_windows is None else jnp.asarray(self.sliding_windows)[layer]

    def first(self, layer: Int[Array, ""]) -> Int[Array, " B"] | None:
        """The first token that each row sees in a layer; None where no layer slides."""
        return None if self.sliding_windows is None else jnp.maximum(self.total - self.sliding_window(layer), 0)

    def count(self, layer: Int[Array, ""]) -> Int[Array, " B"]:
        """How many tokens each row sees in a layer, itself included."""
        first = self.first(layer)
        return self.total if first is None else self.total - first


def newest_of(base: BaseConfig, cached: Int[Array, " B"]) -> Newest:
    """Where the tokens stand that follow `cached` tokens of each row."""
    found = sliding_windows(base)
    return Newest(cached, None if found is None else np.asarray(found, np.int32))
