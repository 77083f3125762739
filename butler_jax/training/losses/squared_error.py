"""The squared error between the logits of a frozen layer and the scores of a predictor, in linear time and memory."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from butler_jax.model import attention
from butler_jax.training.losses.arrays import check_shapes, scale_gradients


def attend_with_squared_error(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B T K D"],
    v: Float[Array, "B T K D"],
    q_imp: Float[Array, "B T H R"],
    k_imp: Float[Array, "B T Q R"],
    *,
    segments: Int[Array, "B T"] | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    sink_logits: Float[Array, " H"] | None = None,
    implementation: str | None = None,
) -> tuple[Float[Array, "B T H D"], Float[Array, ""], Float[Array, ""]]:
    """The layer's attention output [B, T, H, D], and the squared error and its number of terms of `sum_squared_errors`.

    Arguments and errors are those of `attend_with_cross_entropy`. sliding_window and implementation concern the output
    only: the squared error takes all causal pairs of a document even where the layer has a sliding window, because its
    logits are defined for all of them. The same holds for sink_logits. The output carries no gradient.

    Raises:
        ValueError: There is a soft cap. The pass in linear time needs logits that are products.
    """
    require_products(softcap)
    options = dict(segments=segments, sliding_window=sliding_window, implementation=implementation)
    output = attention.causal_attention(q, k, v, sink_logits=sink_logits, **options)
    loss, count = sum_squared_errors(q, k, q_imp, k_imp, segments=segments)
    return jax.lax.stop_gradient(output), loss, count


def require_products(softcap: float | None) -> None:
    """Raise ValueError where logits are no products, because they have a soft cap."""
    if softcap is not None:
        raise ValueError(
            f"the squared error cannot follow logits with a soft cap ({softcap}), which this model's attention has; "
            "train with --objective cross_entropy"
        )


def sum_squared_errors(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B T K D"],
    q_imp: Float[Array, "B T H R"],
    k_imp: Float[Array, "B T Q R"],
    *,
    segments: Int[Array, "B T"] | None = None,
    chunk: int = attention.CHUNK,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Sum over heads and causal pairs of (q_i.k_j / sqrt(D) - q_imp_i.k_imp_j / sqrt(R))^2, and the number of terms.

    TokenButler, arXiv 2503.07518, first version, equation of the training loss, but over the causal pairs of a document
    alone. Time and memory are linear in T. Pairs inside a chunk of rows are formed. Those with earlier chunks come from
    the Gram matrix of [k ; k_imp] so far, (D+R) x (D+R), summed in float32. It starts anew with each document, whose
    tokens must be contiguous.

    Only q_imp and k_imp get gradients, which are formed in the forward pass. The value is a difference of sums of
    squared logits, exact to about 1e-6 of these sums.

    Args:
        q, k, q_imp, k_imp, segments: As in `attend_with_cross_entropy`.
        chunk: Query rows of a chunk, C.

    Raises:
        ValueError: For shapes that do not fit, or a chunk below 1.
    """
    check_shapes(q, k, k, q_imp, k_imp, segments, None)
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1, got {chunk}")
    loss = _squared_error(q, k, q_imp, k_imp, segments, min(chunk, q.shape[1]))
    return loss, _pair_count(q, segments)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _squared_error(q, k, q_imp, k_imp, segments, chunk):
    return _squared_error_pass(q, k, q_imp, k_imp, segments, chunk, differentiate=False)[0]


def _squared_error_forward(q, k, q_imp, k_imp, segments, chunk):
    loss, dq_imp, dk_imp = _squared_error_pass(q, k, q_imp, k_imp, segments, chunk, differentiate=True)
    return loss, (dq_imp.astype(q_imp.dtype), dk_imp.astype(k_imp.dtype))


def _squared_error_backward(chunk, gradients, cotangent):
    return None, None, *scale_gradients(gradients, cotangent), None


_squared_error.defvjp(_squared_error_forward, _squared_error_backward)


def _squared_error_pass(q, k, q_imp, k_imp, segments, chunk, *, differentiate):
    batch, length, _, dim = q.shape
    heads, rank = k_imp.shape[2], k_imp.shape[3]
    scale = rank**-0.5
    width = dim + rank
    # Residuals are differences of logits. Factors rounded as in TF32, or in a single pass of a TPU, would drown them.
    product = functools.partial(jnp.einsum, precision="highest")
    # Rows u = [q / sqrt(D) ; -q_imp / sqrt(R)] and w = [k ; k_imp]: every residual is u.w.
    q, k, q_imp, k_imp = (x.astype(jnp.float32) for x in (q, k, q_imp, k_imp))
    u = jnp.concatenate([q * dim**-0.5, q_imp * -scale], axis=-1)
    w = jnp.concatenate([jnp.repeat(k, heads // k.shape[2], axis=2), k_imp], axis=-1)
    u, w = attention.split_queries(u, heads, chunk), attention.split_queries(w, heads, chunk)
    group = u.shape[3] // chunk
    causal = jnp.tril(jnp.ones((chunk, chunk), bool))[None]
    open_segments = ids = None
    if segments is not None:
        ids = attention.split_segments(segments, chunk).reshape(batch, -1, chunk).transpose(1, 0, 2)
        open_segments = jnp.zeros((batch,), ids.dtype)

    def keep(x, rows):
        """x [B, Q, M, ...] in the rows [B, C] of the chunk, else 0; a tile has M = C H/Q rows."""
        shape = x.shape
        x = x.reshape(*shape[:2], -1, chunk, shape[3])
        return jnp.where(rows[:, None, None, :, None], x, 0).reshape(shape)

    def advance(state, update, open_before, open_after):
        if open_before is None:
            return state + update
        return jnp.where((open_before == open_after)[:, None, None, None], state, 0) + update

    def forward(carry, inputs):
        loss, gram, before = carry
        u, w, ids = inputs
        mask = causal
        if ids is not None:
            mask = mask & (ids[:, :, None] == ids[:, None, :]) & (ids != 0)[:, :, None]
        inside = product("bqmd,bqsd->bqms", u, w).reshape(batch, heads, group, chunk, chunk)
        inside = jnp.where(mask[:, None, None], inside, 0).reshape(batch, heads, group * chunk, chunk)
        earlier = product("bqmd,bqde->bqme", u, gram)
        after, w_open = None, w
        if ids is not None:
            after = ids[:, -1]
            earlier = keep(earlier, (ids == before[:, None]) & (ids != 0))
            w_open = keep(w, (ids == after[:, None]) & (ids != 0))
        loss += jnp.sum(inside * inside) + jnp.sum(u * earlier)
        gram = advance(gram, product("bqsd,bqse->bqde", w_open, w_open), before, after)
        if not differentiate:
            return (loss, gram, after), None
        dq_imp = product("bqms,bqsr->bqmr", inside, w[..., dim:]) + earlier[..., dim:]
        dk_imp = product("bqmr,bqms->bqrs", u[..., dim:], inside).transpose(0, 1, 3, 2)
        return (loss, gram, after), (-2 * scale * dq_imp, dk_imp)

    def backward(carry, inputs):
        state, after = carry
        u, w, dk_imp, ids = inputs
        later = product("bqsd,bqrd->bqsr", w, state)
        before, u_open = None, u
        if ids is not None:
            before = ids[:, 0]
            later = keep(later, (ids == after[:, None]) & (ids != 0))
            u_open = keep(u, (ids == before[:, None]) & (ids != 0))
        state = advance(state, product("bqmr,bqmd->bqrd", u_open[..., dim:], u_open), after, before)
        return (state, before), 2 * (dk_imp + later)

    start = (jnp.zeros((), jnp.float32), jnp.zeros((batch, heads, width, width), jnp.float32), open_segments)
    (loss, _, _), gradients = jax.lax.scan(forward, start, (u, w, ids))
    if not differentiate:
        return loss, None, None
    dq_imp, dk_imp = gradients
    start = (jnp.zeros((batch, heads, rank, width), jnp.float32), open_segments)
    _, dk_imp = jax.lax.scan(backward, start, (u, w, dk_imp, ids), reverse=True)
    return loss, attention.merge_queries(dq_imp, chunk, length), attention.merge_queries(dk_imp, chunk, length)


def _pair_count(q: Float[Array, "B T H D"], segments: Int[Array, "B T"] | None) -> Float[Array, ""]:
    """How many causal pairs of a document there are, over all heads."""
    batch, length, heads, _ = q.shape
    if segments is None:
        return jnp.asarray(batch * heads * (length * (length + 1) // 2), jnp.float32)
    index = jnp.broadcast_to(jnp.arange(length)[None, :], (batch, length))
    start = attention.document_starts(segments)
    return heads * jnp.sum(jnp.where(segments != 0, index - start + 1, 0).astype(jnp.float32))
