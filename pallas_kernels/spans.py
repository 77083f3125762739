"""Spans: keys that are attended by their mean, in place of being read."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.arithmetic import exact, join_sums, soft_cap
from pallas_kernels.reference import LOWEST, take_layer


class Spans(NamedTuple):
    """Means of spans of a cache. `counts` keys of a span are taken for as many that equal its mean key.

    Attributes:
        k, v: Mean keys and values, float [B, K, U, D]; [L, ...] with `layer`.
        counts: How many keys a span stands for in a row, int [B, K, U]. 0 leaves it out.
    """

    k: jax.Array
    v: jax.Array
    counts: jax.Array


def span_sums(q, k, v, counts, *, scale=1.0, softcap=None):
    """The sums of a softmax over spans: those of `arithmetic.finish`, float32 [B, K, R], [B, K, R] and [B, K, R, D].

    q: float [B, K, R, D], of R queries for each KV head. counts: int [B, K, R or 1, U].
    """
    logits = jnp.einsum("bkrd,bkud->bkru", q, k, preferred_element_type=jnp.float32, precision=exact(k.dtype))
    logits = soft_cap(logits * scale, softcap) + jnp.log(counts.astype(jnp.float32))
    logits = jnp.where(counts > 0, logits, -jnp.inf)  # the means of spans that are not full may be NaN
    top = jnp.maximum(jnp.max(logits, axis=-1, initial=-jnp.inf), LOWEST)
    weights = jnp.exp(logits - top[..., None])
    v = jnp.where(jnp.any(counts > 0, axis=2)[..., None], v, 0)
    weights_of_v = dict(preferred_element_type=jnp.float32, precision=exact(v.dtype))
    out = jnp.einsum("bkru,bkud->bkrd", weights.astype(v.dtype), v, **weights_of_v)
    return top, jnp.sum(weights, axis=-1), out


def join_spans(sums, q, spans, layer, **options):
    """The sums over chosen tokens [B*K, G, ...] with those over spans, if there are any."""
    if spans is None:
        return sums
    k, v = (take_layer(a, layer) for a in (spans.k, spans.v))
    queries = q.reshape(*spans.counts.shape[:2], -1, q.shape[-1]).astype(k.dtype)
    found = span_sums(queries, k, v, spans.counts[:, :, None], **options)
    found = [a.reshape(b.shape) for a, b in zip(found, sums, strict=True)]
    return join_sums(sums, found)
