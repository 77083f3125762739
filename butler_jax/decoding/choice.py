"""Which units of its cache a layer reads for the newest token of each row."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from butler_jax.decoding.eviction import Eviction, evict_row
from butler_jax.decoding.layer_forecast import LayerForecast
from butler_jax.decoding.newest_tokens import Newest
from butler_jax.decoding.plan import Plan
from butler_jax.decoding.scoring import BlockQueries, chunk_of, pooled_scores
from butler_jax.decoding.store import KVStore
from butler_jax.model import LayerView
from butler_jax.parallel import by_rows_and_heads, token_axis
from butler_jax.policies import Place
from butler_jax.predictors import at
from butler_jax.selection import (
    Chosen,
    Limits,
    attended_tokens,
    beyond,
    choose,
    chosen_tokens,
    kept,
    share_counts,
    weigh_units,
    with_recent,
)
from pallas_kernels import choose_by_importance, compact, select_top_k

FORGOTTEN = -1  # stands in the place of the first unit of every set where no choice is kept


@dataclass(frozen=True)
class Chooser:
    """The choices of one decode step under a plan.

    Attributes:
        plan: What is chosen, by which policy and when.
        limits: Budgets and thresholds as data; None where everything is read.
        newest: Where the new tokens stand.
        steps: Decode steps so far.
        now: Whether this step chooses; between the choices of an interval, what was chosen stays.
        kv: Keys and values, for policies that look at them.
        memory: What the choices before remember (`DecodeState.memory`).
    """

    plan: Plan
    limits: Limits | None
    newest: Newest
    steps: Int[Array, ""]
    now: Bool[Array, ""]
    kv: KVStore
    memory: Chosen | Eviction | None

    def choose(self, view: LayerView, known: LayerForecast) -> tuple[Chosen, Chosen | Eviction | None]:
        """The units that the layer in view reads, and what it remembers of them."""
        if self.plan.when == "ahead":
            return self.settle(view.index, known.chosen)
        if self.plan.interval == 1:
            return self._choose_in_layer(view, known), None
        cached = self.kv.layer(view.index) if self.kv.on_host else None  # no condition around what runs on the host
        keep = jax.lax.cond(
            self.now,
            lambda: self._without_recent(self._choose_in_layer(view, known, cached)),
            lambda: at(self.memory, view.index),
        )
        return self._with_recent(keep), keep

    def settle(self, layer: Int[Array, ""], chosen: Chosen) -> tuple[Chosen, Chosen | None]:
        """The units that a layer reads whose choice was made ahead, and what it remembers of them."""
        if self.plan.interval == 1:
            return chosen, None
        keep = jax.lax.cond(self.now, lambda: self._without_recent(chosen), lambda: at(self.memory, layer))
        return self._with_recent(keep), keep

    def remember(self, view: LayerView, memory: Any, weights: Float[Array, "B K S"] | None) -> Any:
        """What the layer remembers once its attention is known; memory: as `choose` gave it."""
        return memory

    def recall(self, layer: Int[Array, ""]) -> Any:
        """What a layer remembers that is not served."""
        return None if self.plan.interval == 1 else jax.tree.map(jnp.zeros_like, at(self.memory, layer))

    def choose_block(self, queries: BlockQueries, layers: Int[Array, " P"]) -> Chosen:
        """The units of P layers by the predictor's scores, [P, B, K, N]."""
        total, sliding_window = self.newest.total, self.newest.sliding_window(layers)
        batch, block, first, threshold = len(total), len(layers), None, None
        lengths = jnp.repeat(total, block)
        if sliding_window is not None:
            first = jnp.maximum(total[:, None] - sliding_window[None], 0).reshape(-1)
        if self.limits.threshold is not None:
            threshold = jnp.tile(self.limits.threshold[layers], (batch, 1))
        if self.plan.selection.allocation == "per_layer" or token_axis(queries.k_imp.shape[-1]) is not None:
            scores = pooled_scores(queries, lengths, first, self.plan)
            chosen = self._select(scores, lengths, first, threshold)
        else:
            chosen = self._select_by_importance(queries, lengths, first, threshold)
        return jax.tree.map(lambda a: jnp.swapaxes(a.reshape(batch, block, *a.shape[1:]), 0, 1), chosen)

    def count_tokens(self, chosen: Chosen, layer: Int[Array, ""]) -> Int[Array, "B K"]:
        """How many tokens the units hold that the row may see."""
        return attended_tokens(chosen, self.newest.total, self.newest.first(layer), self._unit)

    def mask_tokens(self, chosen: Chosen, layer: Int[Array, ""]) -> Bool[Array, "B K S"]:
        """The set of these tokens."""
        return chosen_tokens(chosen, self.newest.total, self.newest.first(layer), self._unit, self.kv.capacity)

    @property
    def _unit(self) -> int:
        return self.plan.selection.unit

    def _without_recent(self, chosen: Chosen) -> Chosen:
        """A choice as it is kept for the next steps."""
        return kept(chosen, self.newest.total, self.plan.selection)

    def _with_recent(self, keep: Chosen) -> Chosen:
        """A choice that was kept, with the tokens that were recent then and all since."""
        selection = self.plan.selection
        return with_recent(keep, self.steps % selection.interval, self.newest.total, selection, self.kv.capacity)

    def _choose_in_layer(self, view: LayerView, known: LayerForecast, cached: Any = None) -> Chosen:
        """The choice of a policy that ranks by the layer's own queries, keys or values."""
        selection = self.plan.selection
        chunk = chunk_of(view, *(cached or self.kv.layer(view.index)), self.newest, known.scores, known.offset)
        scores = self.plan.policy(chunk.under(selection))
        threshold = None if self.limits.threshold is None else self.limits.threshold[view.index][None]
        if selection.allocation == "top_p":
            weighed = weigh_units(scores, chunk.allowed[:, None], chunk.rows, selection, chunk.columns)
            scores, threshold = weighed.scores, weighed.threshold(threshold[..., None])[..., 0]
        return self._select(scores[:, :, 0], self.newest.total, self.newest.first(view.index), threshold)

    def _select(self, scores, lengths, first, threshold) -> Chosen:
        """Units by scores [B, K, S] of rows that hold `lengths` tokens and see those from `first` on."""
        plan, counts, kv_heads = self.plan, None, self.kv.k.shape[2]

        def run(scores, lengths, tokens, counts, first, threshold):
            options = dict(counts=counts, first=first, threshold=threshold, implementation=plan.implementation)
            select, size = partial(select_top_k, scores, lengths), scores.shape[-1]
            return choose(select, size, lengths, tokens, plan.room, plan.selection, **options)

        tokens, threshold = self._budgets(lengths, first, threshold, scores.shape[1])
        if plan.selection.allocation == "per_layer":  # over all heads, before the mesh splits them
            counts = share_counts(scores, lengths, tokens, plan.selection, first)
        operands, result = ("bw-", "b", "b", "bw", "b", "bw"), Chosen("bw-", "bw-")
        split = by_rows_and_heads(run, operands, result, rows=self.newest.cached.shape[0], heads=kv_heads)
        return split(scores, lengths, tokens, counts, first, threshold)

    def _select_by_importance(self, queries: BlockQueries, lengths, first, threshold) -> Chosen:
        """The same by the predictor's scores, which are not needed themselves."""
        plan, kv_heads = self.plan, self.kv.k.shape[2]

        def run(lengths, tokens, first, threshold, *fields):
            queries = BlockQueries(*fields)
            options = queries.options(plan.policy.predictor_pooling)
            select = partial(choose_by_importance, queries.q_imp, queries.k_imp, lengths, **options)
            options = dict(first=first, threshold=threshold, implementation=plan.implementation)
            return choose(select, queries.k_imp.shape[-1], lengths, tokens, plan.room, plan.selection, **options)

        tokens, threshold = self._budgets(lengths, first, threshold, kv_heads)
        operands, result = ("b", "b", "b", "bh", *queries.splits), Chosen("bh-", "bh-")
        split = by_rows_and_heads(run, operands, result, rows=self.newest.cached.shape[0], heads=kv_heads)
        return split(lengths, tokens, first, threshold, *queries)

    def _budgets(self, lengths, first, threshold, heads: int) -> tuple[Int[Array, " B"], Float[Array, "B K"] | None]:
        """The tokens that rows may read, and the threshold of their heads."""
        count = lengths if first is None else lengths - first
        threshold = beyond(self.limits.min_context, count[:, None], threshold)
        if threshold is not None:
            threshold = jnp.broadcast_to(threshold, (len(lengths), heads))
        return self.limits.table[count], threshold


@dataclass(frozen=True)
class EvictingChooser(Chooser):
    """The choices of a policy that evicts: what it has kept, the newest token included."""

    def choose(self, view, known):
        """The tokens kept, and the set of them to be remembered."""
        keep = evict_row(
            self.plan.policy, at(self.memory, view.index), *self._row(view.index), self.plan.selection.rule
        )
        return compact(keep, self.plan.room), keep

    def recall(self, layer):
        """What is kept, and the policy's memory."""
        return at(self.memory, layer)

    def remember(self, view, memory, weights):
        """What is kept and the policy's memory after this row."""
        place, _, budget = self._row(view.index)
        before = at(self.memory, view.index)
        return Eviction(memory, self.plan.policy.observe(before.memory, weights, place, budget))

    def _row(self, layer):
        """Place, first visible column and budget of the new row in a layer."""
        place = Place(self.newest.cached, jnp.zeros_like(self.newest.cached))
        first = self.newest.first(layer)
        low = place.start if first is None else first
        return place, low, self.limits.table[self.newest.total - low]


def empty_memory(plan: Plan, layers: int, batch: int) -> Chosen | None:
    """Return room for the units that every layer keeps between the choices of an interval; None without one."""
    if plan.interval == 1:
        return None
    shape = (layers, batch, plan.heads, plan.room)
    return Chosen(jnp.zeros(shape, jnp.int32), jnp.zeros(shape, bool))


def forget(memory: Chosen | None) -> Chosen | None:
    """The memory after a step that chose nothing: the next step of an interval chooses."""
    return None if memory is None else memory._replace(indices=memory.indices.at[..., 0].set(FORGOTTEN))


def make_chooser(plan: Plan, *, steps: Int[Array, ""], memory: Chosen | Eviction | None, **parts: Any) -> Chooser:
    """The chooser of a plan; parts: the other fields of `Chooser` but `now`."""
    now = steps % plan.interval == 0
    if plan.interval > 1:
        now |= jnp.any(memory.indices[..., 0] == FORGOTTEN)
    return (EvictingChooser if plan.when == "evicting" else Chooser)(plan, steps=steps, now=now, memory=memory, **parts)
