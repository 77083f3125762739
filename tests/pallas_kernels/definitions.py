"""Scores, choice and attention written out in float64 numpy, a token at a time, and cases to compare with them.

"reference" and "xla" run here as they are. The Pallas kernels run interpreted, except on their own platform.
Tolerances: float32 sums of up to some hundred terms of size 1 are within 1e-5 of float64. bfloat16 keeps 8 bits, so
inputs are exact (the definition reads the rounded ones), weights are rounded to 2**-9 and results to 2**-9 of their
size, about 2: 2e-2 covers both.
"""

from __future__ import annotations

import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np

import pallas_kernels as pk

PLAIN = ("reference", "xla")
KERNELS = ("tpu", "gpu")


def interpreted(implementation):
    """The argument `interpret`: kernels are interpreted, except on their own platform."""
    return True if implementation in KERNELS and implementation != jax.default_backend() else None


@functools.cache
def jitted(function, implementation, static):
    """The function of (arrays, named arrays), jitted once for all tests; the kernels are interpreted."""
    how = dict(implementation=implementation, interpret=interpreted(implementation))
    call = functools.partial(function, **how, **dict(static))
    return jax.jit(lambda arrays, named: call(*arrays, **named))


def run(function, *arrays, implementation, **options):
    """What the function gives, jitted over its arrays."""
    named = {name: value for name, value in options.items() if isinstance(value, (jax.Array, np.ndarray))}
    static = tuple((name, value) for name, value in options.items() if name not in named)
    return jitted(function, implementation, static)(arrays, named)


def normal(seed, *shape, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def wide(array):
    return np.asarray(array.astype(jnp.float32), np.float64)


def oracle_scores(q_imp, keys, lengths, pooling, first=None, offset=None):
    """q_imp [B, K, G, R] and keys [B, K, R, S], a token at a time."""
    q_imp, keys = np.asarray(q_imp, np.float64), np.asarray(keys, np.float64)
    batch, heads, group, rank = q_imp.shape
    out = np.full((batch, heads, keys.shape[-1]), -np.inf)
    for b in range(batch):
        begin, end = (0 if first is None else int(first[b])), int(lengths[b])
        for h in range(heads):
            rows = [q_imp[b, h, g] @ keys[b, h, :, begin:end] / rank**0.5 for g in range(group)]
            if pooling == "normalised" and (group > 1 or offset is not None) and end > begin:
                rows = [row - np.log(np.sum(np.exp(row - row.max()))) - row.max() for row in rows]
            if offset is not None:
                rows = [row + float(offset[b, h, g]) for g, row in enumerate(rows)]
            if end > begin:
                out[b, h, begin:end] = np.max(rows, axis=0)
    return out


def oracle_choice(scores, length, count, sinks, recent, unit, first=0, threshold=None):
    """The chosen units of one row as a sorted list: python's sort on what the documentation says."""
    best = {}
    for token in range(first, min(length, len(scores))):
        score = float(scores[token])
        score = -np.inf if np.isnan(score) else score
        age = length - 1 - token
        if age < recent:
            key = (2, -age)
        elif token < sinks:
            key = (1, -token)
        elif threshold is not None and score < threshold:
            continue
        else:
            key = (0, score)
        best[token // unit] = max(best.get(token // unit, key), key)
    order = sorted(best, key=lambda u: (tuple(-part for part in best[u]), u))
    return sorted(order[:count])


def oracle_attention(q, k, v, tokens, scale):
    """q [G, D] over the tokens of k, v [S, D]: (out [G, D], log-sum-exp [G]); 0 and -inf without tokens."""
    if not len(tokens):
        return np.zeros(q.shape), np.full(len(q), -np.inf)
    logits = q @ k[tokens].T * scale
    top = logits.max(axis=1, keepdims=True)
    weights = np.exp(logits - top)
    total = weights.sum(axis=1, keepdims=True)
    return weights @ v[tokens] / total, (top + np.log(total))[:, 0]


def listed(chosen, b, h):
    """The valid indices of a row; checks that they come first, ascend, and that the rest is 0."""
    indices, valid = np.asarray(chosen.indices[b, h]), np.asarray(chosen.valid[b, h])
    count = int(valid.sum())
    assert valid[:count].all() and not indices[count:].any()
    assert (np.diff(indices[:count]) > 0).all()
    return indices[:count].tolist()


def tokens_of(units, unit, begin, end):
    return [t for u in units for t in range(u * unit, (u + 1) * unit) if begin <= t < end]


def check_choice(implementation, scores, lengths, n, **options):
    chosen = run(pk.select_top_k, scores, lengths, implementation=implementation, n=n, **options)
    counts, first, threshold = (options.get(name) for name in ("counts", "first", "threshold"))
    for b in range(scores.shape[0]):
        for h in range(scores.shape[1]):
            expected = oracle_choice(
                np.asarray(scores[b, h]),
                int(lengths[b]),
                n if counts is None else int(np.broadcast_to(np.asarray(counts).T, scores.shape[1::-1]).T[b, h]),
                options.get("sinks", 0),
                options.get("recent", 0),
                options.get("unit", 1),
                0 if first is None else int(first[b]),
                None if threshold is None else float(threshold[h]),
            )
            assert listed(chosen, b, h) == expected


def attention_case(seed, *, batch, heads, group, dim, size, n, unit, dtype=jnp.float32, layers=0, poison=True):
    """Queries, caches that hold NaN wherever nothing may be read, and a random choice of units."""
    rng = np.random.default_rng(seed)
    q = normal(seed, batch, heads * group, dim, dtype=dtype)
    lead = (layers,) if layers else ()
    k, v = (normal(seed + i, *lead, batch, heads, size, dim, dtype=dtype) for i in (1, 2))
    lengths = rng.integers(0, size + 1, batch)
    lengths[0], lengths[-1] = size, (0 if batch > 1 else size)
    units = -(-size // unit)
    indices = np.zeros((batch, heads, n), np.int32)
    valid = np.zeros((batch, heads, n), bool)
    for b in range(batch):
        held = -(-int(lengths[b]) // unit)
        for h in range(heads):
            count = min(n, held, int(rng.integers(0, n + 1)) if h else n)
            indices[b, h, :count] = np.sort(rng.permutation(held)[:count])
            valid[b, h, :count] = True
    assert units >= n
    if poison:
        read = np.zeros((batch, heads, size), bool)
        for b in range(batch):
            for h in range(heads):
                read[b, h, tokens_of(indices[b, h][valid[b, h]], unit, 0, lengths[b])] = True
        hole = jnp.asarray(~read)[..., None]
        k, v = (
            jnp.where(
                jnp.broadcast_to(hole, a.shape[-4:]) if not layers else jnp.broadcast_to(hole[None], a.shape),
                jnp.nan,
                a,
            )
            for a in (k, v)
        )
    return SimpleNamespace(
        q=q,
        k=k,
        v=v,
        indices=jnp.asarray(indices),
        valid=jnp.asarray(valid),
        lengths=jnp.asarray(lengths, jnp.int32),
        unit=unit,
        layers=layers,
    )


def check_attention(case, implementation, tolerance, new=None, **options):
    """The result and its residual against the oracle, row by row."""
    named = {} if new is None else {"new_k": new[0], "new_v": new[1]}
    layer = case.layers - 1 if case.layers else None
    out, residual = run(
        pk.masked_topk_decode_attention,
        case.q,
        case.k,
        case.v,
        case.indices,
        case.valid,
        lengths=case.lengths,
        unit=case.unit,
        layer=layer,
        return_residual=True,
        implementation=implementation,
        **named,
        **options,
    )
    assert out.dtype == case.q.dtype and residual.dtype == jnp.float32
    k, v = (a[layer] if case.layers else a for a in (case.k, case.v))
    batch, heads, size, dim = k.shape
    group = case.q.shape[1] // heads
    q, k, v, out = (wide(a) for a in (case.q, k, v, out))
    for b in range(batch):
        for h in range(heads):
            units = np.asarray(case.indices[b, h])[np.asarray(case.valid[b, h])]
            tokens = tokens_of(units, case.unit, 0, int(case.lengths[b]))
            keys, values = k[b, h], v[b, h]
            if new is not None:
                keys, values = (np.concatenate([a, wide(x)[b, h][None]]) for a, x in ((keys, new[0]), (values, new[1])))
                tokens = [*tokens, size]
            own = slice(h * group, (h + 1) * group)
            expected, lse = oracle_attention(q[b, own], keys, values, tokens, dim**-0.5)
            np.testing.assert_allclose(out[b, own], expected, atol=tolerance)
            np.testing.assert_allclose(residual[b, own], lse, atol=tolerance)
