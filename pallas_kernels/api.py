"""Sparse decoding in three operations and as one: score every cached token, choose a few, attend to those.

Letters: B batch, L layers, K KV heads, G query heads a KV head, H = K*G, S tokens that a cache has room for, D head
dimension, R rank of q_imp and k_imp, N chosen units a row, U units of a cache. A row holds the tokens 0 ... lengths-1.
Where `first` is given, for a sliding window, it sees first ... lengths-1 of them.

Every operation takes

- implementation: "reference" (plain jax.numpy, for reading and testing), "xla" (the fast form on CPU), "tpu" or "gpu"
  (Pallas kernels), or None, which takes the platform's own. A named implementation runs or raises. It never falls back.
- interpret: None (the default) runs kernels on their own platform only. True, or pltpu.InterpretParams for "tpu",
  interprets them on any platform, slowly, for tests. False lowers a kernel for its own platform on any, to compile
  ahead of time.
- layer: an index, traced or not, into caches [L, ...] stacked over layers. With it, a scan over layers does not copy a
  layer out of the caches. `importance_scores`, `importance_totals` and `choose_by_importance` take P of them too, int
  [P]. All other arrays then have B*P rows in the place of B: for each row of the cache one for every layer, in their
  order.

Bad input raises ValueError. The message says what was given, what is wrong and what to do. The method is TokenButler,
arXiv 2503.07518. For each row, dense decode attention reads 2*S*K*D numbers, and this S*K*R + 2*N*unit*K*D.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import checks, reference, xla
from pallas_kernels.arithmetic import finite_or_zero
from pallas_kernels.choice import Rules, Selection
from pallas_kernels.reference import LOWEST
from pallas_kernels.spans import Spans


def importance_scores(
    q_imp: jax.Array,
    k_imp: jax.Array,
    lengths: jax.Array,
    *,
    pooling: str = "normalised",
    totals: jax.Array | None = None,
    offset: jax.Array | None = None,
    scales: jax.Array | None = None,
    scale: float | None = None,
    first: jax.Array | None = None,
    layer: jax.Array | int | None = None,
    implementation: str | None = None,
    interpret: Any = None,
) -> jax.Array:
    """Score of every cached token for every KV head: scale * q_imp . k_imp, pooled over the group's query heads.

    A product that is NaN counts as -inf, in sums too. On TPU, heads of k_imp are multiplied together: where a number of
    a token's k_imp is not finite, the token scores -inf for all of these heads.

    Args:
        q_imp: float [B, K, G, R], the predictor's queries.
        k_imp: float or int8, the predictor's keys: [B, K, R, S] shared by a group, or [B, K*G, R, S] for every query
            head; [L, ...] with `layer`.
        lengths: int [B], tokens of each row.
        pooling: "normalised" subtracts each query head's log-sum-exp over the tokens seen and takes the maximum over
            the group. That makes the heads comparable. A group of one is unchanged, and so is a head with a product of
            +inf, whose token comes first. "maximum" is the plain maximum, which is cheaper.
        totals: float [B, K, G], the log-sum-exps over all tokens, where k_imp holds a part of them: the merged
            `importance_totals` of all parts.
        offset: float [B, K, G], added to the scores of each query head before the maximum is taken, in both poolings.
            With it a group of one is normalised too. It is held within 1e30, and NaN counts as -1e30. So -inf leaves a
            head out, where another has a score.
        scales: float [K] or [B, K], K*G in place of K where k_imp has them; for int8 only, see `quantise_k_imp`.
        scale: The factor on the products, R**-0.5 unless given.
        first: int [B], the first token that a row sees.
        layer, implementation, interpret: See the module.

    Returns:
        float32 [B, K, S], -inf for tokens that a row does not see.

    Raises:
        ValueError: The arguments do not fit together, or the implementation is another platform's.
    """
    q_imp, k_imp, lengths, first, scales = _arrays(q_imp, k_imp, lengths, first, scales)
    totals, offset = _arrays(totals, offset)
    checks.check_importance(q_imp, k_imp, lengths, first, pooling, scales, layer)
    checks.check_vector("totals", totals, (q_imp.shape[:3],), "f")
    if totals is not None and pooling == "maximum":
        raise ValueError('totals are for the pooling "normalised"; leave them out')
    checks.check_vector("offset", offset, (q_imp.shape[:3],), "f")
    name = checks.choose_implementation(implementation, interpret)
    scale = _factor(scale, q_imp)
    module, options = _dispatch(name, interpret, k_imp.size)
    options |= dict(scales=scales, scale=scale, first=first, layer=layer) | _terms(pooling, q_imp, totals, offset)
    return module.importance_scores(q_imp, k_imp, lengths, **options)


def importance_totals(
    q_imp: jax.Array,
    k_imp: jax.Array,
    lengths: jax.Array,
    *,
    scales: jax.Array | None = None,
    scale: float | None = None,
    first: jax.Array | None = None,
    layer: jax.Array | int | None = None,
    implementation: str | None = None,
    interpret: Any = None,
) -> jax.Array:
    """Log-sum-exp of every query head's scores over the tokens seen, for a k_imp that is split over devices.

    Args:
        q_imp, k_imp, lengths, scales, scale, first: See `importance_scores`, whose `totals` these are.
        layer, implementation, interpret: See the module.

    Returns:
        float32 [B, K, G], -inf where a row sees nothing.

    Raises:
        ValueError: As `importance_scores`.
    """
    q_imp, k_imp, lengths, first, scales = _arrays(q_imp, k_imp, lengths, first, scales)
    checks.check_importance(q_imp, k_imp, lengths, first, "normalised", scales, layer)
    name = checks.choose_implementation(implementation, interpret)
    scale = _factor(scale, q_imp)
    module, options = _dispatch(name, interpret, k_imp.size)
    options |= dict(scales=scales, scale=scale, first=first, layer=layer)
    return module.importance_totals(q_imp, k_imp, lengths, **options)


def select_top_k(
    scores: jax.Array,
    lengths: jax.Array,
    n: int,
    *,
    counts: jax.Array | None = None,
    sinks: int = 0,
    recent: int = 0,
    unit: int = 1,
    first: jax.Array | None = None,
    threshold: jax.Array | None = None,
    implementation: str | None = None,
    interpret: Any = None,
) -> Selection:
    """The n best units of every row, exactly: recent tokens first, then sinks, then by score.

    Of equal scores the earlier unit is chosen. A row of length 0 chooses nothing.

    Args:
        scores: float [B, K, S], higher first; -inf and NaN come last.
        lengths: int [B], tokens of each row.
        n: The most units chosen, a static integer.
        counts: int [B] or [B, K], units that each row chooses, at most n, which is the default.
        sinks, recent: The first `sinks` and the newest `recent` tokens come before every score, the newest first. They
            count towards n.
        unit: Tokens of a unit, a power of two. Unit u holds the tokens u*unit ... u*unit+unit-1 and counts as its best
            token. The last unit of a row may reach beyond its length; attention leaves those tokens out.
        first: int [B], the first token that a row sees.
        threshold: float [K] or [B, K]; a token that scores below it is chosen only as a sink or recent token.
        implementation, interpret: See the module.

    Returns:
        The `Selection`, of which min(n, count, units that may be chosen) are valid.

    Raises:
        ValueError: The arguments do not fit together, or the implementation is another platform's.
    """
    scores, lengths, first, threshold, counts = _arrays(scores, lengths, first, threshold, counts)
    checks.check_selection(scores, lengths, n, counts, sinks, recent, unit, first, threshold)
    n, sinks, recent, unit = map(int, (n, sinks, recent, unit))
    name = checks.choose_implementation(implementation, interpret)
    module, options = _dispatch(name, interpret, scores.size * n)
    options |= dict(counts=counts, rules=Rules(sinks, recent, unit, first, threshold))
    return Selection(*module.select_top_k(scores, lengths, n, **options))


def choose_by_importance(
    q_imp: jax.Array,
    k_imp: jax.Array,
    lengths: jax.Array,
    n: int,
    *,
    counts: jax.Array | None = None,
    sinks: int = 0,
    recent: int = 0,
    unit: int = 1,
    first: jax.Array | None = None,
    threshold: jax.Array | None = None,
    pooling: str = "normalised",
    offset: jax.Array | None = None,
    scales: jax.Array | None = None,
    scale: float | None = None,
    layer: jax.Array | int | None = None,
    implementation: str | None = None,
    interpret: Any = None,
) -> Selection:
    """The n best units of every row by `importance_scores`: the choice of a decode step, for P layers at once.

    Sinks and recent tokens are chosen in any case, so they are not scored, and log-sum-exps leave them out, as in
    training. On GPU the scores are not written.

    Args:
        q_imp, k_imp, pooling, offset, scales, scale: See `importance_scores`.
        lengths, n, counts, sinks, recent, unit, first, threshold: See `select_top_k`.
        layer, implementation, interpret: See the module.

    Returns:
        The `Selection`, as `select_top_k` gives it.

    Raises:
        ValueError: The arguments do not fit together, or the implementation is another platform's.
    """
    q_imp, k_imp, lengths, first, scales = _arrays(q_imp, k_imp, lengths, first, scales)
    counts, threshold, offset = _arrays(counts, threshold, offset)
    checks.check_importance(q_imp, k_imp, lengths, first, pooling, scales, layer)
    checks.check_vector("offset", offset, (q_imp.shape[:3],), "f")
    scored = jax.ShapeDtypeStruct((*q_imp.shape[:2], k_imp.shape[-1]), jnp.float32)
    checks.check_selection(scored, lengths, n, counts, sinks, recent, unit, first, threshold)
    begin = jnp.maximum(jnp.zeros_like(lengths) if first is None else first, sinks)
    contested = jnp.maximum(lengths - recent, 0)
    name = checks.choose_implementation(implementation, interpret)
    if name == "gpu" and k_imp.size * n:
        from pallas_kernels import gpu

        if gpu.can_image(q_imp, k_imp, unit):
            n, sinks, recent, unit = map(int, (n, sinks, recent, unit))
            options = dict(counts=counts, rules=Rules(sinks, recent, unit, first, threshold), contested=contested)
            options |= dict(begin=begin, scales=scales, scale=_factor(scale, q_imp), layer=layer)
            options |= _terms(pooling, q_imp, None, offset) | dict(interpret=interpret or False)
            return gpu.choose_by_importance(q_imp, k_imp, lengths, n, **options)
    shared = dict(implementation=name, interpret=interpret)
    scored = dict(pooling=pooling, offset=offset, scales=scales, scale=scale, layer=layer)
    scores = importance_scores(q_imp, k_imp, contested, first=begin, **scored, **shared)
    rules = dict(counts=counts, sinks=sinks, recent=recent, unit=unit, first=first, threshold=threshold)
    return select_top_k(scores, lengths, n, **rules, **shared)


def masked_topk_decode_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    indices: jax.Array,
    valid: jax.Array | None = None,
    *,
    unit: int = 1,
    new_k: jax.Array | None = None,
    new_v: jax.Array | None = None,
    lengths: jax.Array | None = None,
    first: jax.Array | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    spans: Spans | None = None,
    layer: jax.Array | int | None = None,
    return_residual: bool = False,
    implementation: str | None = None,
    interpret: Any = None,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """Attention of one query a row over the chosen units of its cache. Nothing else of the cache is read.

    Args:
        q: float [B, H, D]. The kernels, and the sums over spans, round it to the dtype of k.
        k, v: float [B, K, S, D]; [L, ...] with `layer`.
        indices: int [B, K, N], the chosen units.
        valid: bool [B, K, N], which of the indices count, as `select_top_k` gives them; None means all.
        unit: Tokens of a unit, a power of two.
        new_k, new_v: [B, K, D], the current token. It is attended in addition and need not be in the cache yet.
        lengths: int [B]; tokens at or beyond it are left out. None is allowed where unit is 1 and every valid index is
            in range.
        first: int [B]; tokens before it are left out.
        scale: The factor on the logits, D**-0.5 unless given.
        softcap: Scaled logits x become c tanh(x / c) for this c. The kernels of "tpu" and "gpu" cannot; None as
            implementation takes "xla" then.
        spans: Keys that are attended by the means of spans besides; see `Spans`. On GPU they take no launch of their
            own.
        return_residual: Whether to return the log-sum-exp too.
        layer, implementation, interpret: See the module.

    Returns:
        [B, H, D] in the dtype of q; with return_residual also the log-sum-exp of the scaled logits, float32 [B, H],
        with which partial results can be merged. A row that attends nothing, or only logits of -1e30 and below, gives 0
        and -inf. A row with a logit of +inf or NaN gives NaN.

    Raises:
        ValueError: The arguments do not fit together, or the implementation is another platform's.
    """
    q, k, v, indices, valid = _arrays(q, k, v, indices, valid)
    new_k, new_v, lengths, first = _arrays(new_k, new_v, lengths, first)
    spans = None if spans is None else Spans(*_arrays(*spans))
    checks.check_attention(q, k, v, indices, valid, unit, new_k, new_v, lengths, first, layer)
    checks.check_spans(spans, k, layer)
    unit = int(unit)
    spans = None if spans is not None and spans.counts.size == 0 else spans
    if softcap is not None:
        implementation = checks.choose_capped(implementation, softcap)
    name = checks.choose_implementation(implementation, interpret, tpu_can=checks.tpu_can(unit, k.shape[-2]))
    if name == "tpu":
        checks.check_tpu_unit(unit, k.shape[-2])
    scale = _factor(scale, q)
    module, options = _dispatch(name, interpret, indices.size * k.size)
    options |= dict(lengths=lengths, first=first, layer=layer, return_residual=return_residual)
    options |= dict(unit=unit, new_k=new_k, new_v=new_v, spans=spans, scale=scale)
    if softcap is not None:
        options |= dict(softcap=softcap)
    return module.masked_topk_decode_attention(q, k, v, indices.astype(jnp.int32), valid, **options)


def sparse_decode_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    q_imp: jax.Array,
    k_imp: jax.Array,
    lengths: jax.Array,
    n: int,
    *,
    counts: jax.Array | None = None,
    sinks: int = 0,
    recent: int = 0,
    unit: int = 1,
    first: jax.Array | None = None,
    threshold: jax.Array | None = None,
    pooling: str = "normalised",
    scales: jax.Array | None = None,
    score_scale: float | None = None,
    new_k: jax.Array | None = None,
    new_v: jax.Array | None = None,
    scale: float | None = None,
    layer: jax.Array | int | None = None,
    return_residual: bool = False,
    return_selection: bool = False,
    implementation: str | None = None,
    interpret: Any = None,
) -> Any:
    """The decode attention of one layer: scores, choice and attention, one after the other.

    Args:
        q, k, v, new_k, new_v, scale, return_residual: See `masked_topk_decode_attention`. The current token, where it
            is given as new_k and new_v, is attended besides the n units.
        q_imp, k_imp, pooling, scales: See `importance_scores`; score_scale is its scale.
        n, counts, sinks, recent, unit, threshold: See `select_top_k`.
        lengths, first: int [B], for all three.
        return_selection: Whether to return the choice too, to be attended again until the next prediction.
        layer, implementation, interpret: See the module.

    Returns:
        [B, H, D]; with return_residual also the log-sum-exp [B, H]; with return_selection also the `Selection`.

    Raises:
        ValueError: The arguments do not fit together, or the implementation is another platform's.
    """
    q, k, v, q_imp, k_imp, new_k, new_v = _arrays(q, k, v, q_imp, k_imp, new_k, new_v)
    lengths, first, threshold, counts, scales = _arrays(lengths, first, threshold, counts, scales)
    checks.check_importance(q_imp, k_imp, lengths, first, pooling, scales, layer)
    checks.check_caches(k, q_imp, k_imp, layer)
    checks.check_counts(n, k.shape[-2], unit, sinks, recent)
    tpu_can = checks.tpu_can(unit, k.shape[-2])
    name = checks.choose_implementation(implementation, interpret, tpu_can=tpu_can)
    if name == "gpu" and k_imp.size * n * k.size:  # its kernels hand each other what no other operation reads
        from pallas_kernels import gpu

        scored = jax.ShapeDtypeStruct((*q_imp.shape[:2], k.shape[-2]), jnp.float32)
        checks.check_selection(scored, lengths, n, counts, sinks, recent, unit, first, threshold)
        listed = jax.ShapeDtypeStruct((*q_imp.shape[:2], n), jnp.int32)
        checks.check_attention(q, k, v, listed, None, unit, new_k, new_v, lengths, first, layer)
        n, sinks, recent, unit = map(int, (n, sinks, recent, unit))
        options = dict(counts=counts, rules=Rules(sinks, recent, unit, first, threshold), scales=scales, layer=layer)
        options |= dict(normalised=_normalises(pooling, q_imp), score_scale=_factor(score_scale, q_imp))
        options |= dict(new_k=new_k, new_v=new_v, scale=_factor(scale, q), interpret=interpret or False)
        results = gpu.sparse_decode_attention(q, k, v, q_imp, k_imp, lengths, n, **options)
        asked = (True, return_residual, return_selection)
        given = tuple(result for result, wanted in zip(results, asked, strict=True) if wanted)
        return given if len(given) > 1 else given[0]
    shared = dict(lengths=lengths, first=first, implementation=name, interpret=interpret)
    scores = importance_scores(q_imp, k_imp, pooling=pooling, scales=scales, scale=score_scale, layer=layer, **shared)
    rules = dict(counts=counts, sinks=sinks, recent=recent, unit=unit, threshold=threshold)
    chosen = select_top_k(scores, n=n, **rules, **shared)
    shared |= dict(unit=unit, new_k=new_k, new_v=new_v, scale=scale, layer=layer, return_residual=return_residual)
    out = masked_topk_decode_attention(q, k, v, *chosen, **shared)
    if not return_selection:
        return out
    return (*out, chosen) if return_residual else (out, chosen)


def quantise_k_imp(k_imp: jax.Array, scales: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
    """Quantise k_imp to int8 with one scale for each head (and row, and layer): k_imp = scale * int8.

    Args:
        k_imp: float [..., R, S]. Unwritten places of a cache must be finite. Zeros do not change the scale.
        scales: float [...] of an earlier call, to append new tokens to a cache; larger values saturate. None maps the
            largest magnitude to 127.

    Returns:
        int8 [..., R, S] and float32 [...].

    Raises:
        ValueError: k_imp has fewer than two dimensions, or the scales are not those of its heads.
    """
    k_imp, scales = _arrays(k_imp, scales)
    if k_imp.ndim < 2:
        raise ValueError(f"k_imp must be [..., R, S], got shape {k_imp.shape}")
    heads = k_imp.shape[:-2]
    values = k_imp.astype(jnp.float32)
    if scales is None:
        scales = jnp.max(jnp.abs(values), axis=(-2, -1), initial=0.0) / 127.0
    checks.check_vector("scales", scales, (heads,), "f")
    scales = scales.astype(jnp.float32)
    divisor = jnp.where(scales > 0, scales, 1.0)[..., None, None]
    return jnp.clip(jnp.round(values / divisor), -127, 127).astype(jnp.int8), scales


def _arrays(*values):
    """Lists and numpy arrays as jax arrays. None stays None."""
    return tuple(None if value is None else jnp.asarray(value) for value in values)


def _factor(scale: float | None, queries: jax.Array) -> float:
    """The factor on products with queries [..., D] or [..., R]: that given, or the default."""
    if isinstance(scale, jax.core.Tracer):
        raise ValueError(f"scale must be a number that is known when the call is traced, got {scale}")
    return queries.shape[-1] ** -0.5 if scale is None else scale


def _normalises(pooling: str, q_imp: jax.Array, offset: jax.Array | None = None) -> bool:
    """Whether log-sum-exps are taken off the scores. One query head alone needs none, unless it has an offset."""
    return pooling == "normalised" and (q_imp.shape[2] > 1 or offset is not None)


def _terms(pooling: str, q_imp: jax.Array, totals: jax.Array | None, offset: jax.Array | None) -> dict[str, Any]:
    """What is taken off the scores and added to them, as the implementations take it."""
    normalised = _normalises(pooling, q_imp, offset)
    totals = totals if normalised else None
    if offset is not None:
        offset = jnp.clip(jnp.nan_to_num(offset.astype(jnp.float32), nan=LOWEST), LOWEST, -LOWEST)
        if totals is not None or not normalised:  # known before the kernel: one term
            totals, offset, normalised = (0.0 if totals is None else finite_or_zero(totals)) - offset, None, True
    return dict(normalised=normalised, totals=totals, offset=offset)


def _dispatch(name: str, interpret: Any, work: int) -> tuple[ModuleType, dict[str, Any]]:
    """The module of an implementation, imported on first use, and the options that it alone takes.

    work is 0 where an array is empty. The reference runs then, since kernels have blocks of at least one element.
    """
    if name == "reference" or work == 0:
        return reference, {}
    if name == "xla":
        return xla, {}
    if name == "tpu":
        from pallas_kernels import tpu as kernels
    else:
        from pallas_kernels import gpu as kernels
    return kernels, {"interpret": interpret or False}
