"""The operations of `api.py` in one call: scores and choice of several layers, and the whole attention of one.

On GPU their kernels hand each other what no other operation reads, so nothing runs between them.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import checks
from pallas_kernels.api import importance_scores, masked_topk_decode_attention, select_top_k
from pallas_kernels.arguments import as_arrays, factor_of, terms_of
from pallas_kernels.choice import Rules, Selection, contested_range


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
        layer, implementation, interpret: See `api.py`.

    Returns:
        The `Selection`, as `select_top_k` gives it.

    Raises:
        ValueError: The arguments do not fit together, or the implementation is another platform's.
    """
    q_imp, k_imp, lengths, first, scales = as_arrays(q_imp, k_imp, lengths, first, scales)
    counts, threshold, offset = as_arrays(counts, threshold, offset)
    checks.check_importance(q_imp, k_imp, lengths, first, pooling, scales, layer)
    checks.check_vector("offset", offset, (q_imp.shape[:3],), "f")
    scored = jax.ShapeDtypeStruct((*q_imp.shape[:2], k_imp.shape[-1]), jnp.float32)
    checks.check_selection(scored, lengths, n, counts, sinks, recent, unit, first, threshold)
    name = checks.choose_for_scores(implementation, interpret, q_imp, k_imp)
    if name == "gpu" and k_imp.size * n:
        from pallas_kernels import gpu

        n, sinks, recent, unit = map(int, (n, sinks, recent, unit))
        options = dict(counts=counts, rules=Rules(sinks, recent, unit, first, threshold), layer=layer)
        options |= dict(scales=scales, scale=factor_of(scale, q_imp), interpret=interpret or False)
        return gpu.choose_by_importance(q_imp, k_imp, lengths, n, **options, **terms_of(pooling, q_imp, None, offset))
    begin, contested = contested_range(lengths, first, sinks, recent)
    shared = dict(implementation=name, interpret=interpret)
    scored = dict(pooling=pooling, offset=offset, scales=scales, scale=scale, layer=layer)
    scores = importance_scores(q_imp, k_imp, contested, first=begin, **scored, **shared)
    rules = dict(counts=counts, sinks=sinks, recent=recent, unit=unit, first=first, threshold=threshold)
    return select_top_k(scores, lengths, n, **rules, **shared)


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
    offset: jax.Array | None = None,
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
    """The decode attention of one layer: `choose_by_importance`, and attention over the choice.

    Args:
        q, k, v, new_k, new_v, scale, return_residual: See `masked_topk_decode_attention`. The current token, where it
            is given as new_k and new_v, is attended besides the n units.
        q_imp, k_imp, pooling, offset, scales: See `importance_scores`; score_scale is its scale.
        n, counts, sinks, recent, unit, threshold: See `select_top_k`.
        lengths, first: int [B], for all three.
        return_selection: Whether to return the choice too, to be attended again until the next prediction.
        layer, implementation, interpret: See `api.py`.

    Returns:
        [B, H, D]; with return_residual also the log-sum-exp [B, H]; with return_selection also the `Selection`.

    Raises:
        ValueError: The arguments do not fit together, or the implementation is another platform's.
    """
    q, k, v, q_imp, k_imp, new_k, new_v = as_arrays(q, k, v, q_imp, k_imp, new_k, new_v)
    lengths, first, threshold, counts = as_arrays(lengths, first, threshold, counts)
    offset, scales = as_arrays(offset, scales)
    checks.check_importance(q_imp, k_imp, lengths, first, pooling, scales, layer)
    checks.check_vector("offset", offset, (q_imp.shape[:3],), "f")
    checks.check_caches(k, q_imp, k_imp, layer)
    scored = jax.ShapeDtypeStruct((*q_imp.shape[:2], k.shape[-2]), jnp.float32)
    checks.check_selection(scored, lengths, n, counts, sinks, recent, unit, first, threshold)
    tpu_can = checks.tpu_can(unit, k) and checks.tpu_loads(q_imp, k_imp)
    name = checks.choose_implementation(implementation, interpret, tpu_can=tpu_can)
    if name == "gpu" and k_imp.size * n * k.size:
        from pallas_kernels import gpu

        listed = jax.ShapeDtypeStruct((*q_imp.shape[:2], n), jnp.int32)
        checks.check_attention(q, k, v, listed, None, unit, new_k, new_v, lengths, first, layer)
        n, sinks, recent, unit = map(int, (n, sinks, recent, unit))
        options = dict(counts=counts, rules=Rules(sinks, recent, unit, first, threshold), layer=layer)
        scored = dict(scales=scales, scale=factor_of(score_scale, q_imp)) | terms_of(pooling, q_imp, None, offset)
        options |= dict(new_k=new_k, new_v=new_v, scale=factor_of(scale, q), interpret=interpret or False)
        results = gpu.sparse_decode_attention(q, k, v, q_imp, k_imp, lengths, n, scored=scored, **options)
        asked = (True, return_residual, return_selection)
        given = tuple(result for result, wanted in zip(results, asked, strict=True) if wanted)
        return given if len(given) > 1 else given[0]
    shared = dict(layer=layer, implementation=name, interpret=interpret)
    rules = dict(counts=counts, sinks=sinks, recent=recent, unit=unit, first=first, threshold=threshold)
    scored = dict(pooling=pooling, offset=offset, scales=scales, scale=score_scale)
    chosen = choose_by_importance(q_imp, k_imp, lengths, n, **rules, **scored, **shared)
    shared |= dict(lengths=lengths, first=first, unit=unit, new_k=new_k, new_v=new_v, scale=scale)
    out = masked_topk_decode_attention(q, k, v, *chosen, return_residual=return_residual, **shared)
    if not return_selection:
        return out
    return (*out, chosen) if return_residual else (out, chosen)
