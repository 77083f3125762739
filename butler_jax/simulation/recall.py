"""Recalled attention mass, hit rate and rank correlation of policies, from one dense pass."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from butler_jax.data import as_batch, require_batches
from butler_jax.model import BaseConfig, BaseModel, by_service, dense_mixer, masked_softmax, require_model, run_layers
from butler_jax.parallel import on_host
from butler_jax.policies import Chunk, Evicting, Policy, Scoring, TokenButler, settle_policy
from butler_jax.predictors import Predictor, zeros_of
from butler_jax.selection import LIMITED, Limits, SelectionConfig, budget_table, select_best, tied_share
from butler_jax.simulation.checks import require_counted, require_list
from butler_jax.simulation.choice import chosen_mask
from butler_jax.simulation.chunks import spread_rows, sum_chunks
from butler_jax.simulation.distances import count_bins, mean_distances, sum_by_distance
from butler_jax.simulation.eviction import evicted_sums
from butler_jax.simulation.programs import compiled
from butler_jax.simulation.reliability import BINS, mean_reliability, sum_reliability
from butler_jax.simulation.sharding import embed_split, split_text, split_view
from butler_jax.simulation.statistics import Estimate, estimate_ratio
from pallas_kernels import ordered_image

LEAST_KEYS = 32  # rows with fewer keys have no hit rate
RANKED = 16  # of so many rows, the keys of one are ranked: ranking takes longer than all the rest


@dataclass(frozen=True)
class Recall:
    """Means over the served layers, query heads and all measured rows, by policy.

    Attributes:
        mass: mass[policy][budget] is the sum of the true attention weights inside the chosen set.
        attended: attended[policy][budget] is the fraction of the causal keys that was chosen.
        hit_rate: The share of the top half by true logit that is in the top half by score; per query head, over every
            RANKED-th row of at least LEAST_KEYS keys. Policies that evict have none.
        spearman: The correlation of the ranks by score with the ranks by true logit, equal scores with their mean rank;
            over the same heads and rows.
        tied: tied[policy][budget] is the share of the chosen units that only their position tells from units left out,
            since their scores are equal. Policies that evict have none.
        by_head: The hit rate of every layer from 1 on and query head; NaN where the layer is not served.
        reliability: What the predictor's policies predict beside what is true, over the same rows and all served
            layers: `mean_reliability` of their sums.
        distances: distances[policy][budget] is where attention weight and keys that are read lie, sinks and recent keys
            aside: `mean_distances` of their sums. Policies that evict have none.
    """

    mass: dict[str, dict[float, Estimate]]
    attended: dict[str, dict[float, Estimate]]
    hit_rate: dict[str, Estimate]
    spearman: dict[str, Estimate]
    tied: dict[str, dict[float, Estimate]]
    by_head: dict[str, Float[np.ndarray, "L H"]]
    reliability: dict[str, list[dict[str, list[float]]]]
    distances: dict[str, dict[float, dict[str, list[float]]]]


class RecallSums(NamedTuple):
    """Sums of one pass over the rows of each sequence, for several policies and budgets.

    Attributes:
        mass: Recalled mass, summed over layers too, mean over heads.
        attended: Fraction of the causal keys that was chosen, likewise.
        tied: Share of the chosen units that their score does not tell from others, likewise.
        distances: Recalled mass and the number of keys read, by distance and without sinks and recent keys, likewise;
            0 for policies that evict.
        weights: The true attention weight by distance, without sinks and recent keys, likewise.
        hits: Hit rate of every served layer and query head.
        spearman: Rank correlation of every served layer and query head.
        reliability: `sum_reliability` over the rows that are ranked, summed over layers too; 0 for other policies.
        rows: How many rows were measured.
        ranked: How many of them have a hit rate and a rank correlation.
    """

    mass: Float[Array, "policies budgets B"]
    attended: Float[Array, "policies budgets B"]
    tied: Float[Array, "policies budgets B"]
    distances: Float[Array, "policies budgets 2 bins B"]
    weights: Float[Array, "bins B"]
    hits: Float[Array, "policies L H B"]
    spearman: Float[Array, "policies L H B"]
    reliability: Float[Array, "policies 2 3 BINS B"]
    rows: Float[Array, " B"]
    ranked: Float[Array, " B"]


class RecallOptions(NamedTuple):
    """What a pass is compiled for; see `measure_recall`."""

    selection: SelectionConfig
    rows: int | None
    ranks: bool
    score_dtype: str | None
    implementation: str | None
    prompt_tokens: int


def measure_recall(
    model: BaseModel,
    predictor: Predictor | None,
    batches: Sequence[dict[str, np.ndarray]],
    policies: Sequence[Policy | str],
    budgets: Sequence[float | int],
    *,
    selection: SelectionConfig | None = None,
    rows: int | None = None,
    ranks: bool = True,
    score_dtype: str | None = None,
    implementation: str | None = None,
    prompt_tokens: int = 0,
) -> Recall:
    """Measure policies on batches (tokens, segments, positions) of one shape.

    Args:
        predictor: Needed by policies with `needs_predictor`.
        batches: The text; int32 [B, T] each.
        policies: The policies or their names, all different.
        budgets: Fractions of the causal keys, or numbers of tokens.
        selection: Sinks, recent tokens and units. `budgets` replaces its budget. Default: SelectionConfig().
        rows: About how many query rows of every sequence are measured, the same for all policies, in chunks spread
            evenly behind the prompt; None measures all. Policies that evict run through all rows.
        ranks: Whether to compute `spearman`, which sorts keys; it is 0 otherwise.
        score_dtype, implementation: As `simulate` takes them.
        prompt_tokens: First tokens of every document whose rows do not count.

    Raises:
        ValueError: There are no batches, no policies or no rows after the prompts, a policy lacks its predictor, or
            the selection has thresholds or a tolerance.
    """
    require_model(model)
    require_batches(batches)
    require_list(budgets=budgets, policies=policies)
    policies, budgets = tuple(settle_policy(p).for_predictor(predictor) for p in policies), tuple(budgets)
    if twice := [name for name, times in Counter(p.name for p in policies).items() if times > 1]:
        raise ValueError(f"two policies have the name {twice[0]}, by which results are told apart; give each its own")
    selection = selection or SelectionConfig()
    if selection.threshold is not None or selection.allocation in LIMITED:
        raise ValueError("recall is measured under budgets: leave out thresholds, tolerance and top_p")
    options = RecallOptions(selection.rule, rows, ranks, score_dtype, implementation, prompt_tokens)

    def tables_of(policy: Policy, length: int) -> Int[np.ndarray, "budgets _"]:
        own, whole = policy.selection(selection), np.arange(length + 1, dtype=np.int32)  # units may be pages
        each = (whole if own is None else budget_table(dataclasses.replace(own, budget=b), length) for b in budgets)
        return np.stack([*each])

    scoring = tuple(p for p in policies if isinstance(p, Scoring))
    groups = [scoring] * bool(scoring) + [(p,) for p in policies if p not in scoring]
    parts: list[list[RecallSums]] = [[] for _ in groups]
    for batch in map(as_batch, batches):
        for group, found in zip(groups, parts, strict=True):
            tables = jnp.asarray(np.stack([tables_of(policy, batch["tokens"].shape[1]) for policy in group]))
            if group is not scoring:
                sums = _sum_evicting(model, batch, tables[0], policy=group[0], options=options)
            else:
                used = predictor if any(p.needs_predictor for p in group) else None
                sums = _sum_scoring(model, used, batch, tables, policies=group, options=options)
            found.append(jax.tree.map(lambda a: on_host(a).astype(np.float64), sums))
    if not groups or not parts[0]:
        raise ValueError("recall needs at least one policy and one batch")
    result = Recall({}, {}, {}, {}, {}, {}, {}, {})
    for group, found in zip(groups, parts, strict=True):
        sums = RecallSums(*(np.concatenate(arrays, axis=-1) for arrays in zip(*found, strict=True)))
        require_counted(sums.rows, prompt_tokens)
        for number, policy in enumerate(group):
            _enter(result, policy.name, budgets, sums, number, model.config)
            if isinstance(policy, TokenButler) and sums.ranked.any():
                result.reliability[policy.name] = mean_reliability(sums.reliability[number].sum(axis=-1))
    return result


def _enter(
    result: Recall, name: str, budgets: Sequence[float | int], sums: RecallSums, number: int, base: BaseConfig
) -> None:
    """Enter the means of one policy, whose index in the sums is `number`."""
    layers = base.served_layers
    by_budget = [(result.mass, sums.mass), (result.attended, sums.attended)]
    if sums.ranked.any():
        by_budget.append((result.tied, sums.tied))
    for table, values in by_budget:
        each = [estimate_ratio(v / len(layers), sums.rows) for v in values[number]]
        table[name] = dict(zip(budgets, each, strict=True))
    weights, rows = sums.weights.sum(axis=-1), sums.rows.sum() * len(layers)
    if weights.any():
        each = [mean_distances(weights, found.sum(axis=-1), rows) for found in sums.distances[number]]
        result.distances[name] = dict(zip(budgets, each, strict=True))
    if not sums.ranked.any():
        return
    for table, values in ((result.hit_rate, sums.hits), (result.spearman, sums.spearman)):
        table[name] = estimate_ratio(values[number].mean(axis=(0, 1)), sums.ranked)
    result.by_head[name] = np.full((base.layers - 1, base.heads), np.nan)
    result.by_head[name][np.asarray(layers) - 1] = sums.hits[number].sum(axis=-1) / sums.ranked.sum()


@partial(compiled, static_argnames=("policies", "options"))
def _sum_scoring(
    model: BaseModel,
    predictor: Predictor | None,
    batch: dict[str, Int[Array, "B T"]],
    tables: Int[Array, "policies budgets _"],
    *,
    policies: tuple[Scoring, ...],
    options: RecallOptions,
) -> RecallSums:
    """The sums of one dense pass. tables: `budget_table` of every policy and budget."""
    fixed = dict(predictor=predictor, policies=policies, tables=tables, options=options)
    look = partial(_sum_chunk, counted=_counted(batch, options), **fixed)
    how = dict(implementation=options.implementation, score_dtype=options.score_dtype)
    how |= dict(rows=options.rows, first=options.prompt_tokens)
    found = sum_chunks(model, predictor, batch, look, **how)
    served = np.asarray(model.config.served_layers)
    by_layer = {name: a[served] for name, a in found._asdict().items()}
    joined = {name: jnp.sum(a, axis=0) for name, a in by_layer.items()}
    joined |= {name: jnp.swapaxes(by_layer[name], 0, 1) for name in ("hits", "spearman")}
    return RecallSums(**joined | {name: by_layer[name][0] for name in ("rows", "ranked")})


@partial(compiled, static_argnames=("policy", "options"))
def _sum_evicting(
    model: BaseModel,
    batch: dict[str, Int[Array, "B T"]],
    tables: Int[Array, "budgets _"],
    *,
    policy: Evicting,
    options: RecallOptions,
) -> RecallSums:
    """The sums of `_sum_scoring` over the same rows for a policy that evicts; without scores there is no hit rate."""
    batch = split_text(batch)
    base, segments = model.config, batch["segments"]
    rule = policy.selection(options.selection).rule
    dense = dense_mixer(base, segments, options.implementation)
    measured = spread_rows(segments.shape[1], options.rows, options.prompt_tokens)
    counted = _counted(batch, options) & jnp.asarray(measured)[None]
    prompts = jnp.full(segments.shape[0], options.prompt_tokens, jnp.int32)

    def mixer(state, view):
        view = split_view(view)

        def measure(sliding_window):
            return evicted_sums(view, segments, sliding_window, policy, tables, rule, counted, prompts)

        return dense(None, view)[0], state, by_service(base, view.index, measure, partial(zeros_of, measure, None))

    sums = run_layers(model, embed_split(model, batch["tokens"]), batch["positions"], mixer, None)[2]
    mass, attended = (jnp.sum(a[np.asarray(base.served_layers)], axis=0)[None] for a in sums)
    none = jnp.zeros((1, len(base.served_layers), base.heads, segments.shape[0]))
    number = jnp.sum(counted, axis=1).astype(jnp.float32)
    bins, rows = count_bins(segments.shape[1]), segments.shape[:1]
    return RecallSums(
        mass=mass,
        attended=attended,
        tied=jnp.zeros_like(mass),
        distances=jnp.zeros((*mass.shape[:2], 2, bins, *rows)),
        weights=jnp.zeros((bins, *rows)),
        hits=none,
        spearman=none,
        reliability=jnp.zeros((1, 2, 3, BINS, *rows)),
        rows=number,
        ranked=jnp.zeros_like(number),
    )


def _counted(batch: dict[str, Int[Array, "B T"]], options: RecallOptions) -> Bool[Array, "B T"]:
    """The rows that are neither padding nor part of a prompt."""
    return (batch["segments"] > 0) & (batch["positions"] >= options.prompt_tokens)


def _sum_chunk(
    chunk: Chunk,
    *,
    counted: Bool[Array, "B T"],
    predictor: Predictor | None,
    policies: tuple[Scoring, ...],
    tables: Int[Array, "policies budgets _"],
    options: RecallOptions,
) -> RecallSums:
    """The sums of one chunk of rows of one layer: no axis L."""
    chunk = chunk.under(options.selection)
    batch, kv_heads, group, size, keys = chunk.logits.shape
    allowed = jnp.broadcast_to(chunk.allowed, (batch, *chunk.allowed.shape[1:]))
    count = jnp.sum(allowed, axis=-1, dtype=jnp.int32)
    last = counted.shape[1] - 1
    inside = chunk.rows.own <= last
    real = inside & jnp.take_along_axis(counted, jnp.minimum(chunk.rows.own, last), axis=1)
    prompts = jnp.full(batch, options.prompt_tokens, jnp.int32)
    few = slice(RANKED - 1, None, RANKED)
    ranked, held = (real & (count >= LEAST_KEYS))[:, few], allowed[:, few]
    weights = masked_softmax(chunk.logits, allowed[:, None, None], chunk.sink_logits)

    def sum_means(per_head):
        return jnp.sum(jnp.where(real, jnp.mean(per_head, axis=(1, 2)), 0.0), axis=-1)

    def sum_distances(values):
        """Sums of every contested key's values by distance, as sum_means of each bin, [bins, B]."""
        values = jnp.where(chunk.contested[:, None, None], values, 0)
        found = sum_by_distance(values, chunk.rows.own[:, None, None], chunk.columns, count_bins(counted.shape[1]))
        return jax.vmap(sum_means, -1)(found)

    def sum_heads(per_head):
        """Sums of every query head over the rows that are ranked, [H, B]."""
        sums = jnp.sum(jnp.where(ranked[:, None, None], per_head, 0.0), axis=-1)
        return jnp.broadcast_to(sums, (batch, kv_heads, group)).reshape(batch, -1).T

    def sum_mass(pooled, rule, table):
        """Recalled mass, the fraction of keys read, the share of ties, and both by distance, summed over rows."""
        mask, _ = chosen_mask(chunk, lambda: pooled, Limits(table, None, 0, prompts), rule)
        tied = tied_share(mask, pooled, allowed[:, None], chunk.rows, rule, chunk.columns)
        mask = mask.reshape(batch, kv_heads, -1, size, keys)
        read = jnp.sum(mask, axis=-1, dtype=jnp.int32) / jnp.maximum(count, 1).astype(jnp.float32)[:, None, None]
        recalled = jnp.where(mask, weights, 0.0)
        found = jnp.sum(recalled, axis=-1), read, tied[:, :, None]
        return *map(sum_means, found), jnp.stack([sum_distances(recalled), sum_distances(mask)])

    fewer = chunk.only(few)
    true = fewer.logits
    best, half = choose_half(true, held), jnp.maximum(count[:, few] // 2, 1).astype(jnp.float32)
    nothing = jnp.zeros((2, 3, BINS, batch))
    found, hits, every, reliable = [], [], [], []
    for policy, table in zip(policies, tables, strict=True):
        rule = (policy.selection(options.selection) or options.selection).rule
        scores = policy.scores(chunk)
        found.append(jax.lax.map(partial(sum_mass, policy.pool(scores, chunk), rule), table))
        few_scores = scores[..., few, :]
        common = jnp.sum(best & choose_half(few_scores, held), axis=-1, dtype=jnp.int32)
        hits.append(sum_heads(common.astype(jnp.float32) / half[:, None, None]))
        every.append(few_scores)
        takes = isinstance(policy, TokenButler)
        reliable.append(sum_reliability(policy, few_scores, fewer, ranked, predictor) if takes else nothing)
    correlations = correlate_ranks(every, true, held) if options.ranks else [0.0] * len(policies)

    rows = (jnp.sum(a.astype(jnp.float32), axis=-1) for a in (real, ranked))
    by_budget = (jnp.stack(parts) for parts in zip(*found, strict=True))
    spearman = [sum_heads(one) for one in correlations]
    by_head = map(jnp.stack, (hits, spearman, reliable))
    return RecallSums(*by_budget, sum_distances(weights), *by_head, *rows)


def choose_half(scores: Float[Array, "B K G C S"], allowed: Bool[Array, "B C S"]) -> Bool[Array, "B K G C S"]:
    """The better half (rounded down) of the keys that each row may see; of equal scores the earlier key."""
    return choose_best(scores, allowed, jnp.arange(allowed.shape[-1] + 1, dtype=jnp.int32) // 2)


def choose_best(
    scores: Float[Array, "B K G C S"], keys: Bool[Array, "B C S"], sizes: Int[Array, " S+1"]
) -> Bool[Array, "B K G C S"]:
    """The sizes[n] best of each row's n keys; of equal scores the earlier key."""
    count = sizes[jnp.sum(keys, axis=-1, dtype=jnp.int32)]
    return select_best(scores, keys[:, None, None], count[:, None, None])


def correlate_ranks(
    scores: Sequence[Float[Array, "B K #G C S"]], other: Float[Array, "B K G C S"], allowed: Bool[Array, "B C S"]
) -> list[Float[Array, "B K G C"]]:
    """Spearman's rank correlation of each of the scores with another one, over the keys that each row may see.

    Equal scores have their mean rank. It is 0 where all scores of a row are equal.

    The keys are sorted by the other score, and then, with their ranks, by each score. Neither ranks nor keys are
    gathered.
    """
    last = jnp.iinfo(jnp.int32).max  # behind all that a row may see
    images = (ordered_image(jnp.broadcast_to(a, other.shape)) for a in (other, *scores))
    images = (jnp.where(allowed[:, None, None], image, last) for image in images)
    ordered, *images = jax.lax.sort(tuple(images), num_keys=1, is_stable=False)
    others = mean_ranks(ordered)
    count = jnp.sum(allowed, axis=-1, dtype=jnp.int32)[:, None, None, :, None]
    inside = jnp.arange(allowed.shape[-1], dtype=jnp.int32)[None, None, None, None] < count
    middle = (count + 1).astype(jnp.float32) / 2

    def correlate(image):
        image, ranks = jax.lax.sort((image, others), num_keys=1, is_stable=False)
        first, second = (jnp.where(inside, a - middle, 0.0) for a in (ranks, mean_ranks(image)))
        spread = jnp.sum(first**2, axis=-1) * jnp.sum(second**2, axis=-1)
        return jnp.sum(first * second, axis=-1) / jnp.sqrt(jnp.maximum(spread, 1.0))

    return [correlate(image) for image in images]


def mean_ranks(ordered: Int[Array, "*B S"]) -> Float[Array, "*B S"]:
    """The ranks, from 1, of the entries of ascending rows; equal entries share their mean rank."""
    size, axis = ordered.shape[-1], ordered.ndim - 1
    places = jnp.broadcast_to(jnp.arange(size, dtype=jnp.int32).reshape((1,) * axis + (-1,)), ordered.shape)
    edge = jnp.ones_like(ordered[..., :1], bool)
    differs = ordered[..., 1:] != ordered[..., :-1]
    begins, ends = (jnp.concatenate(parts, axis=-1) for parts in ((edge, differs), (differs, edge)))
    first = jax.lax.cummax(jnp.where(begins, places, 0), axis=axis)
    last = jax.lax.cummin(jnp.where(ends, places, size), axis=axis, reverse=True)
    return (first + last).astype(jnp.float32) / 2 + 1
