"""The cross entropy with errors in the residual stream as its target, in memory linear in the sequence, for TPU.

The norm |(v - o) W| is a root, so that no attention kernel sums it. Three passes give what `fused_pass` gives:

1. the attention of the frozen layer, with its output o and its log-sum-exp;
2. a kernel over the keys of every block of rows: it forms a tile of weights from the log-sum-exp, and of errors, and
   sums the errors, k_imp by errors and k_imp by predicted weights;
3. a kernel over the rows of every block of keys: the gradient of k_imp.

With G = W W^T of a query head, |(v - o) W|^2 is v G v - 2 v G o + o G o. A tile takes one product for the second term.
"""

from __future__ import annotations

import functools

import jax.numpy as jnp

from butler_jax.model import causal_attention
from butler_jax.parallel import by_rows_and_heads, platform
from butler_jax.training.losses.contested_keys import KeyRange, contested_bounds, counted_rows
from butler_jax.training.losses.flash_kernels import (
    LANES,
    Operands,
    TilePlan,
    block_size,
    key_gradients,
    squared_norms,
    sum_rows,
)
from butler_jax.training.losses.target import ErrorRule, ErrorTarget, FarKeys, offset_penalty

SUBLANES = 16  # of a tile of bfloat16: R is padded to a multiple


def run_flash(
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
    target: ErrorTarget,
    rule: ErrorRule,
    softcap: float | None = None,
    sink_logits=None,
):
    """((output, loss, count), gradients of q_imp, k_imp and the target's offset) of `attend_with_cross_entropy`.

    The gradients are float32, and None unless `differentiate`.
    """
    batch, length, heads, dim = q.shape
    kv_heads, scale = k.shape[2], q_imp.shape[-1] ** -0.5
    options = dict(segments=segments, sliding_window=keys.sliding_window, softcap=softcap, sink_logits=sink_logits)
    output, lse = causal_attention(q, k, v, implementation=implementation, return_lse=True, **options)
    dtype = jnp.float32 if q.dtype == jnp.float32 else jnp.bfloat16
    padding = -length % LANES

    def by_token(x):  # [B, T, H, D] -> [B, H, T, D]
        return jnp.pad(x, ((0, 0), (0, padding), (0, 0), (0, 0))).transpose(0, 2, 1, 3).astype(dtype)

    def by_rank(x):  # [B, T, H, R] -> [B, H, R, T]
        x = jnp.pad(x, ((0, 0), (0, padding), (0, 0), (0, -x.shape[3] % SUBLANES)))
        return x.transpose(0, 2, 3, 1).astype(dtype)

    none = jnp.zeros((batch, length), jnp.int32)
    far = FarKeys(none, none.astype(jnp.float32)) if target.far is None else target.far
    limits = zip((*contested_bounds((batch, length), segments, keys), far.end), (1, 0, 0), strict=True)
    bounds = [jnp.pad(x, ((0, 0), (0, padding)), constant_values=empty) for x, empty in limits]
    of_rows = [jnp.pad(x, ((0, 0), (0, padding))) for x in (far.log_count, target.norm)]
    lse = jnp.pad(lse, ((0, 0), (0, padding), (0, 0))).transpose(0, 2, 1)[:, :, None]
    run = functools.partial(
        _run_kernels, error=rule.error, softcap=softcap, differentiate=differentiate, interpret=platform() == "cpu"
    )
    operands = ("b--", "b--", "bh--", "bh--", "bh--", "bh--", "h---", "bh--", "bh--", "bh--")
    results = ("bh-", "bh-", "bh-", *(["bh--", "bh--"] if differentiate else []))
    run = by_rows_and_heads(run, operands, results, rows=batch, heads=kv_heads)
    mass, predicted_lse, cross_entropy, *gradients = run(
        jnp.stack(bounds, axis=1),
        jnp.stack(of_rows, axis=1),
        by_token(q * jnp.asarray(dim**-0.5, q.dtype)),  # rounded as Splash rounds it
        by_token(k),
        by_token(v),
        by_token(output),
        target.gram,
        by_rank(q_imp.astype(jnp.float32) * scale),
        by_rank(k_imp),
        lse,
    )
    stats = mass, predicted_lse, cross_entropy
    mass, predicted_lse, cross_entropy = (x[:, :, :length].transpose(0, 2, 1) for x in stats)
    counted = counted_rows((batch, length), segments, keys)
    offset = target.offset.astype(jnp.float32)
    penalty, doffset = offset_penalty(offset, predicted_lse, mass, counted[:, :, None], rule)
    loss = jnp.sum(cross_entropy) + penalty
    results = (output, loss, heads * jnp.sum(counted))
    if not differentiate:
        return results, None, None, None
    dq_imp, dk_imp = (x[:, :, : q_imp.shape[3], :length].transpose(0, 3, 1, 2) for x in gradients)
    return results, scale * dq_imp, dk_imp, doffset


def _run_kernels(
    bounds, of_rows, q, k, v, output, gram, q_imp, k_imp, lse, *, error, softcap, differentiate, interpret
):
    """Both kernels on the rows and heads of one device: (mass, lse, cross entropy), gradients of q_imp and k_imp.

    Letters and shapes as in `flash_kernels`, gram [K, G, D, D]; results have no dimension of 1.
    """
    heads, length = q.shape[1:3]
    group, share = heads // k.shape[1], heads // k_imp.shape[1]
    plan = TilePlan(block_size(length), group, share, error, softcap)
    gram = gram.reshape(heads, *gram.shape[2:])
    own, squares = (squared_norms(x, gram, plan.block, interpret=interpret) for x in (output, v))
    operands = Operands(bounds, of_rows, q, k, v, output, gram, q_imp, k_imp, lse, own, squares)
    sums = sum_rows(operands, plan, interpret=interpret)
    found = tuple(x[:, :, 0] for x in sums[:3])
    return (*found, sums.dq_imp, key_gradients(operands, sums, plan, interpret=interpret)) if differentiate else found
