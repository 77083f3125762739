"""The producer/consumer predictor of the paper's second version (TokenButler, arXiv 2503.07518v2)."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from butler_jax.model import BaseConfig, LayerView, layer_norm, normed_stream
from butler_jax.predictors.base import Context, Predictor, project_heads, xavier
from butler_jax.predictors.config import PredictorConfig


class ProducerTrunk(nnx.Module):
    """LayerNorm and the first projection, stacked over the producers."""

    def __init__(self, producers: int, width: int, hidden: int, key):
        self.norm_scale = nnx.Param(jnp.ones((producers, width)))
        self.norm_bias = nnx.Param(jnp.zeros((producers, width)))
        self.inner = xavier(key, (producers, width, hidden), width, hidden)


class ProducerHeads(nnx.Module):
    """The projections of q_imp and k_imp, stacked over the P slots of every producer."""

    def __init__(self, slots: int, base: BaseConfig, hidden: int, rank: int, key):
        first, second = jax.random.split(key)
        self.query = xavier(first, (slots, hidden, base.heads, rank), hidden, base.heads * rank)
        self.key = xavier(second, (slots, base.kv_heads * base.head_dim, rank), base.head_dim, rank)


class Producer(Predictor):
    """q_imp is a small network of the producer layer's attention input; k_imp is a projection of the cached keys.

    The network is LayerNorm(E) -> E x I -> SiLU -> I x (P H R). It reads the attention input (after the input norm) of
    the layer before the block. q_imp is not rotated. k_imp has one projection for every KV head. Every producer has P
    slots, as published: those beyond the last layer stay untrained.
    """

    kind = "producer"
    logical_axes = {
        "norm_scale": ("layers", "norm"),
        "norm_bias": ("layers", "norm"),
        "inner": ("layers", "width", "hidden"),
        "query": ("layers", "inputs", "heads", "rank"),
        "key": ("layers", "kv_inputs", "rank"),
    }

    def __init__(self, base: BaseConfig, config: PredictorConfig, key):
        super().__init__(base, config)
        hidden = config.hidden or 512
        first, second = jax.random.split(key)
        self.trunk = ProducerTrunk(self.producers, base.width, hidden, first)
        self.heads = ProducerHeads(self.members.size, base, hidden, config.rank, second)

    def capture(self, view: LayerView):
        """The attention input of the producer layer, [B, T, E]."""
        return normed_stream(view.weights, view.x, self.base.norm_eps)

    def features(self, trunk: Any, captured, context: Context, attend, dropout):
        """The hidden layer [B, T, I] shared by the producer's slots."""
        x = layer_norm(captured, trunk.norm_scale[...], trunk.norm_bias[...])
        return jax.nn.silu(jnp.einsum("bte,ei->bti", x, trunk.inner[...].astype(x.dtype))), None

    def q_imp(self, head: Any, features, view: LayerView, context: Context):
        """The slot's projection of the hidden layer, [B, T, H, R]."""
        return jnp.einsum("bti,ihr->bthr", features, head.query[...].astype(features.dtype))

    def k_imp(self, head: Any, features, view: LayerView, context: Context):
        """The projected keys [B, T, K, R], from the keys after rotary."""
        return project_heads(view.k, head.key[...])
