"""Thresholds and tolerances under which rows read a given budget on average.

A row reads the tokens whose scores reach a threshold, so some rows read more than others.

A policy that normalises its scores (to the logarithm of a predicted attention weight) makes those of one layer and KV
head comparable between rows. So one threshold for each layer and head is calibrated on text. The budget of the
selection stays the most that a row may read. A policy whose scores have one unit for all heads needs one number for
the whole model instead, the tolerance.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from butler_jax.data import as_batch, require_batches
from butler_jax.model import BaseModel, require_fit, require_model, sliding_windows
from butler_jax.parallel import on_host
from butler_jax.policies import Policy, Scoring, TokenButler, settle_policy
from butler_jax.predictors import Predictor
from butler_jax.selection import Limits, SelectionConfig, best_in_unit, limits_of, parse_budget, weigh_units
from butler_jax.simulation.checks import require_counted, require_list
from butler_jax.simulation.choice import chosen_mask
from butler_jax.simulation.chunks import sum_chunks
from butler_jax.simulation.programs import compiled
from butler_jax.simulation.simulator import simulate
from pallas_kernels import BARRED, from_image

GRID = np.arange(-40.0, 11.0)  # logarithms of the tolerances that are tried
UNREAD = np.arange(-24.0, 1.0, 2.0)  # the same for what top-p leaves unread, of which each value takes longer
LEAST_FINE = 8  # the fewest tolerances that are then tried between two neighbours of the grid
CORRECTIONS = 2  # simulations that correct a tolerance for what the dense pass does not show
CLOSE = 0.02  # relative distance from a mean at which its tolerance is not corrected further
PASSES = 16  # bits of a threshold: a precision of 2**-7 of its value


def calibrate_thresholds(
    model: BaseModel,
    predictor: Predictor | None,
    batches: Sequence[dict[str, np.ndarray]],
    selection: SelectionConfig,
    mean: float | int,
    *,
    policy: Policy | str | None = None,
) -> SelectionConfig:
    """Find thresholds under which a row reads `mean` on average, in every served layer and head.

    Args:
        predictor: Needed by policies with `needs_predictor`.
        batches: tokens, segments, positions of one shape [B, T], run densely 16 times.
        selection: Its budget is the most that a row reads.
        mean: A fraction of all keys that dense rows read, or a mean number of tokens. Where sinks and recent tokens
            alone exceed it, thresholds are infinite. Where the budget does not reach it, they are -inf.
        policy: A policy or its name; default: tokenbutler.

    Returns:
        The selection with thresholds.

    Raises:
        ValueError: There are no batches, the mean is not below the budget, or the policy lacks its predictor.
    """
    require_model(model)
    require_batches(batches)
    policy, mean = settle_policy(policy), parse_budget(mean)
    whole = isinstance(mean, int)
    if not batches:
        raise ValueError("thresholds are calibrated on text: give at least one batch")
    if not (mean > 0 and (whole or mean < 1)):
        raise ValueError(f"the mean budget must be above 0 and below everything, got {mean}")
    if isinstance(selection.budget, int) == whole and mean >= selection.budget:
        raise ValueError(f"a mean budget of {mean} must be below the most a row may read, {selection.budget}")
    if selection.allocation != "per_head":
        raise ValueError(f"thresholds go with the allocation per_head, the allocation is {selection.allocation}")
    _require_scores(policy, "thresholds")
    policy, predictor = policy.for_predictor(predictor), policy.require_predictor(predictor)
    require_fit(model.config, predictor)
    selection = policy.selection(selection)
    batches = [as_batch(batch) for batch in batches]
    length, heads = batches[0]["tokens"].shape[1], policy.choosing_heads(model.config)
    limits = limits_of(dataclasses.replace(selection, threshold=None), model.config, length, heads)
    found = np.full((model.config.layers, heads), int(BARRED))
    for bit in range(31, 31 - PASSES, -1):  # the largest image under which the mean is still reached
        trial = (found + (1 << bit)).astype(np.int32)
        parts = [_sum_read(model, predictor, b, limits, trial, policy=policy, rule=selection.rule) for b in batches]
        sums = (np.sum([on_host(a).astype(np.float64) for a in part], axis=0) for part in zip(*parts, strict=True))
        read, held, rows = sums
        found = np.where(read >= mean * (rows if whole else held[:, None]), trial, found)
    unreached = found == int(BARRED)  # all that the budget allows is less than the mean
    found = np.minimum(found + (1 << (31 - PASSES)), 2**31 - 1)  # the next one above, at which the mean is not exceeded
    values = np.asarray(from_image(jnp.asarray(found.astype(np.int32))))
    values = np.where(np.isnan(values), np.inf, values)
    values[unreached] = -np.inf
    values[~np.asarray(model.config.served)] = -np.inf
    return dataclasses.replace(selection, threshold=tuple(map(tuple, values.tolist())))


def calibrate_tolerance(
    model: BaseModel,
    predictor: Predictor | None,
    batches: Sequence[dict[str, np.ndarray]],
    selection: SelectionConfig,
    means: Sequence[float | int],
    *,
    policy: Policy | str | None = None,
    prompt_tokens: int = 0,
    rows: int | None = 256,
    corrections: int = CORRECTIONS,
) -> list[SelectionConfig]:
    """Find the tolerance of the whole model under which rows read `means` on average over served layers and heads.

    Rows read about as many tokens each. So the same fraction in all is a larger one of short rows, and a smaller one of
    long rows.

    Two dense passes find all tolerances. Where little is read, residual streams and so scores differ from the dense
    ones. So each tolerance is then corrected by simulations of one batch, until it reads as much as dense passes found.
    An interval counts in these simulations alone.

    Args:
        model: The base model.
        predictor: Needed by policies with `needs_predictor`.
        batches: tokens, segments, positions of one shape [B, T]; rows where `counted` does not hold do not count.
        selection: Its budget is the most that a row reads, and its sinks and recent tokens are always read. Under the
            allocation top_p, the tolerance is 1 - p, and any other allocation counts as tolerance. Neighbours are not
            possible.
        means: Fractions of all keys that dense rows read, or mean numbers of tokens; one result for each. Where sinks
            and recent tokens alone exceed a mean, its tolerance is infinite. Where all that rows may read is less, it
            is 0.
        policy: A policy or its name. Default: tokenbutler, with error="value" where the predictor's target leaves
            values out, except under top_p.
        prompt_tokens: First tokens of every document that are a prompt; their rows do not count.
        rows: About how many rows of every sequence the dense passes measure, in chunks spread evenly along it behind
            the prompt; None takes all.
        corrections: How many simulations may correct each tolerance; 0 keeps those of the dense passes.

    Returns:
        The selection under the allocation tolerance or top_p, once for each mean.

    Raises:
        ValueError: There are no batches or no rows after the prompts, a mean is out of range, or the policy's scores
            do not allow the allocation. Or a mean is above the selection's budget.
    """
    require_model(model)
    require_batches(batches)
    require_list(means=means)
    by_mass = selection.allocation == "top_p"
    if policy is None:
        unvalued = predictor is not None and not predictor.config.counts_values
        policy = TokenButler(error="value" if unvalued and not by_mass else None)
    policy, means = settle_policy(policy), _parse_means(means, selection.budget)
    if not batches or not means:
        raise ValueError("a tolerance is calibrated on text for means: give at least one batch, and one mean")
    _require_scores(policy, "a tolerance")
    if selection.neighbours:
        raise ValueError(
            "a tolerance is found without neighbours, which no score chooses: leave them out, or take the allocation "
            "per_head"
        )
    policy, predictor = policy.for_predictor(predictor), policy.require_predictor(predictor)
    require_fit(model.config, predictor)
    allocation, values = ("top_p", UNREAD) if by_mass else ("tolerance", GRID)
    selection = policy.selection(dataclasses.replace(selection, allocation=allocation, tolerance=np.inf, floor=0.0))
    length, heads = batches[0]["tokens"].shape[1], policy.choosing_heads(model.config)
    limits = limits_of(selection, model.config, length, heads)
    counts = [
        np.asarray((b["segments"] > 0) & (b["positions"] >= prompt_tokens) & b.get("counted", np.True_))
        for b in batches
    ]
    batches = [as_batch(batch) for batch in batches]

    def sums_at(grid):
        """Keys read at every tolerance, [batches, N], and the keys held and the rows of each batch.

        Tolerances are tried by as many as the first grid has, so that one program is compiled.
        """
        parts = np.pad(grid, (0, -len(grid) % len(values)), mode="edge").reshape(-1, len(values))
        how = dict(policy=policy, rule=selection.rule, first=prompt_tokens, rows=rows)
        read, held, counted = [], [], []
        for batch, own in zip(batches, counts, strict=True):
            given = model, predictor, batch, jnp.asarray(own), limits
            found = [_sum_above(*given, jnp.asarray(p, jnp.float32), **how) for p in parts]
            read.append(np.concatenate([on_host(tried).astype(np.float64) for tried, *_ in found]))
            held.append(float(found[0][1]))
            counted.append(float(found[0][2]))
        return np.stack(read)[:, : len(grid)], np.array(held), np.array(counted)

    def place(read, mean):
        """The last tolerance that reads at least the mean; -1 where none does."""
        return int(np.sum(read >= mean)) - 1

    read, held, counted = sums_at(values)
    require_counted(counted, prompt_tokens)
    coarse = np.sum(read, axis=0) / np.sum(counted)
    tokens = [mean if isinstance(mean, int) else mean * np.sum(held) / np.sum(counted) for mean in means]
    starts = [min(max(place(coarse, mean), 0), len(values) - 2) for mean in tokens]
    between = max(LEAST_FINE, len(values) // len(means) - 1)
    fine = np.unique(np.concatenate([np.linspace(values[i], values[i + 1], between + 1) for i in starts]))
    read, *_ = sums_at(fine)
    sample = int(np.argmax(counted))  # the batch on which tolerances are corrected
    own, own_of_sample, found = np.sum(read, axis=0) / np.sum(counted), read[sample] / counted[sample], []
    slopes = np.gradient(np.log(np.maximum(coarse, 1e-12)), values)

    def read_at(value):
        selected = dataclasses.replace(selection, tolerance=float(np.exp(value)))
        return _mean_read(model, predictor, batches[sample], counts[sample], selected, policy, prompt_tokens)

    for mean in tokens:
        at = place(own, mean)
        if at < 0 or at == len(fine) - 1:
            found.append(-np.inf if at < 0 else np.inf)
            continue
        share = (own[at] - mean) / max(own[at] - own[at + 1], 1e-12)
        value = fine[at] + share * (fine[at + 1] - fine[at])
        wanted = np.interp(value, fine, own_of_sample)
        found.append(_correct(value, wanted, np.interp(value, values, slopes), read_at, corrections))
    return [dataclasses.replace(selection, tolerance=float(np.exp(value))) for value in found]


def _parse_means(means: Sequence[float | int | str], most: float | int) -> list[float | int]:
    """Mean budgets as numbers. Raises ValueError for one out of range, or above the most that a row may read."""
    means = [parse_budget(mean) for mean in means]
    if any(not (mean > 0 and (isinstance(mean, int) or mean <= 1)) for mean in means):
        raise ValueError(f"mean budgets must be above 0, and fractions at most 1, got {means}")
    if above := [mean for mean in means if isinstance(mean, int) == isinstance(most, int) and mean > most]:
        raise ValueError(f"a mean budget of {above[0]} is above the most a row may read, {most}")
    return means


def _require_scores(policy: Policy, what: str) -> None:
    """Raise ValueError for a policy without scores to set `what` on."""
    if not isinstance(policy, Scoring) or policy.reads_everything:
        raise ValueError(f"the policy {policy.name} has no scores to set {what} on; take a policy that scores")


def _correct(value: float, mean: float, slope: float, read_at: Callable[[float], float], corrections: int) -> float:
    """The logarithm of a tolerance after Newton steps on the logarithm of what is read; `slope` is a first guess."""
    step = last = 0.0
    for _ in range(corrections):
        miss = np.log(read_at(value) / mean)
        if abs(miss) <= CLOSE:
            break
        if step and (miss - last) / step < 0:
            slope = (miss - last) / step
        step, last = -np.clip(miss / min(slope, -0.05), -2.0, 2.0), miss
        value += step
    return value


def _mean_read(
    model: BaseModel,
    predictor: Predictor | None,
    batch: dict[str, Array],
    counted: Bool[np.ndarray, "B T"],
    selection: SelectionConfig,
    policy: Policy,
    prompt_tokens: int,
) -> float:
    """The number of keys that a row which counts reads in a simulation on average."""
    prompts = np.full(batch["tokens"].shape[0], prompt_tokens, np.int32)
    asked = np.zeros(batch["tokens"].shape, bool)  # no logits
    found = simulate(model, batch, policy, selection, predictor, prompts=prompts, wanted=asked)
    held, windows = np.asarray(batch["positions"]) + 1, sliding_windows(model.config)
    if windows is not None:  # the served layers all slide, or none of them does
        held = np.minimum(held, min(windows[layer] for layer in model.config.served_layers))
    return float(np.mean((on_host(found.attended) * held)[counted], dtype=np.float64))


@partial(compiled, static_argnames=("policy", "rule", "first", "rows"))
def _sum_above(
    model: BaseModel,
    predictor: Predictor | None,
    batch: dict[str, Int[Array, "B T"]],
    counts: Bool[Array, "B T"],
    limits: Limits,
    grid: Float[Array, " tolerances"],
    *,
    policy: Scoring,
    rule: SelectionConfig,
    first: int,
    rows: int | None,
) -> tuple[Float[Array, " tolerances"], Float[Array, ""], Float[Array, ""]]:
    """Keys that score at least a logarithm of the grid, mean over served layers and heads, and keys that rows hold.

    They are summed over the rows of `spread` that count, whose number comes last.
    """
    length = counts.shape[1]
    counts = jnp.pad(counts, ((0, 0), (0, 1)))

    def one(chunk):
        scores, allowed = policy(chunk.under(rule)), chunk.allowed
        seen = scores, allowed[:, None], chunk.rows, rule, chunk.columns
        if rule.allocation == "top_p":
            weighed = weigh_units(*seen)
            scores = weighed.scores
        else:
            scores = best_in_unit(*seen)
        held = jnp.broadcast_to(jnp.sum(allowed, axis=-1, dtype=jnp.int32), counts.shape[:1] + allowed.shape[1:2])
        most = jnp.where(held > limits.min_context, limits.table[held], held)
        inside = jnp.take_along_axis(counts, jnp.minimum(chunk.rows.own, length), axis=1)

        def at(value):
            least = weighed.threshold(value.reshape(1, 1, 1))[..., None] if rule.allocation == "top_p" else value
            read = jnp.sum((scores >= least) & allowed[:, None], axis=-1, dtype=jnp.int32)
            read = jnp.where(held > limits.min_context, jnp.mean(jnp.minimum(read, most[:, None]), axis=1), held)
            return jnp.sum(jnp.where(inside, read, 0.0))

        return jax.lax.map(at, grid), jnp.sum(jnp.where(inside, held, 0).astype(jnp.float32)), _count(inside)

    read, held, number = sum_chunks(model, predictor, batch, one, rows=rows, first=first)
    served = np.asarray(model.config.served_layers)
    return jnp.mean(read[served], axis=0), jnp.mean(held[served]), number[served[0]]


def _count(rows: Bool[Array, "B C"]) -> Float[Array, ""]:
    """How many rows there are."""
    return jnp.sum(rows, dtype=jnp.int32).astype(jnp.float32)


@partial(compiled, static_argnames=("policy", "rule"))
def _sum_read(
    model: BaseModel,
    predictor: Predictor | None,
    batch: dict[str, Int[Array, "B T"]],
    limits: Limits,
    image: Int[Array, "L K"],
    *,
    policy: Policy,
    rule: SelectionConfig,
) -> tuple[Float[Array, "L K"], Float[Array, " L"], Float[Array, ""]]:
    """The keys that every layer and head reads, summed over the rows that are not padding.

    Then follow the keys that these rows hold in every layer, and the number of the rows.
    """
    segments, limits = batch["segments"], limits._replace(threshold=from_image(image))
    real = jnp.pad(segments > 0, ((0, 0), (0, 1)))  # rows beyond the end take the last column

    def one(chunk):
        mask, count = chosen_mask(chunk, lambda: policy(chunk.under(rule)), limits, rule)
        read = jnp.sum(mask, axis=-1, dtype=jnp.int32).astype(jnp.float32)
        inside = jnp.take_along_axis(real, jnp.minimum(chunk.rows.own, segments.shape[1]), axis=1)
        held = jnp.where(inside, count, 0).astype(jnp.float32)
        return jnp.sum(jnp.where(inside[:, None], read, 0.0), axis=(0, 2)), jnp.sum(held)

    return *sum_chunks(model, predictor, batch, one), _count(segments > 0)
