"""Top-p: the fewest units whose estimated attention weights sum to p (Twilight, Lin et al. 2025, arXiv 2502.02770).

Sinks and recent tokens are always read, and their weights count. What stays unread may weigh 1 - p at most. So a row
and head has a lowest weight that is read, and the machinery of thresholds reads what reaches it. Units of one weight
are read together.

Twilight estimates the weights by keys in int4, after another method has chosen a generous budget. Here the policy's own
scores estimate them, and the budget is the most that a head may read.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from butler_jax.selection.config import SelectionConfig
from butler_jax.selection.masks import Pages, Rows, always_chosen
from pallas_kernels import BARRED, from_image, ordered_image


class WeighedUnits(NamedTuple):
    """The weights of the units of each row and choosing head.

    Attributes:
        scores: For every token the logarithm of its unit's weight; inf in units that are always read.
        units: The logarithm of every unit's weight.
        contested: The units that a row may see and that are not always read.
    """

    scores: Float[Array, "B K C S"]
    units: Float[Array, "B K C U"]
    contested: Bool[Array, "B _ C U"]

    def threshold(self, unread: Float[Array, "#B #K #C"]) -> Float[Array, "B K C"]:
        """The largest score such that the contested units below it weigh at most exp(unread) together.

        unread: The logarithm of 1 - p. -inf reads everything, and inf nothing that is contested.
        """
        image = ordered_image(self.units)
        weights = jnp.where(self.contested, jnp.exp(self.units), 0.0)
        most = jnp.exp(unread)

        def narrow(step, found):
            trial = found + (jnp.int32(1) << (30 - step))
            left = jnp.sum(jnp.where(image < trial[..., None], weights, 0.0), axis=-1)
            return jnp.where(left <= most, trial, found)

        lowest = jnp.full(self.units.shape[:-1], BARRED, jnp.int32)
        found = from_image(jax.lax.fori_loop(0, 31, narrow, lowest))  # negative, as the logarithms of weights are
        found = jnp.where(jnp.isnan(found), -jnp.inf, found)
        return jnp.where(jnp.isposinf(unread), jnp.inf, jnp.where(jnp.isneginf(unread), -jnp.inf, found))


def weigh_units(
    scores: Float[Array, "B K C S"],
    allowed: Bool[Array, "B Q C S"],
    rows: Rows,
    config: SelectionConfig,
    columns: Int[Array, " S"] | None = None,
) -> WeighedUnits:
    """Weigh the units of each row.

    Args:
        scores: Logarithms of the weights of tokens, of which each row's sum to at most 1.
        allowed: The keys that a query may see, as `select_mask` takes them.
        rows: Columns of the query rows and of the first token of their documents.
        config: Of it, sinks, recent and unit are used.
        columns: Positions of the keys, consecutive; 0 ... S-1 unless given.
    """
    columns = jnp.arange(scores.shape[-1], dtype=jnp.int32) if columns is None else columns
    always = always_chosen(rows, columns, config.sinks, config.recent)[:, None] & allowed
    if config.unit == 1:
        return WeighedUnits(jnp.where(always, jnp.inf, scores), scores, allowed & ~always)
    pages = Pages(config.unit, columns[0] - rows.start)
    units = jnp.log(pages.sums(jnp.where(allowed, jnp.exp(scores), 0.0)))
    always, seen = (pages.image(jnp.where(mask, 1, BARRED)) > BARRED for mask in (always, allowed))
    scores = pages.columns(jnp.where(always, jnp.inf, units), scores.shape[-1])
    return WeighedUnits(scores, units, seen & ~always)
