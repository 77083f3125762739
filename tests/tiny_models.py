"""A random base of a few thousand parameters, batches for it, and its pass position by position in float64."""

from __future__ import annotations

import math
from math import ceil

import jax
import numpy as np

from butler_jax.model.config import BaseConfig
from butler_jax.model.decoder import BaseModel

BASE = BaseConfig(
    family="llama", vocab_size=61, width=32, hidden=48, layers=3, heads=4, kv_heads=2, head_dim=16, context=512
)


def make_model(config=BASE, seed=0):
    model = BaseModel(config, jax.random.key(seed))
    # Sharper queries than a random model's, so that it matters which keys are read.
    model.layers.q[...] = model.layers.q[...] * 4
    return model


def random_documents(seed, batch, length, most=5):
    """Up to `most` documents a row, borders anywhere, padding of different length at the end."""
    rng = np.random.default_rng(seed)
    segments = np.sort(rng.integers(1, most + 1, size=(batch, length)), axis=1).astype(np.int32)
    for row in range(batch):
        segments[row, length - rng.integers(0, length // 3 + 1) :] = 0
    return segments


def make_batch(lengths, total, seed=0):
    """Rows of documents of the given lengths, padded to `total`."""
    random = np.random.default_rng(seed)
    shape = (len(lengths), total)
    tokens, segments, positions = random.integers(0, 61, shape), np.zeros(shape), np.zeros(shape)
    for row, documents in enumerate(lengths):
        first = 0
        for number, size in enumerate(documents):
            segments[row, first : first + size] = number + 1
            positions[row, first : first + size] = np.arange(size)
            first += size
    return {
        k: v.astype(np.int32)
        for k, v in zip(("tokens", "segments", "positions"), (tokens, segments, positions), strict=True)
    }


def turn(x, cos, sin):
    """Rotary embedding in half layout."""
    a, b = np.split(x, 2, axis=-1)
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], -1)


def softmax(x):
    weights = np.exp(x - x.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def naive(model, tokens, score, budget, sinks=4, recent=8, sliding=None):
    """One document, position by position in float64: logits [T, V], chosen sets and weights [l][h][t].

    sliding: the window of all layers, or that of each layer; then those of None alone choose.

    score(layer, head, t, true) gives the scores of the keys row t may see; pooled by maximum over a group. A score
    with a method `see` is shown each layer's residual stream, attention input and keys before and after rotary.
    """
    c = model.config
    p = {n: np.float64(v[...]) for n, v in vars(model.layers).items() if hasattr(v, "shape")}
    half = c.head_dim // 2
    angles = np.arange(len(tokens))[:, None] * c.rope.theta ** (-np.arange(half) / half)
    cos, sin = np.cos(angles)[:, None], np.sin(angles)[:, None]

    def norm(x, scale):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + c.norm_eps) * scale

    def rotate(x):
        return turn(x, cos, sin)

    mixed = isinstance(sliding, tuple)
    x = np.float64(model.embedding[...])[tokens]
    sets, weights = [], []
    for layer in range(c.layers):
        h = norm(x, p["attention_norm"][layer])
        q, k, v = (np.einsum("te,ehd->thd", h, p[n][layer]) for n in "qkv")
        if hasattr(score, "see"):
            score.see(layer, x, h, k, rotate(k))
        q, k = rotate(q) / np.sqrt(c.head_dim), rotate(k)
        out = np.zeros_like(q)
        sets.append({}), weights.append({})
        for t in range(len(tokens)):
            window = sliding[layer] if mixed else sliding
            low = 0 if window is None else max(0, t - window + 1)
            chooses = layer > 0 and not (mixed and window)
            for kv in range(c.kv_heads):
                heads = range(kv * c.group, (kv + 1) * c.group)
                logits = {head: k[low : t + 1, kv] @ q[t, head] for head in heads}
                true = {head: softmax(z) for head, z in logits.items()}
                count = t + 1 - low
                n = min(max(ceil(budget * count), sinks + recent), count) if chooses else count
                pooled = np.max([score(layer, head, t, true[head]) for head in heads], axis=0)
                forced = [j for j in range(count) if j >= count - recent or j + low < sinks]
                rest = sorted((j for j in range(count) if j not in forced), key=lambda j: (-pooled[j], j))
                chosen = sorted(forced + rest[: n - len(forced)])
                for head in heads:
                    kept = true[head][chosen]
                    out[t, head] = kept @ v[low : t + 1, kv][chosen] / kept.sum()
                    sets[-1][head, t], weights[-1][head, t] = chosen, true[head]
        x = x + np.einsum("thd,hde->te", out, p["o"][layer])
        h = norm(x, p["mlp_norm"][layer])
        gate = np.einsum("te,ef->tf", h, p["gate"][layer])
        x = x + (gate / (1 + np.exp(-gate)) * (h @ p["up"][layer])) @ p["down"][layer]
    return norm(x, np.float64(model.final_norm[...])) @ np.float64(model.unembedding[...]).T, sets, weights


def next_nll(logits, tokens):
    top = logits.max(-1, keepdims=True)
    log = logits - top - np.log(np.exp(logits - top).sum(-1, keepdims=True))
    return -log[np.arange(len(tokens) - 1), tokens[1:]]


SCORES = {"oracle": lambda layer, head, t, true: true, "streaming": lambda layer, head, t, true: np.arange(len(true))}


class NaivePredictor:
    """The scores of a predictor in float64, from its published formulas; the logarithm of the weight that its softmax
    over the keys between 4 sinks and a recent of 8 gives.
    """

    def __init__(self, predictor, length):
        self.base, self.kind, self.stride = predictor.base, predictor.kind, predictor.stride
        self.rank = predictor.config.rank
        self.trunk, self.heads = (
            {n: np.asarray(v[...], np.float64) for n, v in vars(part).items() if hasattr(v, "shape")}
            if part is not None
            else None
            for part in (predictor.trunk, predictor.heads)
        )
        self.positions = np.arange(length)[:, None]
        self.norms, self.streams, self.rows = {}, {}, {}

    def angles(self, width):
        turns = self.positions * self.base.rope.theta ** (-np.arange(width // 2) / (width // 2))
        return np.cos(turns), np.sin(turns)

    def see(self, layer, x, h, k_pre, k):
        self.streams[layer] = x, h
        if layer == 0:
            return
        place = layer - 1
        producer = place // self.stride
        x, h = self.streams[producer * self.stride]
        q_imp, k_imp = getattr(self, self.kind)(producer, place, x, h, k_pre, k)
        if k_imp.shape[1] < q_imp.shape[1]:
            k_imp = np.repeat(k_imp, self.base.group, axis=1)
        self.rows[layer] = np.einsum("thr,shr->hts", q_imp, k_imp) / np.sqrt(self.rank)

    def __call__(self, layer, head, t, true):
        if not layer or t < 12:
            return true  # everything is read
        row = self.rows[layer][head, t, : t + 1]
        return row - np.log(np.exp(row[4 : t - 7]).sum())

    def producer(self, producer, place, x, h, k_pre, k):
        w = {n: v[producer] for n, v in self.trunk.items()}
        z = (h - h.mean(-1, keepdims=True)) / np.sqrt(h.var(-1, keepdims=True) + 1e-5)
        z = (z * w["norm_scale"] + w["norm_bias"]) @ w["inner"]
        f = z / (1 + np.exp(-z))
        query, key = (self.heads[n][place] for n in ("query", "key"))
        key = key.reshape(*k.shape[1:], -1)
        return np.einsum("ti,ihr->thr", f, query), np.einsum("tkd,kdr->tkr", k, key)

    def lookahead(self, producer, place, x, h, k_pre, k):
        scale = self.scale[place + 1]
        h = x / np.sqrt((x**2).mean(-1, keepdims=True) + self.base.norm_eps) * scale
        pairs = self.heads["pairs"][place].astype(int)
        cos, sin = (a[:, pairs] for a in self.angles(self.base.head_dim))
        q = np.einsum("te,ehr->thr", h, self.heads["query"][place])
        k = np.einsum("tkd,kdr->tkr", k_pre, self.heads["key"][place].reshape(*k_pre.shape[1:], -1))
        return turn(q, *(np.repeat(a, self.base.group, axis=1) for a in (cos, sin))), turn(k, cos, sin)

    def contextual(self, producer, place, x, h, k_pre, k):
        w = {n: v[0] for n, v in self.trunk.items()}
        narrow, length = self.base.width // 8, len(h)
        heads = next(n for n in range(self.base.heads, 0, -1) if narrow % (2 * n) == 0)
        z = h @ w["inner"]
        q, k, v = (z @ w[n] for n in "qkv")
        q, k, v = (a.reshape(length, heads, -1) for a in (q, k, v))
        cos, sin = (a[:, None] for a in self.angles(narrow // heads))
        scores = np.einsum("thd,shd->hts", turn(q, cos, sin), turn(k, cos, sin)) / np.sqrt(narrow // heads)
        weights = softmax(np.where(np.tri(length, dtype=bool), scores, -np.inf))
        y = np.einsum("hts,shd->thd", weights, v).reshape(length, -1)
        y = (y - y.mean(-1, keepdims=True)) / np.sqrt(y.var(-1, keepdims=True) + 1e-5)
        y = (y * w["norm_scale"] + w["norm_bias"]) @ w["up"] + w["up_bias"]
        y = y * (1 + np.vectorize(math.erf)(y / np.sqrt(2))) / 2
        x = h + y @ w["down"] + w["down_bias"]
        f, g = (z / (1 + np.exp(-z)) for z in (x @ w["query"], x @ w["key"]))
        cos, sin = (a[:, None] for a in self.angles(self.rank))
        return (
            turn(np.einsum("ti,ihr->thr", f, self.heads["query"][place]), cos, sin),
            turn(np.einsum("ti,ihr->thr", g, self.heads["key"][place]), cos, sin),
        )


class Letters:
    """A tokenizer of single characters, for tests."""

    bos = eos = None

    def encode(self, text, bos=None):
        return [ord(c) % 61 for c in text]

    def encode_with_offsets(self, text, bos=None):
        return self.encode(text), [(i, i + 1) for i in range(len(text))]
