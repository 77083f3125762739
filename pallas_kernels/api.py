"""Sparse decoding in three operations and as one: score every cached token, choose a few, attend to those.

Letters: B batch, L layers, K KV heads, G query heads a KV head, H = K*G, S tokens that a cache has room for, D head
dimension, R rank of q_imp and k_imp, N chosen units a row, U units of a cache. A row holds the tokens 0 ... lengths-1.
Where `first` is given, for a sliding window, it sees first ... lengths-1 of them.

Every operation takes

- implementation: "reference" (plain jax.numpy, for reading and testing), "xla" (the fast form on CPU), "tpu" or "gpu"
  (Pallas kernels), or None, which takes the platform's own. A named implementation runs or raises. It never falls back.
- interpret: None (the default) runs kernels on their own platform only. With a named kernel, True, or
  pltpu.InterpretParams for "tpu", interprets it on any platform, slowly, for tests, and False lowers it for its own
  platform on any, to compile ahead of time.
- layer: an index, traced or not, into caches [L, ...] stacked over layers. With it, a scan over layers does not copy a
  layer out of the caches. `importance_scores`, `importance_totals` and `choose_by_importance` take P of them too, int
  [P]. All other arrays then have B*P rows in the place of B: for each row of the cache one for every layer, in their
  order.

Call the operations under jax.jit: outside, each call is compiled anew. Bad input raises ValueError. The message says
what was given, what is wrong and what to do. The method is TokenButler, arXiv 2503.07518. For each row, dense decode
attention reads 2*S*K*D numbers, and this S*K*R + 2*N*unit*K*D.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import checks
from pallas_kernels.arguments import as_arrays, dispatch, factor_of, terms_of
from pallas_kernels.choice import Rules, Selection
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
    q_imp, k_imp, lengths, first, scales = as_arrays(q_imp, k_imp, lengths, first, scales)
    totals, offset = as_arrays(totals, offset)
    checks.check_importance(q_imp, k_imp, lengths, first, pooling, scales, layer)
    checks.check_vector("totals", totals, (q_imp.shape[:3],), "f")
    if totals is not None and pooling == "maximum":
        raise ValueError('totals are for the pooling "normalised"; leave them out')
    checks.check_vector("offset", offset, (q_imp.shape[:3],), "f")
    name = checks.choose_for_scores(implementation, interpret, q_imp, k_imp)
    scale = factor_of(scale, q_imp)
    module, options = dispatch(name, interpret, k_imp.size)
    options |= dict(scales=scales, scale=scale, first=first, layer=layer) | terms_of(pooling, q_imp, totals, offset)
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
    q_imp, k_imp, lengths, first, scales = as_arrays(q_imp, k_imp, lengths, first, scales)
    checks.check_importance(q_imp, k_imp, lengths, first, "normalised", scales, layer)
    name = checks.choose_for_scores(implementation, interpret, q_imp, k_imp)
    scale = factor_of(scale, q_imp)
    module, options = dispatch(name, interpret, k_imp.size)
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
    scores, lengths, first, threshold, counts = as_arrays(scores, lengths, first, threshold, counts)
    checks.check_selection(scores, lengths, n, counts, sinks, recent, unit, first, threshold)
    n, sinks, recent, unit = map(int, (n, sinks, recent, unit))
    name = checks.choose_implementation(implementation, interpret)
    module, options = dispatch(name, interpret, scores.size * n)
    options |= dict(counts=counts, rules=Rules(sinks, recent, unit, first, threshold))
    return Selection(*module.select_top_k(scores, lengths, n, **options))


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
        and -inf. A row with a logit of +inf or NaN gives NaN. What is not read may be NaN, but not for a gradient.

    Raises:
        ValueError: The arguments do not fit together, or the implementation is another platform's.
    """
    q, k, v, indices, valid = as_arrays(q, k, v, indices, valid)
    new_k, new_v, lengths, first = as_arrays(new_k, new_v, lengths, first)
    spans = None if spans is None else Spans(*as_arrays(*spans))
    checks.check_attention(q, k, v, indices, valid, unit, new_k, new_v, lengths, first, layer)
    checks.check_spans(spans, k, layer)
    unit = int(unit)
    spans = None if spans is not None and spans.counts.size == 0 else spans
    if softcap is not None:
        implementation = checks.choose_capped(implementation, softcap)
    name = checks.choose_implementation(implementation, interpret, tpu_can=checks.tpu_can(unit, k))
    if name == "tpu":
        checks.check_tpu_unit(unit, k)
    scale = factor_of(scale, q)
    module, options = dispatch(name, interpret, indices.size * k.size)
    options |= dict(lengths=lengths, first=first, layer=layer, return_residual=return_residual)
    options |= dict(unit=unit, new_k=new_k, new_v=new_v, spans=spans, scale=scale)
    if softcap is not None:
        options |= dict(softcap=softcap)
    return module.masked_topk_decode_attention(q, k, v, indices.astype(jnp.int32), valid, **options)


def quantise_k_imp(k_imp: jax.Array, scales: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
    """Quantise k_imp to int8 with one scale for each head (and row, and layer): k_imp = scale * int8.

    Args:
        k_imp: float [..., R, S]. Unwritten places of a cache hold 0, which does not change the scale. Neither does what
            is not finite: an infinity becomes 127, and NaN becomes 0.
        scales: float [...] of an earlier call, to append new tokens to a cache; larger values saturate. None maps the
            largest magnitude to 127, and that of a head of zeros alone to 1.

    Returns:
        int8 [..., R, S] and float32 [...].

    Raises:
        ValueError: k_imp has fewer than two dimensions, or the scales are not those of its heads.
    """
    k_imp, scales = as_arrays(k_imp, scales)
    if k_imp.ndim < 2:
        raise ValueError(f"k_imp must be [..., R, S], got shape {k_imp.shape}")
    heads = k_imp.shape[:-2]
    values = k_imp.astype(jnp.float32)
    if scales is None:
        largest = jnp.max(jnp.abs(values), axis=(-2, -1), initial=0.0, where=jnp.isfinite(values))
        scales = jnp.where(largest > 0, largest, 1.0) / 127.0
    checks.check_vector("scales", scales, (heads,), "f")
    scales = scales.astype(jnp.float32)
    divisor = jnp.where(scales > 0, scales, 1.0)[..., None, None]
    values = jnp.nan_to_num(values / divisor, nan=0.0)
    return jnp.clip(jnp.round(values), -127, 127).astype(jnp.int8), scales
