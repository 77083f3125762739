"""Recalled attention mass, hit rate and rank correlation of policies, all from one dense pass."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from butler_jax.model import BaseModel, by_window, dense_mixer, embed, masked_softmax, run_layers
from butler_jax.parallel import on_host
from butler_jax.policies import Chunk, Evicting, Policy, Scoring
from butler_jax.predictors import Predictor
from butler_jax.selection import Limits, SelectionConfig, budget_table, select_best
from butler_jax.simulation.choice import chosen_mask
from butler_jax.simulation.chunks import importance_walk, map_chunks, spread_rows
from butler_jax.simulation.eviction import evicted_sums
from butler_jax.simulation.statistics import Estimate, ratio

LEAST_KEYS = 32  # rows with fewer keys have no hit rate


@dataclass(frozen=True)
class Recall:
    """Means over layers 1 ..., query heads and all measured rows, per policy.

    mass[policy][budget]: the sum of the true attention weights inside the chosen set. attended[policy][budget]:
    fraction of the causal keys chosen. hit_rate[policy]: the share of the top half by true logit that is in the top
    half by score. spearman[policy]: correlation of the ranks by score with the ranks by true logit, equal scores with
    their mean rank. The last two per query head, rows of at least 32 keys, not for policies that evict. by_head: the
    hit rate of every layer from 1 on and query head.
    """

    mass: dict[str, dict[float, Estimate]]
    attended: dict[str, dict[float, Estimate]]
    hit_rate: dict[str, Estimate]
    spearman: dict[str, Estimate]
    by_head: dict[str, Float[np.ndarray, "L H"]]


class Sums(NamedTuple):
    """What one pass adds up over the rows of each sequence, P policies and N budgets.

    mass, attended: over layers too, means over heads. hits, spearman: of every layer and query head. rows, long: how
    many rows were measured, and how many of them have at least 32 keys.
    """

    mass: Float[Array, "P N B"]
    attended: Float[Array, "P N B"]
    hits: Float[Array, "P L H B"]
    spearman: Float[Array, "P L H B"]
    rows: Float[Array, " B"]
    long: Float[Array, " B"]


def measure_recall(
    model: BaseModel,
    predictor: Predictor | None,
    batches: Iterable[dict[str, np.ndarray]],
    policies: Sequence[Policy],
    budgets: Sequence[float | int],
    *,
    sinks: int = 4,
    recent: int = 8,
    rows: int | None = None,
    ranks: bool = True,
    score_dtype: str | None = None,
    implementation: str | None = None,
) -> Recall:
    """Measure policies on batches (tokens, segments, positions) of one shape.

    rows: about how many query rows to measure in every sequence, in chunks spread evenly along it (None: all), the same
    ones for all policies; the smaller, the cheaper, though policies that evict walk through all. ranks: whether to
    compute spearman, which sorts every row (0 otherwise). score_dtype: see `simulate`. Raises ValueError without
    batches, or where a policy needs a predictor and there is none.
    """
    policies, budgets = tuple(policies), tuple(budgets)
    needing = [p.name for p in policies if p.needs_predictor]
    if predictor is None and needing:
        raise ValueError(f"the policy {', '.join(needing)} needs a trained predictor")
    selections = [SelectionConfig(budget=b, sinks=sinks, recent=recent) for b in budgets]
    scoring = tuple(p for p in policies if isinstance(p, Scoring))
    groups = [scoring] * bool(scoring) + [(p,) for p in policies if isinstance(p, Evicting)]
    parts: list[list[Sums]] = [[] for _ in groups]
    for batch in batches:
        batch = {name: jnp.asarray(batch[name]) for name in ("tokens", "segments", "positions")}
        length = batch["tokens"].shape[1]
        tables = jnp.asarray(np.stack([budget_table(s, length) for s in selections]))
        options = dict(sinks=sinks, recent=recent, rows=rows, implementation=implementation)
        for group, found in zip(groups, parts, strict=True):
            evicts = group is not scoring
            sums = measure_evicting(model, batch, tables, policy=group[0], **options) if evicts else measure(
                model, predictor if needing else None, batch, tables, policies=group, ranks=ranks,
                score_dtype=score_dtype, **options,
            )  # fmt: skip
            found.append(jax.tree.map(lambda a: on_host(a).astype(np.float64), sums))
    if not (bool(groups) and bool(parts[0])):
        raise ValueError("recall needs at least one policy and one batch")
    result = Recall({}, {}, {}, {}, {})
    layers = model.config.layers - 1
    for found, group in zip(parts, groups, strict=True):
        sums = Sums(*(np.concatenate(arrays, axis=-1) for arrays in zip(*found, strict=True)))
        for number, policy in enumerate(group):
            for table, values in ((result.mass, sums.mass), (result.attended, sums.attended)):
                each = [ratio(v / layers, sums.rows) for v in values[number]]
                table[policy.name] = dict(zip(budgets, each, strict=True))
            if group is not scoring or not sums.long.any():
                continue
            for table, values in ((result.hit_rate, sums.hits), (result.spearman, sums.spearman)):
                table[policy.name] = ratio(values[number].mean(axis=(0, 1)), sums.long)
            result.by_head[policy.name] = sums.hits[number].sum(axis=-1) / sums.long.sum()
    return result


@partial(
    jax.jit, static_argnames=("policies", "sinks", "recent", "rows", "ranks", "score_dtype", "implementation")
)  # fmt: skip
def measure(
    model: BaseModel,
    predictor: Predictor | None,
    batch: dict[str, Int[Array, "B T"]],
    tables: Int[Array, "N S"],
    *,
    policies: tuple[Policy, ...],
    sinks: int,
    recent: int,
    rows: int | None = None,
    ranks: bool = True,
    score_dtype: str | None = None,
    implementation: str | None = None,
) -> Sums:
    """The sums of one dense pass. tables: budget_table of N budgets."""
    base, segments, positions = model.config, batch["segments"], batch["positions"]
    x = embed(model, batch["tokens"])
    dense = dense_mixer(base, segments, implementation)
    begun, step = importance_walk(predictor, x, batch, implementation=implementation, score_dtype=score_dtype)

    def mixer(state, view):
        state, importance = step(state, view)

        def look(limit):
            apply = partial(
                measure_chunk, segments=segments, policies=policies, tables=tables, sinks=sinks, recent=recent,
                ranks=ranks,
            )  # fmt: skip
            sums, _ = map_chunks(apply, view, importance, segments, limit, rows)
            return jax.tree.map(lambda a: jnp.sum(a, axis=0), sums)

        return dense(None, view)[0], state, by_window(base, view.index, look)

    found = run_layers(model, x, positions, mixer, begun)[2]
    mass, attended = (jnp.sum(a[1:], axis=0) for a in found[:2])
    hits, spearman = (jnp.swapaxes(a[1:], 0, 1) for a in found[2:4])
    return Sums(mass, attended, hits, spearman, found.rows[0], found.long[1])


@partial(jax.jit, static_argnames=("policy", "sinks", "recent", "rows", "implementation"))
def measure_evicting(
    model: BaseModel,
    batch: dict[str, Int[Array, "B T"]],
    tables: Int[Array, "N S"],
    *,
    policy: Evicting,
    sinks: int,
    recent: int,
    rows: int | None = None,
    implementation: str | None = None,
) -> Sums:
    """The sums of `measure`, over the same rows, for a policy that evicts; it has no scores, and so no hit rate."""
    base, segments = model.config, batch["segments"]
    rule = policy.selection(SelectionConfig(sinks=sinks, recent=recent)).rule
    dense = dense_mixer(base, segments, implementation)
    counted = (segments > 0) & jnp.asarray(spread_rows(segments.shape[1], rows))[None]

    def mixer(state, view):
        def look(limit):
            return evicted_sums(view, segments, limit, policy, tables, rule, counted)

        return dense(None, view)[0], state, by_window(base, view.index, look)

    sums = run_layers(model, embed(model, batch["tokens"]), batch["positions"], mixer, None)[2]
    mass, attended = (jnp.sum(a[1:], axis=0)[None] for a in sums)
    none = jnp.zeros((1, base.layers - 1, base.heads, segments.shape[0]))
    number = jnp.sum(counted, axis=1).astype(jnp.float32)
    return Sums(mass, attended, none, none, number, jnp.zeros_like(number))


def measure_chunk(
    chunk: Chunk,
    *,
    segments: Int[Array, "B T"],
    policies: tuple[Policy, ...],
    tables: Int[Array, "N S"],
    sinks: int,
    recent: int,
    ranks: bool,
) -> Sums:
    """The sums of one chunk of rows of one layer: no axis L."""
    chunk = chunk._replace(sinks=sinks, recent=recent)
    batch, kv_heads, group, size, keys = chunk.logits.shape
    allowed = jnp.broadcast_to(chunk.allowed, (batch, *chunk.allowed.shape[1:]))
    count = jnp.sum(allowed, axis=-1, dtype=jnp.int32)
    last = segments.shape[1] - 1
    inside = chunk.rows.own <= last
    own = jnp.take_along_axis(segments, jnp.minimum(chunk.rows.own, last), axis=1)
    real = inside & (own > 0)
    long = real & (count >= LEAST_KEYS)
    weights = masked_softmax(chunk.logits, allowed[:, None, None])

    def mean(per_head):
        return jnp.sum(jnp.where(real, jnp.mean(per_head, axis=(1, 2)), 0.0), axis=-1)

    def each(per_head):
        """Sums of every query head, [H, B]."""
        sums = jnp.sum(jnp.where(long[:, None, None], per_head, 0.0), axis=-1)
        return jnp.broadcast_to(sums, (batch, kv_heads, group)).reshape(batch, -1).T

    def mass(pooled, rule, table):
        """Recalled mass and the fraction of keys read, summed over rows."""
        mask, _ = chosen_mask(chunk, pooled, Limits(table, None, 0), rule)
        mask = mask.reshape(batch, kv_heads, -1, size, keys)
        read = jnp.sum(mask, axis=-1, dtype=jnp.int32) / jnp.maximum(count, 1).astype(jnp.float32)[:, None, None]
        return mean(jnp.sum(jnp.where(mask, weights, 0.0), axis=-1)), mean(read)

    best = top_half(chunk.logits, allowed)
    true = mean_ranks(chunk.logits, allowed) if ranks else None
    found, hits, spearman = [], [], []
    for policy in policies:
        rule = policy.selection(SelectionConfig(sinks=sinks, recent=recent)).rule
        scores = policy.scores(chunk)
        found.append(jax.lax.map(partial(mass, policy.pool(scores, chunk), rule), tables))
        common = jnp.sum(best & top_half(scores, allowed), axis=-1, dtype=jnp.int32)
        hits.append(each(common.astype(jnp.float32) / jnp.maximum(count // 2, 1).astype(jnp.float32)[:, None, None]))
        spearman.append(each(rank_correlation(scores, true, allowed)) if ranks else jnp.zeros_like(hits[-1]))

    rows = (jnp.sum(a.astype(jnp.float32), axis=-1) for a in (real, long))
    masses, attended = (jnp.stack(parts) for parts in zip(*found, strict=True))
    return Sums(masses, attended, jnp.stack(hits), jnp.stack(spearman), *rows)


def top_half(scores: Float[Array, "B K G C S"], allowed: Bool[Array, "B C S"]) -> Bool[Array, "B K G C S"]:
    """The better half (rounded down) of the keys each row may see, ties to the earlier one."""
    return best(scores, allowed, jnp.arange(allowed.shape[-1] + 1, dtype=jnp.int32) // 2)


def best(
    scores: Float[Array, "B K G C S"], keys: Bool[Array, "B C S"], sizes: Int[Array, " N"]
) -> Bool[Array, "B K G C S"]:
    """The sizes[n] best of each row's n keys, ties to the earlier one."""
    count = sizes[jnp.sum(keys, axis=-1, dtype=jnp.int32)]
    return select_best(scores, keys[:, None, None], count[:, None, None])


def mean_ranks(scores: Float[Array, "B K G C S"], allowed: Bool[Array, "B C S"]) -> Float[Array, "B K G C S"]:
    """Rank of every key among those its row may see, from 1 for the lowest; equal scores share their mean rank."""
    place = jax.lax.broadcasted_iota(jnp.int32, scores.shape, 4)
    masked = jnp.where(allowed[:, None, None], scores, jnp.inf)
    ordered, place = jax.lax.sort((masked, place), dimension=-1, num_keys=1)
    return jax.lax.sort((place, ranks_in_order(ordered)), dimension=-1, num_keys=1)[1]


def ranks_in_order(ordered: Float[Array, "*B S"]) -> Float[Array, "*B S"]:
    """Mean ranks of a row that is sorted already."""
    index = jax.lax.broadcasted_iota(jnp.int32, ordered.shape, ordered.ndim - 1)
    new = jnp.concatenate([jnp.ones_like(ordered[..., :1], bool), ordered[..., 1:] != ordered[..., :-1]], axis=-1)
    ends = jnp.concatenate([new[..., 1:], jnp.ones_like(new[..., :1])], axis=-1)
    first = jax.lax.cummax(jnp.where(new, index, 0), axis=ordered.ndim - 1)
    last = jax.lax.cummin(jnp.where(ends, index, ordered.shape[-1]), axis=ordered.ndim - 1, reverse=True)
    return (first + last).astype(jnp.float32) / 2 + 1


def rank_correlation(
    scores: Float[Array, "B K G C S"], ranks: Float[Array, "B K G C S"], allowed: Bool[Array, "B C S"]
) -> Float[Array, "B K G C"]:
    """Spearman's coefficient between scores and ranks given, over the keys each row may see; 0 for equal scores."""
    scores = jnp.broadcast_to(scores, ranks.shape)
    masked = jnp.where(allowed[:, None, None], scores, jnp.inf)
    ordered, other = jax.lax.sort((masked, ranks), dimension=-1, num_keys=1)
    count = jnp.sum(allowed, axis=-1, dtype=jnp.int32)[:, None, None, :, None]
    inside = jax.lax.broadcasted_iota(jnp.int32, ranks.shape, 4) < count
    middle = (count + 1).astype(jnp.float32) / 2
    own, other = (jnp.where(inside, a - middle, 0.0) for a in (ranks_in_order(ordered), other))
    spread = jnp.sum(own**2, axis=-1) * jnp.sum(other**2, axis=-1)
    return jnp.sum(own * other, axis=-1) / jnp.sqrt(jnp.maximum(spread, 1.0))
