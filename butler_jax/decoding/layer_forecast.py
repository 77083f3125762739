"""What is known of a layer before its attention."""

from __future__ import annotations

from typing import Any, NamedTuple

from jaxtyping import Array, Float

from butler_jax.selection import Chosen


class LayerForecast(NamedTuple):
    """What is known of one layer before its attention; None where it is not.

    Attributes:
        k_imp: The newest token's, to be cached.
        scores: Of all tokens, the newest one's own included.
        offset: Of the newest row.
        chosen: The units that the predictor's scores choose.
        rows: The rows of these units where they had to travel (`KVStore.prefetch`).
    """

    k_imp: Float[Array, "B Q R"] | None = None
    scores: Float[Array, "B Q G S"] | None = None
    offset: Float[Array, "B H"] | None = None
    chosen: Chosen | None = None
    rows: Any = None
