"""Arithmetic that the implementations share: exact products, log-sum-exps, and the merging of a softmax in parts."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def exact(dtype):
    """The precision of a product that multiplies float32 as float32 on every platform."""
    return "highest" if dtype == jnp.float32 else None


def product(a, b, contract=(1, 0)):
    """float32 product of matrices a and b, summed over dimension contract[0] of a and contract[1] of b."""
    dims = (((contract[0],), (contract[1],)), ((), ()))
    return jax.lax.dot_general(a, b, dims, preferred_element_type=jnp.float32, precision=exact(b.dtype))


def score_product(q_imp, k_imp):
    """float32 product of q_imp [G, R] and k_imp [R, C] of any two dtypes, exact."""
    if k_imp.dtype == jnp.int8:  # bfloat16 holds every int8, and TPUs convert it through float32
        k_imp = k_imp.astype(jnp.float32).astype(q_imp.dtype)
    elif k_imp.dtype != q_imp.dtype:
        k_imp, q_imp = k_imp.astype(jnp.float32), q_imp.astype(jnp.float32)
    return product(q_imp, k_imp)


def total_of(top, total):
    """The log-sum-exp, where total is the sum of exp(score - top); -inf without scores, +inf with a score of +inf."""
    found = jnp.where(total > 0, top + jnp.log(jnp.where(total > 0, total, 1.0)), -jnp.inf)
    return jnp.where(top < jnp.inf, found, jnp.inf)


def soft_cap(logits, cap):
    """cap * tanh(logits / cap); the logits themselves where cap is None."""
    return logits if cap is None else cap * jnp.tanh(logits / cap)


def finite_or_zero(totals):
    """The values that "normalised" pooling subtracts: the log-sum-exps, with 0 for those that are not finite."""
    return jnp.where(jnp.isfinite(totals), totals, 0.0)


def join_sums(first, second):
    """The sums of a softmax over two sets of keys; each as the parts of `finish`."""
    top = jnp.maximum(first[0], second[0])
    own, others = jnp.exp(first[0] - top), jnp.exp(second[0] - top)
    out = first[2] * own[..., None] + second[2] * others[..., None]
    return top, first[1] * own + second[1] * others, out


def finish(parts, q, new_k, new_v, scale, return_residual, softcap=None):
    """Attention over the chosen units and the new token, from the sums over the chosen units.

    parts: float32, the largest logit [B*K, G], the sum of weights exp(logit - largest logit) [B*K, G], and the weighted
    values [B*K, G, D]. softcap: of the new token's logit. The result is [B, H, D] in the dtype of q, and the
    log-sum-exp [B, H] on request.
    """
    top, total, out = parts
    rows, _, dim = out.shape
    if new_k is not None:
        queries = q.reshape(out.shape).astype(jnp.float32)
        logit = jnp.sum(queries * new_k.reshape(rows, 1, dim).astype(jnp.float32), axis=-1) * scale
        logit = soft_cap(logit, softcap)
        top, total, out = join_sums(parts, (logit, 1.0, new_v.reshape(rows, 1, dim).astype(jnp.float32)))
    none = total == 0  # NaN is not 0, so it stays
    total = jnp.where(none, 1.0, total)
    out = (out / total[..., None]).reshape(q.shape).astype(q.dtype)
    residual = jnp.where(none, -jnp.inf, top + jnp.log(total))
    return (out, residual.reshape(q.shape[:2])) if return_residual else out
