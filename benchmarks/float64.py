"""The frozen decoder, the lookahead predictor, its choice and both losses in readable float64 numpy.

benchmarks/numerics.py and the tests of the losses compare with it. It forms whole T x T squares, loops over layers, and
uses nothing of the package but the parameters. It covers Llama without biases, sliding windows or scaled rotary
embeddings.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np


class Layer(NamedTuple):
    """The activations of one layer for a sequence of T tokens.

    q [T, H, D], k and v [T, K, D]; k_pre [T, K, D] is k before rotary. h [T, E]: the normed stream that the predictor
    reads. q_imp [T, H, R], k_imp [T, K, R]. h, q_imp and k_imp are None in layer 0.
    """

    q: np.ndarray
    k: np.ndarray
    k_pre: np.ndarray
    v: np.ndarray
    h: np.ndarray | None = None
    q_imp: np.ndarray | None = None
    k_imp: np.ndarray | None = None


def wide(array: Any) -> np.ndarray:
    """A parameter or an array of any float dtype in float64."""
    return np.asarray(array[...]).astype(np.float64)


def rms_norm(x, scale, eps):
    """x over the root mean square of its last axis, times scale."""
    return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + eps) * scale


def angles(config, length):
    """[T, D/2] in radians."""
    frequencies = config.rope.theta ** -(np.arange(0, config.head_dim, 2) / config.head_dim)
    return np.arange(length)[:, None] * frequencies


def rotate(x, angle):
    """x [T, heads, 2F] by angles that broadcast to [T, heads, F]; pair f is entries f and F + f."""
    a, b = np.split(x, 2, axis=-1)
    return np.concatenate([a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)], axis=-1)


def softmax(logits, seen):
    """Weights over the keys in `seen`, 0 elsewhere, 0 everywhere in a row without any."""
    return np.where(seen, np.exp(np.where(seen, logits - log_sum_exp(logits, seen), 0)), 0)


def log_sum_exp(logits, seen):
    """The log-sum-exp over the keys in `seen`, with the keys' axis kept; 0 in a row without any."""
    top = np.max(np.where(seen, logits, -np.inf), axis=-1, keepdims=True)
    top = np.where(np.isfinite(top), top, 0)
    total = np.sum(np.where(seen, np.exp(np.where(seen, logits - top, 0)), 0), axis=-1, keepdims=True)
    return top + np.log(np.where(total > 0, total, 1))


def products(q, k):
    """Scaled products [H, T, T] of q [T, H, D] with k [T, K, D]; query heads of a group share a key head."""
    k = np.repeat(k, q.shape[1] // k.shape[1], axis=1)
    return np.einsum("ihd,jhd->hij", q, k) * q.shape[-1] ** -0.5


def attention(q, k, v):
    """Causal attention [T, H, D]."""
    weights = softmax(products(q, k), np.tri(len(q), dtype=bool))
    return np.einsum("hij,jhd->ihd", weights, np.repeat(v, q.shape[1] // v.shape[1], axis=1))


def run(model, predictor, tokens) -> tuple[list[Layer], np.ndarray]:
    """All layers and the logits [T, V] of a dense pass over one sequence with the lookahead predictor."""
    config, weights = model.config, model.layers
    assert config.rope.kind == "default" and config.rotary_dim == config.head_dim and not any(config.sliding)
    assert weights.q_bias is None and weights.q_norm is None and weights.gate_bias is None and weights.o_bias is None
    angle = angles(config, len(tokens))
    x, captured, found = wide(model.embedding)[tokens], None, []
    for index in range(config.layers):
        own = {
            name: wide(getattr(weights, name)[index])
            for name in ("attention_norm", "mlp_norm", "q", "k", "v", "o", "gate", "up", "down")
        }
        h = rms_norm(x, own["attention_norm"], config.norm_eps)
        q, k_pre, v = (np.einsum("te,ehd->thd", h, own[name]) for name in "qkv")
        q, k = rotate(q, angle[:, None]), rotate(k_pre, angle[:, None])
        layer = Layer(q, k, k_pre, v)
        if index:
            layer = looked_ahead(predictor, index, layer, rms_norm(captured, own["attention_norm"], config.norm_eps))
        if index % predictor.stride == 0:
            captured = x
        found.append(layer)
        x = x + np.einsum("thd,hde->te", attention(q, k, v), own["o"])
        h = rms_norm(x, own["mlp_norm"], config.norm_eps)
        gate = h @ own["gate"]
        x = x + (gate / (1 + np.exp(-gate)) * (h @ own["up"])) @ own["down"]
    table = model.embedding if model.unembedding is None else model.unembedding
    return found, rms_norm(x, wide(model.final_norm), config.norm_eps) @ wide(table).T


def pair_angles(predictor, index, length):
    """[T, K, R/2]: the angles of the pairs that the predictor of a layer rotates."""
    return angles(predictor.base, length)[:, np.asarray(predictor.heads.pairs[...])[index - 1]]


def looked_ahead(predictor, index, layer, h) -> Layer:
    """The layer with its q_imp and k_imp."""
    angle = pair_angles(predictor, index, len(h))
    q_imp = np.einsum("te,ehr->thr", h, wide(predictor.heads.query)[index - 1])
    key = wide(predictor.heads.key)[index - 1]
    k_imp = np.einsum("tkd,kdr->tkr", layer.k_pre, key.reshape(*layer.k_pre.shape[1:], -1))
    q_imp = rotate(q_imp, np.repeat(angle, predictor.base.group, axis=1))
    return layer._replace(h=h, q_imp=q_imp, k_imp=rotate(k_imp, angle))


def parameter_gradients(predictor, index, layer, dq_imp, dk_imp):
    """Gradients of a layer's query [E, H, R] and key [KD, R] parameters from those of q_imp and k_imp."""
    angle = pair_angles(predictor, index, len(dq_imp))
    dq_imp = rotate(dq_imp, -np.repeat(angle, predictor.base.group, axis=1))
    dkey = np.einsum("tkd,tkr->kdr", layer.k_pre, rotate(dk_imp, -angle))
    return np.einsum("te,thr->ehr", layer.h, dq_imp), dkey.reshape(-1, dkey.shape[-1])


def pooled(q_imp, k_imp, sinks, sliding_window):
    """Scores [K, T, T]: less each head's log-sum-exp over the contested keys, then the maximum over the group."""
    scores, rows = products(q_imp, k_imp), np.arange(len(q_imp))
    contested = (rows[None] >= sinks) & (rows[None] <= rows[:, None] - sliding_window)
    if q_imp.shape[1] > k_imp.shape[1]:
        scores = scores - log_sum_exp(scores, contested)
    return scores.reshape(k_imp.shape[1], -1, *scores.shape[1:]).max(axis=1)


def choice(scores, table, sinks, sliding_window):
    """The tokens [K, T, T] that every row reads: sinks and recent, then by score; of equal scores the earlier."""
    rows = np.arange(scores.shape[-1])
    forced = (rows[None] > rows[:, None] - sliding_window) | (rows[None] < sinks)
    keys = np.where(forced, np.inf, scores)
    keys = np.where(rows[None] <= rows[:, None], keys, -np.inf)
    order = np.argsort(-keys, axis=-1, kind="stable")
    mask = np.zeros(scores.shape, bool)
    np.put_along_axis(mask, order, np.broadcast_to(rows < np.asarray(table)[rows + 1][:, None], mask.shape), axis=-1)
    return mask


class Pairs(NamedTuple):
    """The [B, H, T, T] squares of a distillation loss, float64.

    true, scores: logits of the frozen layer and scores of the predictor. seen: the pairs that attention takes.
    contested: those of them that the loss takes. use: 1 for the rows that count. q_imp, k_imp: of all H heads.
    """

    true: np.ndarray
    scores: np.ndarray
    seen: np.ndarray
    contested: np.ndarray
    use: np.ndarray
    q_imp: np.ndarray
    k_imp: np.ndarray

    @classmethod
    def of(cls, kind, q, k, q_imp, k_imp, segments=None, sliding_window=None, sinks=0, recent=0) -> Pairs:
        """From the arguments of distillation_loss."""
        q, k, q_imp, k_imp = (x.astype(np.float64) for x in (q, k, q_imp, k_imp))
        batch, length, heads, dim = q.shape
        k, k_imp = (np.repeat(x, heads // x.shape[2], 2) for x in (k, k_imp))
        true = np.einsum("bihd,bjhd->bhij", q, k, optimize=True) / dim**0.5
        scores = np.einsum("bihr,bjhr->bhij", q_imp, k_imp, optimize=True) / q_imp.shape[3] ** 0.5
        seen = np.tril(np.ones((length, length), bool))
        if sliding_window is not None and kind == "cross entropy":
            seen &= ~np.tril(seen, -sliding_window)
        seen = np.broadcast_to(seen, (batch, 1, length, length))
        use = np.ones((batch, 1, length, 1))
        if segments is not None:
            seen = seen & (segments[:, None, :, None] == segments[:, None, None, :])
            use = (segments != 0)[:, None, :, None].astype(np.float64)
        contested = seen
        if kind == "cross entropy":
            names = np.zeros((batch, length)) if segments is None else segments
            place = np.array([[j - int(np.argmax(row == row[j])) for j in range(length)] for row in names])
            distance = np.arange(length)[:, None] - np.arange(length)
            contested = seen & (place >= sinks)[:, None, None] & (distance >= recent)
            use = use * contested.any(axis=-1, keepdims=True)
        return cls(true, scores, seen, contested, use, q_imp, k_imp)


def distillation_loss(kind, *arrays, **options):
    """Loss, count, and the gradients of q_imp and k_imp in closed form, from [B, H, T, T] squares.

    kind: "cross entropy" or "squared error". arrays: q and q_imp [B, T, H, ...], k [B, T, K, D] and k_imp
    [B, T, K or H, R]; arrays and options as in butler_jax.training.losses.
    """
    pairs = Pairs.of(kind, *arrays, **options)
    heads, use = pairs.true.shape[1], pairs.use
    if kind == "squared error":
        residual = np.where(pairs.seen, pairs.true - pairs.scores, 0) * use
        loss, dscores, count = np.square(residual).sum(), -2 * residual, (pairs.seen * use).sum() * heads
    else:
        true, predicted = cross_entropy_weights(pairs)
        total = log_sum_exp(pairs.scores, pairs.contested)
        loss = (use * true * np.where(pairs.contested, total - pairs.scores, 0)).sum()
        dscores = use * (predicted * true.sum(axis=-1, keepdims=True) - true)
        count = use.sum() * heads
    return loss, count, *importance_gradients(dscores, pairs.q_imp, pairs.k_imp, arrays[3].shape[2])


def distillation_terms(kind, *arrays, **options):
    """Sums of the absolute values of what is added up: in the loss, and in every entry of the two gradients.

    A float32 sum is off by a small multiple of 2**-24 of this, however much of it cancels.
    """
    pairs = Pairs.of(kind, *arrays, **options)
    if kind == "squared error":
        sizes = np.where(pairs.seen, np.abs(pairs.true) + np.abs(pairs.scores), 0) * pairs.use
        loss, dscores = np.square(sizes).sum(), 2 * sizes
    else:
        true, predicted = cross_entropy_weights(pairs)
        total = np.abs(log_sum_exp(pairs.scores, pairs.contested))
        loss = (pairs.use * true * (total + np.abs(pairs.scores))).sum()
        dscores = pairs.use * (predicted * true.sum(axis=-1, keepdims=True) + true)
    return loss, *importance_gradients(dscores, np.abs(pairs.q_imp), np.abs(pairs.k_imp), arrays[3].shape[2])


def cross_entropy_weights(pairs: Pairs) -> tuple[np.ndarray, np.ndarray]:
    """The attention that goes to contested keys, and the softmax of the scores over them."""
    true = np.where(pairs.contested, softmax(pairs.true, pairs.seen), 0)
    return true, softmax(pairs.scores, pairs.contested)


def importance_gradients(dscores, q_imp, k_imp, key_heads) -> tuple[np.ndarray, np.ndarray]:
    """Gradients of q_imp and of k_imp with `key_heads` heads, from those of the scores."""
    batch, length, _, rank = q_imp.shape
    dq_imp = np.einsum("bhij,bjhr->bihr", dscores, k_imp, optimize=True) / rank**0.5
    dk_imp = np.einsum("bhij,bihr->bjhr", dscores, q_imp, optimize=True) / rank**0.5
    return dq_imp, dk_imp.reshape(batch, length, key_heads, -1, rank).sum(axis=3)
