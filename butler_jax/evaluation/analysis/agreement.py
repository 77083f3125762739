"""How attention changes: agreement of heads and of decode steps, overlap of the best tokens, hit rate against drift.

The analyses of TokenButler, arXiv 2503.07518, on the last C rows of each sequence (the decode steps, see rows.py), all
from one dense pass. Where the paper leaves a definition open, the docstring has ours. Divergences are Jensen-Shannon,
in nats: 0 for equal distributions, log 2 for disjoint ones. Layer 0 is measured too. Decoding always runs it densely,
so means over layers begin with layer 1. Where other layers are not served either, steps and rows have NaN for them.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from butler_jax.data import Batch, as_batch
from butler_jax.evaluation.analysis.rows import by_heads, last_rows, of_served, see_rows, softmax
from butler_jax.model import BaseModel, check_length
from butler_jax.policies import Chunk, Evicting, Policy, TokenButler, settle_policy
from butler_jax.predictors import Predictor
from butler_jax.selection import Limits, SelectionConfig, budget_table, limits_of
from butler_jax.simulation import LEAST_KEYS, choose_best, choose_half, chosen_mask

PUBLISHED = {1: 0.667, 5: 0.548, 10: 0.503, 25: 0.463, 49: 0.407}
"""Overlap with step 0 by decode step, as published for Llama-3.1-8B (arXiv 2503.07518)."""


class Access(NamedTuple):
    """Which tokens C consecutive rows read; K is H for a policy that chooses per query head.

    Attributes:
        frequency: Of the rows that may see a token, the share that reads it; NaN where no row may.
        agreement: Tokens that both of two rows read, over tokens that either reads; mean over KV heads and sequences.
        consistency: Of the tokens that a row reads, the share that the next row reads too.
    """

    frequency: Float[np.ndarray, "B L K T"]
    agreement: Float[np.ndarray, "L C C"]
    consistency: Float[np.ndarray, "B L K C-1"]


class Overlap(NamedTuple):
    """Share of the best tokens of step 0 that are among the best of step n, for n = 0 ... C-1.

    Attributes:
        true: The best by the attention weights.
        predicted: The best by the predictor's scores, at step n and at step 0; None without a predictor.
    """

    true: Float[np.ndarray, "B L H C"]
    predicted: Float[np.ndarray, "B L H C"] | None

    def curve(self, predicted: bool = False) -> tuple[Float[np.ndarray, " C"], Float[np.ndarray, " C"] | None]:
        """The mean over served layers, heads and sequences, and its standard error over sequences (None for one)."""
        each = np.nanmean((self.predicted if predicted else self.true)[:, 1:], axis=(1, 2))
        return each.mean(axis=0), None if len(each) < 2 else each.std(axis=0, ddof=1) / len(each) ** 0.5


class Drift(NamedTuple):
    """For C rows, the predictor's hit rate, and how attention differs from that of the row `distance` earlier.

    Attributes:
        hit_rate: As in `Recall`, per query head.
        moved: 1 - overlap of the best tokens of the two rows, over the keys that both see.
        divergence: Between the attention of the two rows, over the keys that both see.
    """

    hit_rate: Float[np.ndarray, "B L H C"]
    moved: Float[np.ndarray, "B L H C"]
    divergence: Float[np.ndarray, "B L H C"]


class Binned(NamedTuple):
    """Bins along x: mean x, mean y, its standard error for independent values, number of values."""

    x: Float[np.ndarray, " bins"]
    y: Float[np.ndarray, " bins"]
    error: Float[np.ndarray, " bins"]
    count: Int[np.ndarray, " bins"]


def measure_head_agreement(model: BaseModel, batch: Batch, *, rows: int = 50) -> Float[np.ndarray, "L H H"]:
    """Measure the divergence between the attention of every two query heads of a layer, mean over the last rows.

    Raises:
        ValueError: As `last_rows` does, and where the batch is longer than the model's context.
    """
    return np.asarray(_head_agreement(model, *_prepare(model, batch, rows)))


def measure_step_agreement(model: BaseModel, batch: Batch, *, rows: int = 50) -> Float[np.ndarray, "L C C"]:
    """Measure the divergence between the attention of every two of the last C rows.

    It is taken over the keys that all of these rows see (the cache before step 0), where each row's attention is scaled
    to a sum of 1, and averaged over query heads and sequences.

    Raises:
        ValueError: As `measure_head_agreement` does, and where the model's sliding window is shorter than the rows.
    """
    _check_sliding_window(model, rows)
    return of_served(model.config, np.asarray(_step_agreement(model, *_prepare(model, batch, rows))), axis=0)


def measure_overlap(
    model: BaseModel, predictor: Predictor | None, batch: Batch, *, rows: int = 50, fraction: float = 0.1
) -> Overlap:
    """Measure how much of the top `fraction` of the keys at step 0 is in the top `fraction` at later steps, C in all.

    The best are ceil(fraction * n) of the n keys that all steps see, ties to the earlier one. Sinks and recent tokens
    are treated like all others. Without a predictor, `predicted` is left out.

    Raises:
        ValueError: As `measure_step_agreement` does, and for a fraction that is not between 0 and 1.
    """
    _check_sliding_window(model, rows)
    batch, columns = _prepare(model, batch, rows)
    true, predicted = _overlap(model, predictor, batch, columns, _sizes(batch, fraction))
    return Overlap(*(None if a is None else of_served(model.config, by_heads(a)) for a in (true, predicted)))


def measure_drift(
    model: BaseModel,
    predictor: Predictor,
    batch: Batch,
    *,
    rows: int = 64,
    distance: int = 8,
    fraction: float = 0.1,
) -> Drift:
    """Measure the predictor's hit rate on the last C rows, with each row's drift since the row `distance` earlier.

    If the predictor only repeated what was important before, its hit rate would fall where attention changed. The best
    tokens are those of `measure_overlap`.

    Raises:
        ValueError: As `measure_overlap` does, for rows + distance rows; without a predictor; for a distance below 1.
    """
    TokenButler().require_predictor(predictor)
    if distance <= 0:
        raise ValueError(f"the distance must be at least 1 row, got {distance}")
    _check_sliding_window(model, distance + 1)
    batch, columns = _prepare(model, batch, rows + distance)
    found = _drift(model, predictor, batch, columns, _sizes(batch, fraction), distance=distance)
    return Drift(*(of_served(model.config, by_heads(a)) for a in found))


def measure_access(
    model: BaseModel,
    predictor: Predictor | None,
    batch: Batch,
    policy: Policy | str,
    selection: SelectionConfig | None = None,
    *,
    rows: int = 50,
) -> Access:
    """Measure how consistently tokens are read: the sets that a policy chooses for the last C rows, and how they agree.

    Every row chooses for itself, from the queries and keys of the dense pass. Layers that are not served read
    everything. The default selection is SelectionConfig().

    Raises:
        ValueError: As `measure_head_agreement` does, for a policy that evicts or lacks its predictor, and where the
            selection has an interval.
    """
    policy, predictor = check_policy(policy, predictor)
    selection = choose_selection(policy, selection)
    batch, columns = _prepare(model, batch, rows)
    limits = limits_of(selection, model.config, batch["tokens"].shape[1], policy.choosing_heads(model.config))
    frequency, agreement, kept = _token_access(
        model, predictor, batch, columns, limits, policy=policy, rule=selection.rule
    )
    base, frequency, kept = model.config, *(np.swapaxes(np.asarray(a), 0, 1) for a in (frequency, kept))
    return Access(frequency, of_served(base, np.asarray(agreement), axis=0), of_served(base, kept))


def bin_means(x: np.ndarray, y: np.ndarray, bins: int = 10) -> Binned:
    """Average y in up to `bins` bins of about equally many values along x. Equal x share a bin.

    Pairs with a NaN are left out.
    """
    x, y = np.ravel(x).astype(np.float64), np.ravel(y).astype(np.float64)
    x, y = (a[~np.isnan(x) & ~np.isnan(y)] for a in (x, y)) if x.size == y.size else (x, y)
    if not (x.size == y.size > 0 and bins > 0):
        raise ValueError(f"nothing to bin: {x.size} and {y.size} values, {bins} bins")
    edges = np.unique(np.quantile(x, np.arange(1, bins) / bins))
    number = np.searchsorted(edges, x, side="left")
    parts = [(x[number == n], y[number == n]) for n in np.unique(number)]
    error = [b.std(ddof=1) / b.size**0.5 if b.size > 1 else np.nan for _, b in parts]
    means = ([p[i].mean() for p in parts] for i in range(2))
    return Binned(*map(np.array, means), np.array(error), np.array([a.size for a, _ in parts]))


def check_policy(policy: Policy | str, predictor: Predictor | None) -> tuple[Policy, Predictor | None]:
    """The policy, which may be given by its name, as it uses the predictor, and the predictor if it needs one.

    Raises ValueError for a policy that evicts, or that lacks its predictor.
    """
    policy = settle_policy(policy)
    if isinstance(policy, Evicting):
        raise ValueError(f"{policy.name} evicts row after row and chooses no set for a row; take another policy")
    return policy.for_predictor(predictor), policy.require_predictor(predictor)


def choose_selection(policy: Policy, selection: SelectionConfig | None) -> SelectionConfig:
    """The selection under which every row chooses; default: SelectionConfig(). Raises ValueError for an interval."""
    selection = policy.selection(selection or SelectionConfig()) or SelectionConfig(budget=1.0)
    if selection.interval != 1:
        raise ValueError(f"here every position chooses; the interval must be 1, got {selection.interval}")
    return selection


def _prepare(model: BaseModel, batch: Batch, rows: int) -> tuple[dict[str, Array], Array]:
    check_length(model.config, batch["tokens"].shape[1])
    return as_batch(batch), jnp.asarray(last_rows(batch, rows))


def _check_sliding_window(model: BaseModel, rows: int) -> None:
    sliding_window = model.config.sliding_window
    if not any(slides and serves for slides, serves in zip(model.config.sliding, model.config.served, strict=True)):
        return
    if sliding_window < rows + LEAST_KEYS:
        raise ValueError(
            f"the model's sliding window is {sliding_window} tokens: {rows} rows have too few keys in common; use fewer"
        )


def _sizes(batch: dict[str, Array], fraction: float) -> Int[Array, " S"]:
    """ceil(fraction * n), for n = 0 ... T. Raises ValueError for a fraction that is not between 0 and 1."""
    if not (0 < fraction < 1):
        raise ValueError(f"the fraction must be between 0 and 1, got {fraction}")
    return jnp.asarray(budget_table(SelectionConfig(budget=fraction, sinks=0, recent=1), batch["tokens"].shape[1]))


def measure_share(sets: Bool[Array, "*B S"], of: Bool[Array, "*B S"]) -> Float[Array, "*B"]:
    """The share of each set of `of` that is in `sets` too."""
    return jnp.sum(sets & of, axis=-1, dtype=jnp.int32) / jnp.maximum(jnp.sum(of, axis=-1, dtype=jnp.int32), 1)


def measure_divergence(p: Float[Array, "*B S"], q: Float[Array, "*B S"]) -> Float[Array, "*B"]:
    """Jensen-Shannon divergence in nats: the mean relative entropy of p and of q to their mean."""
    middle = (p + q) / 2
    found = jax.scipy.special.rel_entr(p, middle) + jax.scipy.special.rel_entr(q, middle)
    return jnp.clip(jnp.sum(found, axis=-1) / 2, 0.0, jnp.log(2.0))


def _pairwise(weights: Float[Array, "entries samples S"]) -> Float[Array, "entries entries"]:
    """Divergence of every two entries of axis 0, mean over axis 1."""

    def against(one):
        return jnp.mean(measure_divergence(jnp.broadcast_to(one[None], weights.shape), weights), axis=1)

    return jax.lax.map(against, weights)


def _common(chunk: Chunk) -> Bool[Array, "B C S"]:
    """The keys that all rows of the chunk see, for each row."""
    return jnp.broadcast_to(jnp.all(chunk.allowed, axis=1, keepdims=True), chunk.allowed.shape)


@jax.jit
def _head_agreement(model, batch, rows):
    def look(chunk):
        weights = softmax(chunk.logits, chunk.allowed)
        batch, kv_heads, group, count, keys = weights.shape
        weights = jnp.swapaxes(weights.reshape(batch, kv_heads * group, count, keys), 0, 1)
        return _pairwise(weights.reshape(kv_heads * group, batch * count, keys))

    return see_rows(model, None, batch, rows, look)


@jax.jit
def _step_agreement(model, batch, rows):
    def look(chunk):
        weights = jnp.moveaxis(softmax(chunk.logits, _common(chunk)), 3, 0)
        return _pairwise(weights.reshape(weights.shape[0], -1, weights.shape[-1]))

    return see_rows(model, None, batch, rows, look)


@jax.jit
def _overlap(model, predictor, batch, rows, sizes):
    def look(chunk):
        def kept(scores):
            if scores is None:
                return None
            sets = choose_best(scores, _common(chunk), sizes)
            return measure_share(sets, jnp.broadcast_to(sets[:, :, :, :1], sets.shape))

        return kept(chunk.logits), kept(chunk.predicted)

    return see_rows(model, predictor, batch, rows, look)


@partial(jax.jit, static_argnames="distance")
def _drift(model, predictor, batch, rows, sizes, *, distance):
    def look(chunk):
        keys = chunk.allowed[:, distance:] & chunk.allowed[:, :-distance]
        early, late = chunk.logits[:, :, :, :-distance], chunk.logits[:, :, :, distance:]
        moved = 1 - measure_share(choose_best(late, keys, sizes), choose_best(early, keys, sizes))
        divergence = measure_divergence(softmax(late, keys), softmax(early, keys))
        seen = chunk.allowed[:, distance:]
        halves = choose_half(chunk.predicted[:, :, :, distance:], seen), choose_half(late, seen)
        return measure_share(*halves), moved, divergence

    return see_rows(model, predictor, batch, rows, look)


@partial(jax.jit, static_argnames=("policy", "rule"))
def _token_access(model, predictor, batch, rows, limits: Limits, *, policy: Policy, rule: SelectionConfig):
    def look(chunk):
        mask, _ = chosen_mask(chunk, lambda: policy(chunk.under(rule)), limits, rule)
        seen = jnp.sum(chunk.allowed, axis=1, dtype=jnp.int32)[:, None]
        frequency = jnp.sum(mask, axis=2, dtype=jnp.int32) / jnp.where(seen > 0, seen, jnp.nan)
        sets = mask.astype(jnp.float32)
        both = jnp.einsum("bkis,bkjs->bkij", sets, sets)
        size = jnp.sum(sets, axis=-1)
        agreement = jnp.mean(both / (size[..., None] + size[..., None, :] - both), axis=(0, 1))
        return frequency, agreement, measure_share(mask[:, :, 1:], mask[:, :, :-1])

    return see_rows(model, predictor, batch, rows, look)
