"""The two distillation losses, exact over all pairs they are about, without a T x T matrix.

Both compare a frozen attention layer (queries q, keys k, D wide, after rotary) with a predictor (importance
queries p and keys r, R wide); s = D**-0.5, s' = R**-0.5. r has the layer's K KV heads or all H query heads.
The frozen model is never differentiated: q, k, v get zero gradients and the attention output returned
beside a loss carries none. Every row of a batch may hold several documents: pairs count within a document
(`segments`, 0 = padding) only.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from butler_jax.model import attention

FORMS = ("fused", "two_calls")
SQUARED_ERROR_CHUNK = 128

Heads = Float[Array, "B T H D"]
Scalar = Float[Array, ""]


def attention_and_cross_entropy(
    q: Heads,
    k: Float[Array, "B T K D"],
    v: Float[Array, "B T K D"],
    q_imp: Float[Array, "B T H R"],
    k_imp: Float[Array, "B T Q R"],
    *,
    segments: Int[Array, "B T"] | None = None,
    sliding_window: int | None = None,
    sinks: int = 0,
    recent: int = 0,
    implementation: str | None = None,
    form: str | None = None,
) -> tuple[Heads, Scalar, Scalar]:
    """Attention output [B, T, H, D], the cross entropy summed over rows and heads (nats), and their number.

    With A = softmax(s q.k) over a row's causal keys and B = softmax(s' p.r), a row's loss is -sum_j A_ij
    log B_ij (TokenButler, arXiv 2503.07518, second version, trains with it on sampled rows; here every row
    that is not padding counts). Window and document borders limit A and B alike. Differentiable with
    respect to p and r.

    sinks, recent: the first keys of a document and the newest ones up to the query's own, which selection reads
    whatever their score. B and the sum are then over the other keys, the contested ones: the loss asks where
    the attention goes that a choice decides about, in the measure in which it goes there. Rows without contested
    keys do not count.

    form "fused" (XLA): one pass over chunks of 128 rows forms both rows of weights once and gives output,
    loss and both gradients; the backward pass only scales. "two_calls" (cuDNN, Splash): attention with r as
    values (beside v, where every key is contested; else a call of its own), and an R-wide attention for the
    log-sum-exp, log B's normaliser; no T x T matrix inside the kernels. None takes the form that goes with the
    implementation, see `attention.causal_attention`.

    Rows of padding, rows without contested keys, and with "fused" rows whose true logits are all -inf add nothing, to
    the gradients neither. True logits of NaN or +inf, and scores of -inf where attention goes, give a loss that is not
    finite, and `fit` stops there.

    Raises ValueError for shapes that do not fit or an implementation that cannot do what was asked.
    """
    name, form = _check(q, k, v, q_imp, k_imp, segments, sliding_window, implementation, form, sinks, recent)
    output, loss, count = _cross_entropy(q, k, v, q_imp, k_imp, segments, sliding_window, (sinks, recent), name, form)
    return jax.lax.stop_gradient(output), loss, jax.lax.stop_gradient(count)


def cross_entropy(
    q: Heads,
    k: Float[Array, "B T K D"],
    q_imp: Float[Array, "B T H R"],
    k_imp: Float[Array, "B T Q R"],
    *,
    segments: Int[Array, "B T"] | None = None,
    sliding_window: int | None = None,
    sinks: int = 0,
    recent: int = 0,
    implementation: str | None = None,
    form: str | None = None,
) -> tuple[Scalar, Scalar]:
    """Loss sum (nats) and count of `attention_and_cross_entropy`, without values and output."""
    name, form = _check(q, k, k, q_imp, k_imp, segments, sliding_window, implementation, form, sinks, recent)
    _, loss, count = _cross_entropy(q, k, None, q_imp, k_imp, segments, sliding_window, (sinks, recent), name, form)
    return loss, jax.lax.stop_gradient(count)


def attention_and_squared_error(
    q: Heads,
    k: Float[Array, "B T K D"],
    v: Float[Array, "B T K D"],
    q_imp: Float[Array, "B T H R"],
    k_imp: Float[Array, "B T Q R"],
    *,
    segments: Int[Array, "B T"] | None = None,
    sliding_window: int | None = None,
    implementation: str | None = None,
) -> tuple[Heads, Scalar, Scalar]:
    """The layer's attention output [B, T, H, D], and loss sum and pair count of `squared_error`.

    sliding_window and implementation concern the output. The squared error takes all causal pairs of a document
    even where the layer has a sliding window: its logits are defined for them.
    """
    output = attention.causal_attention(
        q, k, v, segments=segments, sliding_window=sliding_window, implementation=implementation
    )
    loss, count = squared_error(q, k, q_imp, k_imp, segments=segments)
    return jax.lax.stop_gradient(output), loss, count


def squared_error(
    q: Heads,
    k: Float[Array, "B T K D"],
    q_imp: Float[Array, "B T H R"],
    k_imp: Float[Array, "B T Q R"],
    *,
    segments: Int[Array, "B T"] | None = None,
    chunk: int = SQUARED_ERROR_CHUNK,
) -> tuple[Scalar, Scalar]:
    """Sum over heads and causal pairs of a document of (s q_i.k_j - s' p_i.r_j)^2, and the number of terms.

    TokenButler, arXiv 2503.07518, first version, equation of the training loss; theirs runs over the future
    and padding too. Time and memory are linear in T: pairs inside a chunk of rows are formed, those with
    earlier chunks come from the running Gram matrix of [k ; r], (D+R) x (D+R), summed in float32; it starts
    anew with each document, whose tokens must be contiguous. Differentiable with respect to p and r; both
    gradients are formed in the forward pass. The value of the loss is a difference of sums of squared
    logits, exact to about 1e-6 of the latter.

    Raises ValueError for shapes that do not fit.
    """
    _check(q, k, k, q_imp, k_imp, segments, None, "xla", None)
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1, got {chunk}")
    loss = _squared_error(q, k, q_imp, k_imp, segments, min(chunk, q.shape[1]))
    return loss, _pair_count(q, segments)


def _check(q, k, v, q_imp, k_imp, segments, sliding_window, implementation, form, sinks=0, recent=0) -> tuple[str, str]:
    attention.check_shapes(q, k, v, segments, sliding_window)
    if min(sinks, recent) < 0:
        raise ValueError(f"sinks and recent must be 0 or more, got {sinks} and {recent}")
    if q_imp.ndim != 4 or k_imp.ndim != 4 or q_imp.shape[:3] != q.shape[:3] or k_imp.shape[:2] != q.shape[:2]:
        wanted = f"p must be [B, T, H, R] and r [B, T, heads, R] beside q {q.shape}"
        raise ValueError(f"{wanted}; got {p.shape}, {r.shape}")
    if q_imp.shape[3] != k_imp.shape[3]:
        raise ValueError(f"p and r must have one width, got {p.shape[3]} and {r.shape[3]}")
    if k_imp.shape[2] not in (q.shape[2], k.shape[2]):
        raise ValueError(f"r needs {k.shape[2]} (KV) or {q.shape[2]} (query) heads, got {r.shape[2]}")
    name = attention.choose_implementation(implementation, q, q.shape[-1], segments)
    if form is None:
        form = "fused" if name == "xla" else "two_calls"
    if form not in FORMS:
        raise ValueError(f"form {form!r} is unknown; use None or one of {FORMS}")
    if form == "fused" and name != "xla":
        raise ValueError(f'form "fused" runs on "xla" only, not on {name!r}; use "two_calls" or None')
    return name, form


def _regroup(x: Float[Array, "B K M S"], heads: int) -> Float[Array, "B Q N S"]:
    """Rows of K groups of query heads as rows of `heads` groups; a group's heads follow one another."""
    return x.reshape(x.shape[0], heads, -1, x.shape[3])


# --- cross entropy --------------------------------------------------------------------------------


@functools.partial(jax.custom_vjp, nondiff_argnums=(6, 7, 8, 9))
def _cross_entropy(q, k, v, q_imp, k_imp, segments, sliding_window, always, name, form):
    run = _fused if form == "fused" else functools.partial(_two_calls, name=name)
    return run(q, k, v, q_imp, k_imp, segments, sliding_window, *always, differentiate=False)[0]


def _cross_entropy_forward(q, k, v, q_imp, k_imp, segments, sliding_window, always, name, form):
    run = _fused if form == "fused" else functools.partial(_two_calls, name=name)
    results, dq_imp, dk_imp = run(q, k, v, q_imp, k_imp, segments, sliding_window, *always, differentiate=True)
    return results, (dq_imp.astype(q_imp.dtype), dk_imp.astype(k_imp.dtype))


def _scale_gradients(gradients, cotangent):
    return tuple((cotangent * x.astype(jnp.float32)).astype(x.dtype) for x in gradients)


def _cross_entropy_backward(sliding_window, always, name, form, gradients, cotangents):
    return None, None, None, *_scale_gradients(gradients, cotangents[1]), None


_cross_entropy.defvjp(_cross_entropy_forward, _cross_entropy_backward)


def _contested_rows(shape, segments, sliding_window, sinks, recent) -> Float[Array, "B T"]:
    """1 for the rows that have a contested key and are not padding, else 0."""
    columns = jnp.broadcast_to(jnp.arange(shape[1])[None], shape)
    if segments is None:
        rows = columns >= sinks + recent
    else:
        rows = (columns - attention.document_starts(segments) >= sinks + recent) & (segments != 0)
    return (rows & (sliding_window is None or recent < sliding_window)).astype(jnp.float32)


def _fused(q, k, v, q_imp, k_imp, segments, sliding_window, sinks, recent, *, differentiate):
    batch, length, heads, dim = q.shape
    kv_heads, key_heads = k.shape[2], k_imp.shape[2]
    chunk = min(attention.CHUNK, length)
    scale = q_imp.shape[-1] ** -0.5
    queries = attention.split_queries(q, kv_heads, chunk)
    guesses = attention.split_queries(q_imp.astype(jnp.float32) * scale, key_heads, chunk)
    keys, importance = attention.split_keys(k, chunk), attention.split_keys(k_imp.astype(jnp.float32), chunk)
    values = None if v is None else attention.split_keys(v, chunk)
    counted = _contested_rows((batch, length), segments, sliding_window, sinks, recent)
    rows_counted = jnp.broadcast_to(counted[:, :, None, None], (*q_imp.shape[:3], 1))
    rows_counted = attention.split_queries(rows_counted, key_heads, chunk)
    segments = attention.split_segments(segments, chunk)
    starts = jnp.zeros((1, keys.shape[2]), jnp.int32) if segments is None else attention.document_starts(segments)

    def contested(mask, index, first):
        if not sinks and not recent:
            return mask
        columns = (first + jnp.arange(mask.shape[2]))[None, None]
        own = (index * chunk + jnp.arange(chunk))[None, :, None]
        start = jax.lax.dynamic_slice_in_dim(starts, index * chunk, chunk, axis=1)[..., None]
        return mask & (columns <= own - recent) & (columns >= start + sinks)

    def step(band, carry, inputs):
        loss, dk_imp = carry
        index, rows, guess, use = inputs
        first = band.first_key(index, chunk)
        mask = attention.chunk_mask(index, first, band.keys, segments, sliding_window, chunk)
        a, a_total, _ = attention.masked_exponentials(rows, band.take(keys, first, 2), mask, dim**-0.5)
        out = None
        if values is not None:
            out = (attention.weighted_values(a, band.take(values, first, 2)) / a_total).astype(v.dtype)
        mask = contested(mask, index, first)
        r_here = band.take(importance, first, 2)
        b, b_total, b_lse = attention.masked_exponentials(guess, r_here, mask, 1.0)
        if sinks or recent:
            tiled = jnp.broadcast_to(mask[:, None, None], (mask.shape[0], 1, a.shape[2] // chunk, *mask.shape[1:]))
            a = jnp.where(tiled.reshape(mask.shape[0], 1, *a.shape[2:]), a, 0)
        a = _regroup(a / a_total, key_heads) * use
        share = jnp.sum(a, axis=-1, keepdims=True)  # the attention that goes to contested keys
        a_mean = attention.weighted_values(a, r_here)
        loss += jnp.sum(share * b_lse - jnp.sum(guess * a_mean, axis=-1, keepdims=True))
        if not differentiate:
            return (loss, dk_imp), (out, None)
        slope = b * (share / b_total) - a
        change = jnp.einsum("bpmr,bpms->bprs", guess, slope)
        dk_imp = jax.lax.dynamic_update_slice_in_dim(dk_imp, band.take(dk_imp, first, 3) + change, first, axis=3)
        return (loss, dk_imp), (out, scale * attention.weighted_values(slope, r_here))

    # The gradient of k_imp is summed as [B, Q, R, S]: the large factor of its product is then read untransposed.
    dk_imp = jnp.zeros_like(importance.transpose(0, 1, 3, 2)) if differentiate else None
    carry = (jnp.zeros((), jnp.float32), dk_imp)
    outs, dps = [], []
    for band in attention.make_bands(queries.shape[0], chunk, sliding_window):
        part = slice(band.start, band.stop)
        inputs = (jnp.arange(band.start, band.stop), queries[part], guesses[part], rows_counted[part])
        carry, (out, dq_imp) = jax.lax.scan(functools.partial(step, band), carry, inputs)
        outs.append(out)
        dps.append(dq_imp)
    loss, dk_imp = carry
    output = None if v is None else attention.merge_queries(jnp.concatenate(outs), chunk, length)
    results = (output, loss, heads * jnp.sum(counted))
    if not differentiate:
        return results, None, None
    dq_imp = attention.merge_queries(jnp.concatenate(dps), chunk, length)
    return results, dq_imp, dk_imp.transpose(0, 3, 1, 2)[:, :length]


def _shift(x: Array, tokens: int) -> Array:
    """x [B, T, ...] moved `tokens` places to the left (to the right where negative), zeros moved in."""
    if tokens == 0:
        return x
    kept = x[:, tokens:] if tokens > 0 else x[:, :tokens]
    room = x.shape[1] - kept.shape[1]
    return jnp.pad(kept, ((0, 0), (0, room) if tokens > 0 else (room, 0)) + ((0, 0),) * (x.ndim - 2))


def _two_calls(q, k, v, q_imp, k_imp, segments, sliding_window, sinks, recent, *, name, differentiate):
    heads, dim, rank = q.shape[2], q.shape[3], q_imp.shape[3]
    scale = rank**-0.5
    counted = _contested_rows(q.shape[:2], segments, sliding_window, sinks, recent)
    attend = functools.partial(attention.causal_attention, implementation=name)
    dtype = q_imp.dtype if name == "xla" else q.dtype
    guess, importance = q_imp.astype(dtype), k_imp.astype(dtype)
    everything = not sinks and not recent
    output = None
    # r beside v in one call, unless r has other heads than v or both together are too wide for the kernel.
    joined = everything and v is not None and k_imp.shape[2] == k.shape[2]
    joined = joined and (name != "cudnn" or dim + rank <= attention.cudnn_head_dim())
    if not joined and (v is not None or not everything):
        output, lse_all = attend(
            q, k, k if v is None else v, segments=segments, sliding_window=sliding_window, return_lse=True
        )
    count = heads * jnp.sum(counted)
    if sliding_window is not None and recent >= sliding_window:
        zeros = (jnp.zeros(x.shape, jnp.float32) for x in (q_imp, k_imp))
        return (None if v is None else output, jnp.zeros((), jnp.float32), count), *zeros

    # Moving the queries back makes the keys older than the recent ones the causal ones; the sinks are moved out, or
    # where there are documents put into one of their own.
    key_shift = sinks if segments is None else 0
    row_shift = key_shift + recent
    rows, columns = (functools.partial(_shift, tokens=n) for n in (row_shift, key_shift))
    options = {"sliding_window": None if sliding_window is None else sliding_window - recent}
    if segments is not None:
        place = jnp.arange(q.shape[1])[None] - attention.document_starts(segments)
        options["segments"] = rows(segments)
        options["key_segments"] = jnp.where(place < sinks, -1, segments)
    keys = columns(jnp.repeat(k, k_imp.shape[2] // k.shape[2], axis=2))
    far_queries, far_guess, use = rows(q), rows(guess), rows(counted)[:, :, None]

    def frozen(importance):
        beside = jnp.concatenate([v, importance.astype(v.dtype)], axis=-1) if joined else columns(importance)
        found = attend(far_queries, keys, beside, return_lse=not everything, **options)
        return (found, None) if everything else found

    def predicted(values):
        return attend(far_guess, columns(importance), columns(values), return_lse=True, **options)

    if differentiate:
        weighed, pull_frozen, lse_frozen = jax.vjp(frozen, importance, has_aux=True)
        b_mean, pull_predicted, lse = jax.vjp(predicted, importance, has_aux=True)
    else:
        (weighed, lse_frozen), (b_mean, lse) = frozen(importance), predicted(importance)
    if joined:
        output = weighed[..., :dim]
    if not everything:  # each row by the share of its attention that goes to contested keys
        use = jnp.where(use > 0, jnp.exp(jnp.minimum(lse_frozen - rows(lse_all), 0.0)), 0.0)
    a_mean = weighed[..., -rank:].astype(jnp.float32)
    guess = scale * far_guess.astype(jnp.float32)
    loss = jnp.sum(jnp.where(use == 0, 0.0, use * (lse - jnp.sum(guess * a_mean, axis=-1))))
    results = (None if v is None else output, loss, count)
    if not differentiate:
        return results, None, None
    # d lse_i / dr_j is B_ij s' p_i: the gradient of sum_i s' p_i . b_mean_i with respect to the values alone.
    guess = guess * use[..., None]
    dk_imp = pull_predicted(guess.astype(b_mean.dtype))[0].astype(jnp.float32)
    away = jnp.pad(guess, ((0, 0), (0, 0), (0, 0), (weighed.shape[-1] - rank, 0)))
    dk_imp -= pull_frozen(away.astype(weighed.dtype))[0].astype(jnp.float32)
    dq_imp = scale * use[..., None] * (b_mean.astype(jnp.float32) - a_mean)
    return results, _shift(dq_imp, -row_shift), dk_imp


# --- squared error --------------------------------------------------------------------------------


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _squared_error(q, k, q_imp, k_imp, segments, chunk):
    return _squared_error_pass(q, k, q_imp, k_imp, segments, chunk, differentiate=False)[0]


def _squared_error_forward(q, k, q_imp, k_imp, segments, chunk):
    loss, dq_imp, dk_imp = _squared_error_pass(q, k, q_imp, k_imp, segments, chunk, differentiate=True)
    return loss, (dq_imp.astype(q_imp.dtype), dk_imp.astype(k_imp.dtype))


def _squared_error_backward(chunk, gradients, cotangent):
    return None, None, *_scale_gradients(gradients, cotangent), None


_squared_error.defvjp(_squared_error_forward, _squared_error_backward)


def _squared_error_pass(q, k, q_imp, k_imp, segments, chunk, *, differentiate):
    batch, length, _, dim = q.shape
    heads, rank = k_imp.shape[2], k_imp.shape[3]
    scale = rank**-0.5
    width = dim + rank
    # Residuals are differences of logits: rounded factors, as of TF32 and of a TPU's single pass, would drown them.
    product = functools.partial(jnp.einsum, precision="highest")
    # Rows u = [s q ; -s' p] and w = [k ; r]: every residual is u.w.
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
        """x [B, P, N * C, ...] where rows [B, C], else 0."""
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
        inside = product("bpmd,bpsd->bpms", u, w).reshape(batch, heads, group, chunk, chunk)
        inside = jnp.where(mask[:, None, None], inside, 0).reshape(batch, heads, group * chunk, chunk)
        earlier = product("bpmd,bpde->bpme", u, gram)
        after, w_open = None, w
        if ids is not None:
            after = ids[:, -1]
            earlier = keep(earlier, (ids == before[:, None]) & (ids != 0))
            w_open = keep(w, (ids == after[:, None]) & (ids != 0))
        loss += jnp.sum(inside * inside) + jnp.sum(u * earlier)
        gram = advance(gram, product("bpsd,bpse->bpde", w_open, w_open), before, after)
        if not differentiate:
            return (loss, gram, after), None
        dq_imp = product("bpms,bpsr->bpmr", inside, w[..., dim:]) + earlier[..., dim:]
        dk_imp = product("bpmr,bpms->bprs", u[..., dim:], inside).transpose(0, 1, 3, 2)
        return (loss, gram, after), (-2 * scale * dq_imp, dk_imp)

    def backward(carry, inputs):
        state, after = carry
        u, w, dk_imp, ids = inputs
        later = product("bpsd,bprd->bpsr", w, state)
        before, u_open = None, u
        if ids is not None:
            before = ids[:, 0]
            later = keep(later, (ids == after[:, None]) & (ids != 0))
            u_open = keep(u, (ids == before[:, None]) & (ids != 0))
        state = advance(state, product("bpmr,bpmd->bprd", u_open[..., dim:], u_open), after, before)
        return (state, before), 2 * (dk_imp + later)

    start = (jnp.zeros((), jnp.float32), jnp.zeros((batch, heads, width, width), jnp.float32), open_segments)
    (loss, _, _), gradients = jax.lax.scan(forward, start, (u, w, ids))
    if not differentiate:
        return loss, None, None
    dq_imp, dk_imp = gradients
    start = (jnp.zeros((batch, heads, rank, width), jnp.float32), open_segments)
    _, dk_imp = jax.lax.scan(backward, start, (u, w, dk_imp, ids), reverse=True)
    return loss, attention.merge_queries(dq_imp, chunk, length), attention.merge_queries(dk_imp, chunk, length)


def _pair_count(q: Heads, segments: Int[Array, "B T"] | None) -> Scalar:
    batch, length, heads, _ = q.shape
    if segments is None:
        return jnp.asarray(batch * heads * (length * (length + 1) // 2), jnp.float32)
    index = jnp.broadcast_to(jnp.arange(length)[None, :], (batch, length))
    start = attention.document_starts(segments)
    return heads * jnp.sum(jnp.where(segments != 0, index - start + 1, 0).astype(jnp.float32))
