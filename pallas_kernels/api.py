"""The three parts of sparse decoding and the whole: score every cached token, choose a few, attend to those.

One alphabet: B batch, L layers, K KV heads, G query heads a KV head, H = K*G, S tokens a cache has room for, D head
dimension, R rank of the importance keys, n chosen units a row. A row holds the tokens 0 ... lengths-1 and, where
`first` is given (a sliding window), sees first ... lengths-1 of them.

Every function takes

- implementation: "reference" (plain jax.numpy, for reading and testing), "xla" (the fast form on CPU), "tpu" or "gpu"
  (Pallas kernels), or None, which takes the platform's own. A name is used or raises; it never falls back.
- interpret: None (the default) runs kernels on their own platform only. True, or pltpu.InterpretParams for "tpu",
  interprets them on any (slow, for tests). False lowers a kernel for its platform whatever this one is, to compile
  ahead of time.
- layer: an index, traced or not, into caches [L, ...] stacked over layers, so that a scan over layers need not copy a
  layer out of them.

Bad input raises ValueError saying what was given, what is wrong and what to do. The method is TokenButler, arXiv
2503.07518; dense decode attention reads 2*S*K*D numbers a row, this S*K*R + 2*n*unit*K*D.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import checks, reference, xla


class Selection(NamedTuple):
    """Chosen units: indices int32 [B, K, n], the valid ones first and ascending, the others 0; valid bool [B, K, n]."""

    indices: jax.Array
    valid: jax.Array


def importance_scores(
    q_imp: jax.Array,
    k_imp: jax.Array,
    lengths: jax.Array,
    *,
    pooling: str = "normalised",
    totals: jax.Array | None = None,
    scales: jax.Array | None = None,
    scale: float | None = None,
    first: jax.Array | None = None,
    layer: jax.Array | int | None = None,
    implementation: str | None = None,
    interpret: Any = None,
) -> jax.Array:
    """Score of every cached token for every KV head: scale * q_imp . score_key, pooled over the group's queries.

    q_imp [B, K, G, R]; k_imp [B, K, R, S] shared by a group, or [B, K*G, R, S] one a query head ([L, ...] with
    `layer`); lengths int [B]. Returns float32 [B, K, S], -inf for tokens a row does not see.

    pooling: "normalised" takes each query head's own log-sum-exp over the tokens seen off before the maximum over the
    group, so that heads compare (a group of one is left as it is); "maximum" is the plain maximum, cheaper. A product
    that is NaN counts as -inf, in sums too; a head with a product of +inf has nothing taken off: that token is first.
    totals: float [B, K, G], the log-sum-exps where the keys are a part of all (`importance_totals` of every part,
    merged).
    scales: for int8 keys only, float [K] or [B, K] (K*G where the keys are), see `quantise_k_imp`. scale: the
    factor on the products, R**-0.5 unless given. first: int [B], first token that a row sees.
    """
    lengths, first, scales, totals = _arrays(lengths, first, scales, totals)
    checks.check_importance(q_imp, k_imp, lengths, first, pooling, scales, layer)
    checks.check_vector("totals", totals, (q_imp.shape[:3],), "f")
    name = checks.choose_implementation(implementation, interpret)
    scale = q_imp.shape[-1] ** -0.5 if scale is None else scale
    options = dict(pooling=pooling, totals=totals, scales=scales, scale=scale, first=first, layer=layer)
    return _module(name).importance_scores(q_imp, k_imp, lengths, **options, **_interpret(name, interpret))


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
    """Log-sum-exp of every query head's scores, float32 [B, K, G], over the tokens seen; -inf where there are none.

    Arguments as in `importance_scores`, which takes them as `totals` where keys are split over devices.
    """
    lengths, first, scales = _arrays(lengths, first, scales)
    checks.check_importance(q_imp, k_imp, lengths, first, "normalised", scales, layer)
    name = checks.choose_implementation(implementation, interpret)
    scale = q_imp.shape[-1] ** -0.5 if scale is None else scale
    options = dict(scales=scales, scale=scale, first=first, layer=layer)
    return _module(name).importance_totals(q_imp, k_imp, lengths, **options, **_interpret(name, interpret))


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
    """The n best units of every row, exactly: ties go to the earlier one, none twice, none beyond lengths.

    scores [B, K, S], higher first, -inf and NaN last; lengths int [B]; n: units chosen at most, a static integer. A
    unit is a page of `unit` tokens (a power of two), unit u the tokens u*unit ... u*unit+unit-1; it counts as its best
    token. The last of a row may reach beyond its length: attention leaves those tokens out.

    counts: int [B] or [B, K], units that each row chooses, at most n (the default). sinks, recent: the first `sinks`
    and newest `recent` tokens come before every score, the newest first, as far as the count goes. first: int [B],
    nothing before it is chosen. threshold: float [K] or [B, K]; what scores below it is chosen only if it is forced.

    So equal scores give the recent, the sinks and the earliest others. A row of length 0 chooses nothing.
    Returns (indices, valid), see `Selection`; n of min(n, count, units that may be chosen) are valid.
    """
    lengths, first, threshold, counts = _arrays(lengths, first, threshold, counts)
    checks.check_selection(scores, lengths, n, counts, sinks, recent, unit, first, threshold)
    name = checks.choose_implementation(implementation, interpret)
    options = dict(counts=counts, sinks=sinks, recent=recent, unit=unit, first=first, threshold=threshold)
    return Selection(*_module(name).select_top_k(scores, lengths, n, **options, **_interpret(name, interpret)))


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
    layer: jax.Array | int | None = None,
    return_residual: bool = False,
    implementation: str | None = None,
    interpret: Any = None,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """Attention of one query a row over the chosen units of its cache; nothing else of the cache is read.

    q [B, H, D]; k, v [B, K, S, D] ([L, ...] with `layer`); indices int [B, K, n] of units, valid bool [B, K, n] (None:
    all), as `select_top_k` gives them. Tokens at or beyond lengths [B], or before first [B], are left out; lengths may
    be None where unit is 1 and every valid index is in range. new_k, new_v [B, K, D]: the current token, attended in
    addition, so it need not be in the cache yet. scale: the factor on the logits, D**-0.5 unless given.

    Returns [B, H, D] in the dtype of q, and on request the log-sum-exp of the scaled logits, float32 [B, H], with which
    partial results merge. A row that attends nothing, or logits of -inf (-1e30 and below) alone, gives 0 and -inf;
    one with a logit of +inf or NaN gives NaN.
    """
    lengths, first = _arrays(lengths, first)
    checks.check_attention(q, k, v, indices, valid, unit, new_k, new_v, lengths, first, layer)
    tpu_can = unit >= checks.SMALLEST_TPU_UNIT and k.shape[-2] % unit == 0
    name = checks.choose_implementation(implementation, interpret, tpu_can=tpu_can)
    if name == "tpu":
        checks.check_tpu_unit(unit, k.shape[-2])
    options = dict(
        unit=unit,
        new_k=new_k,
        new_v=new_v,
        lengths=lengths,
        first=first,
        scale=q.shape[-1] ** -0.5 if scale is None else scale,
        layer=layer,
        return_residual=return_residual,
    )
    attend = _module(name).masked_topk_decode_attention
    return attend(q, k, v, indices.astype(jnp.int32), valid, **options, **_interpret(name, interpret))


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
    """Score, choose and attend in one call: the decode attention of one layer.

    The same as `importance_scores` (q_imp, k_imp, pooling, scales; score_scale is its scale), `select_top_k` (n,
    counts, sinks, recent, unit, threshold) and `masked_topk_decode_attention` (q, k, v, new_k, new_v, scale) one after
    the other; lengths and first go to all three. The current token, if given as new_k and new_v, is attended besides
    the n units.

    Returns [B, H, D]; with return_residual also the log-sum-exp [B, H]; with return_selection also the `Selection`,
    to be attended again at the steps up to the next prediction.
    """
    lengths, first, threshold, counts, scales = _arrays(lengths, first, threshold, counts, scales)
    checks.check_importance(q_imp, k_imp, lengths, first, pooling, scales, layer)
    if not (k.ndim >= 3 and k.shape[-2] == k_imp.shape[-1]):
        raise ValueError(f"k {k.shape} and k_imp {k_imp.shape} must have room for the same number of tokens S")
    if layer is not None and k.shape[0] != k_imp.shape[0]:
        raise ValueError(f"k has {k.shape[0]} layers and k_imp {k_imp.shape[0]}; a cache has them for the same layers")
    if q_imp.shape[1] != k.shape[-3]:
        raise ValueError(f"q_imp {q_imp.shape} and k {k.shape} differ in KV heads K")
    shared = dict(lengths=lengths, first=first, implementation=implementation, interpret=interpret)
    tpu_can = unit >= checks.SMALLEST_TPU_UNIT and k.shape[-2] % unit == 0
    shared["implementation"] = checks.choose_implementation(implementation, interpret, tpu_can=tpu_can)
    scores = importance_scores(q_imp, k_imp, pooling=pooling, scales=scales, scale=score_scale, layer=layer, **shared)
    chosen = select_top_k(
        scores, n=n, counts=counts, sinks=sinks, recent=recent, unit=unit, threshold=threshold, **shared
    )
    out = masked_topk_decode_attention(
        q,
        k,
        v,
        *chosen,
        unit=unit,
        new_k=new_k,
        new_v=new_v,
        scale=scale,
        layer=layer,
        return_residual=return_residual,
        **shared,
    )
    if not return_selection:
        return out
    return (*out, chosen) if return_residual else (out, chosen)


def quantise_k_imp(k_imp: jax.Array, scales: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
    """Score keys [..., R, S] in int8 and their scales float32 [...]: key = scale * int8.

    One scale a head (and row, and layer): the largest magnitude maps to 127. With `scales` (shape [...], as an earlier
    call gave them) those are used and larger keys saturate: so new tokens are appended to a cache. Of a cache that has
    room left, unwritten keys must be finite; zeros do not change the scale.
    """
    if not k_imp.ndim >= 2:
        raise ValueError(f"k_imp must be [..., R, S], got shape {k_imp.shape}")
    heads = k_imp.shape[:-2]
    values = k_imp.astype(jnp.float32)
    if scales is None:
        scales = jnp.max(jnp.abs(values), axis=(-2, -1), initial=0.0) / 127.0
    checks.check_vector("scales", scales, (heads,), "f")
    scales = jnp.asarray(scales, jnp.float32)
    divisor = jnp.where(scales > 0, scales, 1.0)[..., None, None]
    return jnp.clip(jnp.round(values / divisor), -127, 127).astype(jnp.int8), scales


def _arrays(*values):
    """Lists and numpy arrays as jax arrays; None stays."""
    return tuple(None if value is None else jnp.asarray(value) for value in values)


def _module(name: str) -> ModuleType:
    """The module of an implementation; the kernels are imported when they are first asked for."""
    if name in ("reference", "xla"):
        return {"reference": reference, "xla": xla}[name]
    if name == "tpu":
        from pallas_kernels import tpu as kernels
    else:
        from pallas_kernels import gpu as kernels
    return kernels


def _interpret(name: str, interpret: Any) -> dict[str, Any]:
    return {"interpret": interpret or False} if name in ("tpu", "gpu") else {}
