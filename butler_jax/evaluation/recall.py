"""Recalled attention mass and hit rate of several policies and budgets, all from one dense pass."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from butler_jax.base_model import BaseModel, by_window, dense_mixer, embed, run_layers
from butler_jax.configs import SelectionConfig, require
from butler_jax.evaluation.chunks import importance_walk, map_chunks
from butler_jax.evaluation.eviction import evicted_sums
from butler_jax.evaluation.simulate import chosen_mask
from butler_jax.policies import Chunk, Policy
from butler_jax.policies.evicting import Evicting
from butler_jax.predictors import Predictor
from butler_jax.selection import Limits, budget_table, ordered_bits, top_mask

LEAST_KEYS = 32  # rows with fewer keys have no hit rate


@dataclass(frozen=True)
class Recall:
    """Means over layers 1 ..., query heads and all rows that are not padding.

    mass[policy][budget]: the sum of the true attention weights inside the chosen set. hit_rate[policy]: the
    share of the top half by true logit that is in the top half by score, per query head, rows of at least
    32 keys. attended[policy][budget]: fraction of the causal keys chosen. rows, hit_rows: how many rows were
    averaged.
    """

    mass: dict[str, dict[float, float]]
    hit_rate: dict[str, float]
    attended: dict[str, dict[float, float]]
    rows: int
    hit_rows: int


def recall(
    model: BaseModel,
    predictor: Predictor | None,
    batches: Iterable[dict[str, np.ndarray]],
    policies: Sequence[Policy],
    budgets: Sequence[float | int],
    *,
    sinks: int = 4,
    window: int = 8,
    rows: int | None = None,
    score_dtype: str | None = None,
    implementation: str | None = None,
) -> Recall:
    """Measure policies on batches (tokens, segments, positions) of one shape.

    rows: about how many query rows to measure in every sequence, in chunks spread evenly along it (None:
    all); the smaller, the cheaper. score_dtype: see `simulate`. Raises ValueError without batches, or where a
    policy needs a predictor and there is none.
    """
    policies, budgets = tuple(policies), tuple(budgets)
    needing = [p.name for p in policies if p.needs_predictor]
    require(predictor is not None or not needing, f"the policy {', '.join(needing)} needs a trained predictor")
    selections = [SelectionConfig(budget=b, sinks=sinks, window=window) for b in budgets]
    scoring = tuple(p for p in policies if not p.evicts)
    groups = [scoring] * bool(scoring) + [(p,) for p in policies if p.evicts]
    total = None
    for batch in batches:
        batch = {name: jnp.asarray(batch[name]) for name in ("tokens", "segments", "positions")}
        length = batch["tokens"].shape[1]
        tables = jnp.asarray(np.stack([budget_table(s, length) for s in selections]))
        options = dict(sinks=sinks, window=window, implementation=implementation)
        sums = [
            measure_evicting(model, batch, tables, policy=group[0], **options) if group[0].evicts else measure(
                model, predictor if needing else None, batch, tables, policies=group, rows=rows,
                score_dtype=score_dtype, **options,
            )
            for group in groups
        ]  # fmt: skip
        total = sums if total is None else jax.tree.map(jnp.add, total, sums)
    require(total is not None, "recall needs at least one batch")
    mass, attended, hit_rate = {}, {}, {}
    layers = model.config.layers - 1
    for part, group in zip(total, groups, strict=True):
        masses, reads, hits, count, hit_count = (np.asarray(a, np.float64) for a in part)
        for number, policy in enumerate(group):
            mass[policy.name], attended[policy.name] = (
                dict(zip(budgets, map(float, a[number] / (count * layers)), strict=True)) for a in (masses, reads)
            )
            if not policy.evicts:
                hit_rate[policy.name] = float(hits[number] / max(hit_count * layers, 1))
    return Recall(mass, hit_rate, attended, *(int(number) for number in total[0][3:]))


@partial(jax.jit, static_argnames=("policies", "sinks", "window", "rows", "score_dtype", "implementation"))
def measure(
    model: BaseModel,
    predictor: Predictor | None,
    batch: dict[str, Int[Array, "B T"]],
    tables: Int[Array, "N S"],
    *,
    policies: tuple[Policy, ...],
    sinks: int,
    window: int,
    rows: int | None = None,
    score_dtype: str | None = None,
    implementation: str | None = None,
) -> tuple[Float[Array, "P N"], Float[Array, "P N"], Float[Array, " P"], Float[Array, ""], Float[Array, ""]]:
    """Sums over rows and layers 1 ... of recalled mass, attended fraction and hit rate.

    Each a mean over heads; then the number of rows measured and of those with a hit rate. tables: budget_table of N
    budgets.
    """
    base, segments, positions = model.config, batch["segments"], batch["positions"]
    x = embed(model, batch["tokens"])
    dense = dense_mixer(base, segments, implementation)
    begun, step = importance_walk(predictor, x, batch, implementation=implementation, score_dtype=score_dtype)

    def mixer(state, view):
        state, importance = step(state, view)

        def look(limit):
            apply = partial(
                measure_chunk, segments=segments, policies=policies, tables=tables, sinks=sinks, window=window
            )
            sums, _ = map_chunks(apply, view, importance, segments, limit, rows)
            return jax.tree.map(lambda a: jnp.sum(a, axis=0), sums)

        return dense(None, view)[0], state, by_window(base, view.index, look)

    _, _, sums = run_layers(model, x, positions, mixer, begun)
    mass, attended, hits, count, hit_count = sums
    mass, attended, hits = (jnp.sum(a[1:], axis=0) for a in (mass, attended, hits))
    return mass, attended, hits, count[0], hit_count[1]


@partial(jax.jit, static_argnames=("policy", "sinks", "window", "implementation"))
def measure_evicting(
    model: BaseModel,
    batch: dict[str, Int[Array, "B T"]],
    tables: Int[Array, "N S"],
    *,
    policy: Evicting,
    sinks: int,
    window: int,
    implementation: str | None = None,
) -> tuple[Float[Array, "1 N"], Float[Array, "1 N"], Float[Array, " 1"], Float[Array, ""], Float[Array, ""]]:
    """The sums of `measure` for a policy that evicts; it has no scores, and so no hit rate. All rows count."""
    base, segments = model.config, batch["segments"]
    rule = policy.selection(SelectionConfig(sinks=sinks, window=window)).rule
    dense = dense_mixer(base, segments, implementation)

    def mixer(state, view):
        def look(limit):
            return evicted_sums(view, segments, limit, policy, tables, rule)

        return dense(None, view)[0], state, by_window(base, view.index, look)

    sums = run_layers(model, embed(model, batch["tokens"]), batch["positions"], mixer, None)[2]
    mass, attended = (jnp.sum(a[1:], axis=0)[None] for a in sums)
    return mass, attended, jnp.zeros(1), jnp.sum(segments > 0).astype(jnp.float32), jnp.zeros(())


def measure_chunk(
    chunk: Chunk,
    values: Array,
    number: Int[Array, ""],
    *,
    segments: Int[Array, "B T"],
    policies: tuple[Policy, ...],
    tables: Int[Array, "N S"],
    sinks: int,
    window: int,
) -> tuple[Array, Array, Array, Array, Array]:
    """The sums of `measure` over one chunk of rows."""
    chunk = chunk._replace(sinks=sinks, window=window)
    allowed = jnp.broadcast_to(chunk.allowed, (chunk.q.shape[0], *chunk.allowed.shape[1:]))
    count = jnp.sum(allowed, axis=-1, dtype=jnp.int32)
    last = segments.shape[1] - 1
    inside = chunk.rows.own <= last
    own = jnp.take_along_axis(segments, jnp.minimum(chunk.rows.own, last), axis=1)
    real = inside & (own > 0)
    long = real & (count >= LEAST_KEYS)
    weights = jax.nn.softmax(jnp.where(allowed[:, None, None], chunk.logits, -1e30), axis=-1)

    def mean(per_head, rows):
        return jnp.sum(jnp.where(rows, jnp.mean(per_head, axis=(1, 2)), 0.0))

    def mass(pooled, rule, table):
        """Recalled mass and the fraction of keys read, summed over rows."""
        mask, _ = chosen_mask(chunk, pooled, Limits(table, None, 0), rule)
        batch, kv_heads, _, size, keys = chunk.logits.shape
        mask = mask.reshape(batch, kv_heads, -1, size, keys)
        read = jnp.sum(mask, axis=-1, dtype=jnp.int32) / jnp.maximum(count, 1).astype(jnp.float32)[:, None, None]
        return mean(jnp.sum(jnp.where(mask, weights, 0.0), axis=-1), real), mean(read, real)

    best = top_half(chunk.logits, allowed)
    found, hits = [], []
    for policy in policies:
        rule = policy.selection(SelectionConfig(sinks=sinks, window=window)).rule
        scores = policy.scores(chunk)
        found.append(jax.lax.map(partial(mass, policy.pool(scores, chunk), rule), tables))
        common = jnp.sum(best & top_half(scores, allowed), axis=-1, dtype=jnp.int32)
        share = common.astype(jnp.float32) / jnp.maximum(count // 2, 1).astype(jnp.float32)[:, None, None]
        hits.append(mean(share, long))

    rows = (jnp.sum(a.astype(jnp.float32)) for a in (real, long))
    masses, attended = (jnp.stack(parts) for parts in zip(*found, strict=True))
    return masses, attended, jnp.stack(hits), *rows


def top_half(scores: Float[Array, "B K G C S"], allowed: Bool[Array, "B C S"]) -> Bool[Array, "B K G C S"]:
    """The better half (rounded down) of the keys each row may see, ties to the earlier one."""
    image = jnp.where(allowed[:, None, None], ordered_bits(scores), jnp.uint32(0))
    half = jnp.sum(allowed, axis=-1, dtype=jnp.int32) // 2
    return top_mask(image, jnp.broadcast_to(half[:, None, None], image.shape[:-1]))
