"""Policies that evict, simulated on whole sequences. Rows run in order, by `decoding.evict_rows`."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from butler_jax.decoding import EvictedRows, evict_rows
from butler_jax.model import LayerView, causal_attention, document_starts
from butler_jax.policies import Evicting
from butler_jax.selection import Limits, Rows, SelectionConfig
from butler_jax.simulation.sharding import rows_whole


class Evicted(NamedTuple):
    """A layer under a policy that evicts.

    Attributes:
        output: Attention over the tokens kept.
        fraction: Fraction of its causal keys that each row read, mean over KV heads.
        mass: True attention weight of the tokens kept, mean over query heads; None unless asked for.
        kept: Tokens that the last row kept, itself included.
    """

    output: Float[Array, "B T H D"]
    fraction: Float[Array, "B T"]
    mass: Float[Array, "B T"] | None
    kept: Bool[Array, "B K T"]


def evicting_attention(
    view: LayerView,
    segments: Int[Array, "B T"],
    sliding_window: int | None,
    policy: Evicting,
    limits: Limits,
    rule: SelectionConfig,
    *,
    mass: bool = False,
) -> Evicted:
    """One layer under a policy that evicts.

    Layer 0, prompts and rows of up to min_context tokens keep everything.

    mass: whether to return the true attention weight of the tokens kept.
    """

    def sparse():
        found, keys = rows_of(
            view, segments, sliding_window, policy, limits.table[None], rule, prompts=limits.prompts, mass=mass
        )
        return found.output, found.read / keys, found.mass, found.state.kept

    def dense():
        one = jnp.ones(segments.shape, jnp.float32)
        how = dict(segments=segments, sliding_window=sliding_window, **view.attention_terms)
        output = causal_attention(view.q, view.k, view.v, **how)
        seen = jnp.arange(segments.shape[1], dtype=jnp.int32)[None] >= document_starts(segments)[:, -1:]
        kept = jnp.broadcast_to(seen[:, None], (seen.shape[0], view.k.shape[2], seen.shape[1]))
        return output.astype(view.v.dtype), one, one if mass else None, kept

    return Evicted(*jax.lax.cond(view.index > 0, sparse, dense))


def evicted_sums(
    view: LayerView,
    segments: Int[Array, "B T"],
    sliding_window: int | None,
    policy: Evicting,
    tables: Int[Array, "budgets _"],
    rule: SelectionConfig,
    counted: Bool[Array, "B T"],
    prompts: Int[Array, " B"] | None = None,
) -> tuple[Float[Array, "budgets B"], Float[Array, "budgets B"]]:
    """Recalled mass and attended fraction of a layer under several budgets, summed over the rows that are counted.

    All rows run, since each depends on those before it, and those of a prompt keep everything. Layer 0, which is always
    dense, gives zeros.
    """

    def sparse():
        how = dict(prompts=prompts, output=False, mass=True)
        found, keys = rows_of(view, segments, sliding_window, policy, tables, rule, **how)

        def total(a):
            split = a.reshape(tables.shape[0], *segments.shape)
            return jnp.sum(jnp.where(counted[None], split, 0.0), axis=2)

        return total(found.mass), total(found.read.reshape(-1, *keys.shape) / keys[None])

    nothing = jnp.zeros((tables.shape[0], segments.shape[0]), jnp.float32)
    return jax.lax.cond(view.index > 0, sparse, lambda: (nothing, nothing))


def rows_of(
    view: LayerView,
    segments: Int[Array, "B T"],
    sliding_window: int | None,
    policy: Evicting,
    tables: Int[Array, "budgets _"],
    rule: SelectionConfig,
    *,
    prompts: Int[Array, " B"] | None = None,
    **wanted: bool,
) -> tuple[EvictedRows, Float[Array, "B T"]]:
    """`decoding.evict_rows` on packed sequences, and the number of keys that each row may see."""
    starts = document_starts(segments)
    own = jnp.broadcast_to(jnp.arange(segments.shape[1], dtype=jnp.int32)[None], segments.shape)
    rows = Rows(own, starts)
    keys = rows.seen(sliding_window)
    budgets = tables[:, keys]
    if prompts is not None:
        budgets = jnp.where((own - starts < prompts[:, None])[None], keys[None], budgets)
    how = view.attention_terms | wanted
    q, k, v = (rows_whole(a, view.k.shape[2]) for a in (view.q, view.k, view.v))
    found = evict_rows(policy, q, k, v, rows, budgets, sliding_window, rule, **how)
    return found, keys.astype(jnp.float32)
