"""The lookahead predictor: the base's own projections, cut to R/2 rotary pairs and applied up to P layers early.

At the same stride, it has the timing and the score cache of the producer predictor. It differs in three ways:

- q_imp and k_imp are rotated at R/2 of the base's rotary frequencies.
- They start as the matching rows of the frozen projections.
- Every query row is distilled, not a sample of the rows.

The rotary pairs f of a layer and KV head are those with the largest E|q_f|^2 E|k_f - mean k_f|^2.

An error in the residual stream depends on values too, of which keys say nothing. So the last numbers of k_imp, its
value channels, may describe the token's value v. The first is log |v W|, the norm that v has in the residual stream,
as the root of the mean square over the heads of the group. The others are learned directions of v / |v W|. None is
rotated. Their numbers of q_imp are linear in the captured stream, and start so that the score is the logarithm of the
attention weight plus log |v W|.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from butler_jax.model import (
    BaseConfig,
    BaseModel,
    LayerView,
    dense_mixer,
    document_places,
    embed,
    few_tokens,
    normed_stream,
    output_gram,
    output_projection,
    rotary,
    run_layers,
    weights_of,
)
from butler_jax.predictors.base import Context, Predictor, project_heads
from butler_jax.predictors.config import PredictorConfig

OFFSET_SCALE = 16.0  # of the offset's bias, which must move by nats where a step moves a parameter by the learning rate
SMALLEST = 1e-6  # squared norms of values below it count as it, so that their logarithm is finite


class LookaheadHeads(nnx.Module):
    """Stacked over the served layers, with N value channels and M = R - N rotated numbers.

    Attributes:
        query, key, pairs: The rotated numbers: [E, H, M], [K*D, M] and the indices of the rotary pairs [K, M/2].
        query_bias: [H, M]; None where the base has no bias.
        value_query, value_bias: The value channels of q_imp: [E, H, N] and [H, N].
        value_gram: The mean of W W^T over the heads of a group, [K*D, D]; of the base, not trained.
        value_key: The learned directions of values, [K*D, N-1].
        offset, offset_bias: The offset: [E, H], and [3, H] for the logarithms of the stream's norm and of the position,
            and a constant.
    """

    def __init__(self, base: BaseConfig, config: PredictorConfig, key):
        channels = config.value_channels
        rank = config.rank - channels
        first, second, third = jax.random.split(key, 3) if channels else (*jax.random.split(key), None)
        L, E, H, K, D = len(base.served_layers), base.width, base.heads, base.kv_heads, base.head_dim
        self.query = nnx.Param(jax.random.normal(first, (L, E, H, rank)) * E**-0.5)
        self.key = nnx.Param(jax.random.normal(second, (L, K * D, rank)) * D**-0.5)
        self.query_bias = nnx.Param(jnp.zeros((L, H, rank))) if base.qkv_bias else None
        if channels:
            self.value_query = nnx.Param(jnp.zeros((L, E, H, channels)))
            self.value_bias = nnx.Param(jnp.zeros((L, H, channels)).at[..., 0].set(config.rank**0.5))
            self.value_gram = nnx.Variable(jnp.broadcast_to(jnp.tile(jnp.eye(D), (K, 1)), (L, K * D, D)))
            self.value_key = nnx.Param(jax.random.normal(third, (L, K * D, channels - 1)) * D**-0.5)
        else:
            self.value_query = self.value_bias = self.value_gram = self.value_key = None
        absolute = config.offset != "none"
        self.offset = nnx.Param(jnp.zeros((L, E, H))) if absolute else None
        self.offset_bias = nnx.Param(jnp.zeros((L, 3, H))) if absolute else None
        pairs = jnp.arange(D // 2 - rank // 2, D // 2, dtype=jnp.int32)
        self.pairs = nnx.Variable(jnp.broadcast_to(pairs, (L, K, rank // 2)))


class Lookahead(Predictor):
    """q_imp = rot(norm_l(x_p) W_l) and k_imp = rot(k_pre U_l); x_p is the residual stream that enters producer layer p.

    Raises:
        ValueError: The rank exceeds the base's head dimension and the value channels.
    """

    kind = "lookahead"
    learning_rate = 5e-3
    logical_axes = {
        "query": ("layers", "width", "heads", "rank"),
        "key": ("layers", "kv_inputs", "rank"),
        "query_bias": ("layers", "heads", "rank"),
        "value_query": ("layers", "width", "heads", "rank"),
        "value_bias": ("layers", "heads", "rank"),
        "value_gram": ("layers", "kv_inputs", "rank"),
        "value_key": ("layers", "kv_inputs", "rank"),
        "offset": ("layers", "width", "heads"),
        "offset_bias": ("layers", "norm", "heads"),
        "pairs": ("layers", "kv_heads", "rank"),
    }

    def __init__(self, base: BaseConfig, config: PredictorConfig, key):
        super().__init__(base, config)
        most = base.head_dim + config.value_channels
        if config.rank > most:
            raise ValueError(
                f"rank {config.rank} exceeds the base's head dimension {base.head_dim}"
                + (f" and the {config.value_channels} value channels" if config.value_channels else "")
                + f"; use at most {most}"
            )
        self.trunk = None
        self.heads = LookaheadHeads(base, config, key)

    def _angles(
        self, head: Any, view: LayerView, context: Context
    ) -> tuple[Float[Array, "B T K pairs"], Float[Array, "B T K pairs"]]:
        cos, sin = context.angles.of(view.index)
        still = self.base.head_dim // 2 - cos.shape[-1]  # pairs that the base does not rotate
        pad = ((0, 0), (0, 0), (0, still))
        cos, sin = jnp.pad(cos, pad, constant_values=1.0), jnp.pad(sin, pad)
        return cos[..., head.pairs[...]], sin[..., head.pairs[...]]

    def q_imp(self, head: Any, features, view: LayerView, context: Context):
        """The captured stream under this layer's frozen norm, projected and, but for values, rotated; [B, T, H, R]."""
        h = few_tokens(normed_stream(view.weights, features, self.base.norm_eps))

        def project(weights, bias):
            q = jnp.einsum("bte,ehr->bthr", h, weights[...].astype(h.dtype))
            return q if bias is None else q + bias[...].astype(h.dtype)[None, None]

        cos, sin = (jnp.repeat(a, self.base.group, axis=2) for a in self._angles(head, view, context))
        q = rotary(project(head.query, head.query_bias), cos, sin)
        if head.value_query is None:
            return q
        return jnp.concatenate([q, project(head.value_query, head.value_bias)], axis=-1)

    def k_imp(self, head: Any, features, view: LayerView, context: Context):
        """The keys before rotary, projected and rotated, and the value channels; [B, T, K, R]."""
        k = rotary(project_heads(view.k_pre, head.key[...]), *self._angles(head, view, context))
        if head.value_gram is None:
            return k
        v = view.v.astype(jnp.float32)
        squares = jnp.sum(project_heads(v, head.value_gram[...]) * v, axis=-1, keepdims=True)
        norm = jnp.sqrt(jnp.maximum(squares, SMALLEST))
        values = jnp.concatenate([jnp.log(norm), project_heads(v, head.value_key[...]) / norm], axis=-1)
        return jnp.concatenate([k, values.astype(k.dtype)], axis=-1)

    def offset(self, head: Any, features, view: LayerView, context: Context):
        """Linear in the normalised captured stream, the logarithm of its norm, and that of the position; [B, T, H]."""
        if head.offset is None:
            return None
        stream = features.astype(jnp.float32)
        size = jnp.sqrt(jnp.mean(jnp.square(stream), axis=-1, keepdims=True) + self.base.norm_eps)
        of_norm, of_position, bias = OFFSET_SCALE * head.offset_bias[...]
        found = jnp.einsum("bte,eh->bth", stream / size * self.base.width**-0.5, head.offset[...])
        # A log-sum-exp grows with the number of keys; 256 centres its logarithm.
        number = jnp.log((context.positions + 1).astype(jnp.float32) / 256)[..., None]
        return found + jnp.log(size) * of_norm[None, None] + number * of_position[None, None] + bias[None, None]

    def shift_offset(self, values: Float[Array, " L"]) -> Lookahead:
        """A copy whose offsets are larger by one number for each served layer, in nats."""
        graph, state = nnx.split(self)
        shifted = nnx.merge(graph, state)
        bias = self.heads.offset_bias[...]
        shifted.heads.offset_bias = nnx.Param(bias.at[:, 2].add((values / OFFSET_SCALE)[:, None].astype(bias.dtype)))
        return shifted

    def initialise(self, model: BaseModel, batches: list[dict]) -> Lookahead:
        """Choose the rotary pairs on calibration text and copy the matching rows of the frozen projections.

        Raises:
            ValueError: There are no batches.
        """
        if not batches:
            raise ValueError(
                "the lookahead predictor chooses its rotary pairs on text: give it calibration batches, for instance "
                "a few of butler_jax.read_batches('python_docs', base.tokenizer, length=512, batch_size=4)"
            )
        energy, spread, squares = jax.tree.map(lambda *a: sum(a), *[_pair_moments(model, b) for b in batches])
        number = (self.config.rank - self.config.value_channels) // 2
        pairs = jnp.sort(jax.lax.top_k(energy * spread, number)[1], axis=-1)[np.asarray(self.base.served_layers)]
        graph, state = nnx.split(self)
        chosen = nnx.merge(graph, state)
        norms = jnp.sqrt(squares[:, 0] / jnp.maximum(squares[:, 1], SMALLEST))
        chosen.heads = _from_base(model, self.base, chosen.heads, pairs.astype(jnp.int32), self.config.rank, norms)
        return chosen


def pair_dimensions(base: BaseConfig) -> tuple[Int[Array, " pairs"], Int[Array, " pairs"]]:
    """The two dimensions of each of the D/2 pairs: first the rotated pairs in half layout, then the others."""
    half, still = base.rotary_dim // 2, (base.head_dim - base.rotary_dim) // 2
    first = jnp.concatenate([jnp.arange(half), base.rotary_dim + jnp.arange(still)])
    second = jnp.concatenate([half + jnp.arange(half), base.rotary_dim + still + jnp.arange(still)])
    return first, second


@jax.jit
def _pair_moments(
    model: BaseModel, batch: dict
) -> tuple[Float[Array, "L K pairs"], Float[Array, "L K pairs"], Float[Array, "L 2 H"]]:
    """E|q_f|^2 and E|k_f - mean k_f|^2 of every layer, KV head and pair f, and E|q|^2 of every query head.

    The last is of queries as they are, and of those whose norm is left out; 1 and 1 where the base norms no queries.
    """
    config = model.config
    segments = jnp.asarray(batch["segments"])
    weight = (segments > 0).astype(jnp.float32)
    weight = (weight / jnp.maximum(weight.sum(), 1.0))[:, :, None, None]  # a batch of padding counts as 0
    first, second = pair_dimensions(config)
    dense = dense_mixer(config, segments)

    def mixer(carry, view):
        q, k = (jnp.stack([a[..., first], a[..., second]]).astype(jnp.float32) for a in (view.q, view.k))
        energy = (jnp.square(q).sum(0) * weight).sum((0, 1)).reshape(config.kv_heads, config.group, -1).mean(1)
        mean = (k * weight[None]).sum((1, 2), keepdims=True)
        spread = (jnp.square(k - mean).sum(0) * weight).sum((0, 1))
        squares = jnp.ones((2, config.heads))
        if view.weights.q_norm is not None:
            h = normed_stream(view.weights, view.x, config.norm_eps).astype(jnp.float32)
            plain = jnp.einsum("bte,ehd->bthd", h, _scaled_query(view.weights, config))
            both = jnp.stack([view.q.astype(jnp.float32), plain * config.query_factor])
            squares = jnp.einsum("nbthd,bt->nh", jnp.square(both), weight[..., 0, 0])
        mixed, _, _ = dense(None, view)
        return mixed, carry, (energy, spread, squares)

    x = embed(model, jnp.asarray(batch["tokens"]))
    return run_layers(model, x, jnp.asarray(batch["positions"]), mixer, None, near=document_places(segments))[2]


def _scaled_query(weights: Any, base: BaseConfig) -> Float[Array, "E H D"]:
    """The query projection of a layer with the gains of the norm that follows it."""
    query = weights.q[...].astype(jnp.float32)
    if weights.q_norm is None:
        return query
    return query * jnp.broadcast_to(weights.q_norm[...], (base.heads, base.head_dim)).astype(jnp.float32)[None]


def _from_base(
    model: BaseModel, base: BaseConfig, heads: LookaheadHeads, pairs, rank: int, norms: Float[Array, "L H"]
) -> LookaheadHeads:
    """The heads with the frozen projections' rows of these pairs [L-1, K, M/2], scaled to keep the logits' size.

    norms: What the norm of the queries multiplies each head by, on the mean.
    """
    first, second = pair_dimensions(base)
    dims = jnp.concatenate([first[pairs], second[pairs]], axis=-1)  # [L-1, K, M]
    scale = (rank / base.head_dim) ** 0.5 * base.query_factor
    copied = [
        _copy_rows(weights_of(model, n), dims[i], norms[n], base, scale) for i, n in enumerate(base.served_layers)
    ]
    query, bias, gram = jax.tree.map(lambda *parts: jnp.stack(parts), *copied)
    heads.query = nnx.Param(query)
    rows = jnp.swapaxes(jax.nn.one_hot(dims, base.head_dim, dtype=jnp.float32), -1, -2)
    heads.key = nnx.Param(rows.reshape(len(rows), -1, dims.shape[-1]))
    if heads.query_bias is not None:
        heads.query_bias = nnx.Param(bias)
    heads.pairs = nnx.Variable(pairs)
    if heads.value_gram is not None:
        heads.value_gram = nnx.Variable(gram.reshape(heads.value_gram.shape))
    return heads


@partial(jax.jit, static_argnames=("base", "scale"))
def _copy_rows(
    weights: Any, dims: Int[Array, "K M"], norms: Float[Array, " H"], base: BaseConfig, scale: float
) -> tuple[Float[Array, "E H M"], Float[Array, "H M"] | None, Float[Array, "K D D"]]:
    """A layer's query projection and its bias at these dimensions, and the mean of W W^T over the heads of a group."""
    per_query = jnp.repeat(dims, base.group, axis=0)  # [H, M]

    def chosen(values: Float[Array, "_ H D"]) -> Float[Array, "_ H M"]:
        return jnp.take_along_axis(values.astype(jnp.float32), per_query[None], axis=-1) * scale

    query = chosen(_scaled_query(weights, base) * norms[None, :, None])
    bias = None if weights.q_bias is None else chosen(weights.q_bias[...][None])[0]
    return query, bias, jnp.mean(output_gram(output_projection(weights), base.kv_heads), axis=1)
