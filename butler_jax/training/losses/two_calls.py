"""The cross entropy through calls of attention kernels, which hold no T x T matrix: Splash, or cuDNN without segments.

With a row's attention A and the predicted weights B over the contested keys, the loss of a row is

    sum_j A_ij * logsumexp_j(q_imp.k_imp) - q_imp . sum_j A_ij k_imp_j        (q_imp scaled by 1 / sqrt(R))

so it takes the mean of k_imp under A, which is attention with k_imp as values, and the log-sum-exp of the scores, which
an attention R wide returns. The gradients need the mean of k_imp under B, which that second call returns too.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array

from butler_jax.model import attention
from butler_jax.training.losses.contested_keys import KeyRange, counted_rows


def run_two_calls(
    q,
    k,
    v,
    q_imp,
    k_imp,
    segments,
    keys: KeyRange,
    *,
    implementation: str,
    differentiate: bool,
    softcap: float | None = None,
    sink_logits=None,
):
    """((output, loss, count), gradient of q_imp, gradient of k_imp) of `attend_with_cross_entropy`.

    The gradients are float32, and None unless `differentiate`. With sinks the output comes from a call of its own, and
    the mean under A is over the keys alone: the row's weight counts what the sink takes.
    """
    heads, dim, rank = q.shape[2], q.shape[3], q_imp.shape[3]
    scale = rank**-0.5
    counted = counted_rows(q.shape[:2], segments, keys)
    attend = functools.partial(attention.causal_attention, implementation=implementation)
    dtype = q_imp.dtype if implementation == "xla" else q.dtype
    q_imp, k_imp = q_imp.astype(dtype), k_imp.astype(dtype)
    # One call with [v ; k_imp] as values, unless k_imp has other heads than v or both are too wide for the kernel.
    weighed = not keys.all_contested or sink_logits is not None
    joined = not weighed and k_imp.shape[2] == k.shape[2]
    joined = joined and (implementation != "cudnn" or dim + rank <= attention.cudnn_head_dim())
    output = None
    if not joined:
        everything = dict(segments=segments, sliding_window=keys.sliding_window)
        terms = dict(softcap=softcap, sink_logits=sink_logits)
        output, lse_all = attend(q, k, v, return_lse=True, **everything, **terms)
    count = heads * jnp.sum(counted)
    if keys.sliding_window is not None and keys.recent >= keys.sliding_window:
        zeros = (jnp.zeros(x.shape, jnp.float32) for x in (q_imp, k_imp))
        return (output, jnp.zeros((), jnp.float32), count), *zeros

    # Shifting the query rows by `recent` makes their contested keys the causal ones. The sinks are shifted out where a
    # row holds one document, and otherwise get a segment of their own.
    key_shift = keys.sinks if segments is None else 0
    row_shift = key_shift + keys.recent
    shift_rows, shift_keys = (functools.partial(_shift, tokens=n) for n in (row_shift, key_shift))
    options = {"sliding_window": None if keys.sliding_window is None else keys.sliding_window - keys.recent}
    if segments is not None:
        options["segments"] = shift_rows(segments)
        options["key_segments"] = jnp.where(attention.document_places(segments) < keys.sinks, -1, segments)
    contested_k = shift_keys(jnp.repeat(k, k_imp.shape[2] // k.shape[2], axis=2))
    rows, rows_imp, weight = shift_rows(q), shift_rows(q_imp), shift_rows(counted)[:, :, None]

    def attend_true(values):
        """Attention of the frozen layer over the contested keys, k_imp among the values; and the log-sum-exp."""
        beside = jnp.concatenate([v, values.astype(v.dtype)], axis=-1) if joined else shift_keys(values)
        found = attend(rows, contested_k, beside, return_lse=weighed, softcap=softcap, **options)
        return found if weighed else (found, None)

    def attend_predicted(values):
        """Attention of the predictor's scores over the contested keys; and the log-sum-exp."""
        return attend(rows_imp, shift_keys(k_imp), shift_keys(values), return_lse=True, **options)

    if differentiate:
        true, pull_true, lse_true = jax.vjp(attend_true, k_imp, has_aux=True)
        mean_predicted, pull_predicted, lse = jax.vjp(attend_predicted, k_imp, has_aux=True)
    else:
        (true, lse_true), (mean_predicted, lse) = attend_true(k_imp), attend_predicted(k_imp)
    if joined:
        output = true[..., :dim]
    if weighed:  # each row weighs as much as the attention that goes to its contested keys
        weight = jnp.where(weight > 0, jnp.exp(jnp.minimum(lse_true - shift_rows(lse_all), 0.0)), 0.0)
    mean_true = true[..., -rank:].astype(jnp.float32)
    scaled = scale * rows_imp.astype(jnp.float32)
    loss = jnp.sum(jnp.where(weight == 0, 0.0, weight * (lse - jnp.sum(scaled * mean_true, axis=-1))))
    results = (output, loss, count)
    if not differentiate:
        return results, None, None
    # d lse_i / d k_imp_j is B_ij times the scaled q_imp_i: the gradient of their product with the mean under B, with
    # respect to the values alone.
    scaled = scaled * weight[..., None]
    dk_imp = pull_predicted(scaled.astype(mean_predicted.dtype))[0].astype(jnp.float32)
    away = jnp.pad(scaled, ((0, 0), (0, 0), (0, 0), (true.shape[-1] - rank, 0)))
    dk_imp -= pull_true(away.astype(true.dtype))[0].astype(jnp.float32)
    dq_imp = scale * weight[..., None] * (mean_predicted.astype(jnp.float32) - mean_true)
    return results, _shift(dq_imp, -row_shift), dk_imp


def _shift(x: Array, tokens: int) -> Array:
    """x [B, T, ...] moved `tokens` places to the left (to the right where negative), with zeros moved in."""
    if tokens == 0:
        return x
    kept = x[:, tokens:] if tokens > 0 else x[:, :tokens]
    room = x.shape[1] - kept.shape[1]
    return jnp.pad(kept, ((0, 0), (0, room) if tokens > 0 else (room, 0)) + ((0, 0),) * (x.ndim - 2))
