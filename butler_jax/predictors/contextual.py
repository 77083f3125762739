"""The contextual predictor of the paper's first version (TokenButler, arXiv 2503.07518v1, section 3)."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from butler_jax.model import BaseConfig, LayerView, layer_norm, normed_stream, rope_frequencies, rotary, rotary_angles
from butler_jax.predictors.base import Context, Predictor, ServedBlock, xavier
from butler_jax.predictors.config import PredictorConfig

DROPOUT = 0.1


class ContextualTrunk(nnx.Module):
    """One small transformer block, and the first layers of the query and key networks (leading axis 1)."""

    def __init__(self, width: int, hidden: int, key):
        narrow, wide = width // 8, width // 4
        keys = jax.random.split(key, 8)
        self.inner = xavier(keys[0], (1, width, narrow), width, narrow)
        self.q, self.k, self.v = (xavier(k, (1, narrow, narrow), narrow, narrow) for k in keys[1:4])
        self.norm_scale = nnx.Param(jnp.ones((1, narrow)))
        self.norm_bias = nnx.Param(jnp.zeros((1, narrow)))
        self.up = xavier(keys[4], (1, narrow, wide), narrow, wide)
        self.up_bias = nnx.Param(jnp.zeros((1, wide)))
        self.down = xavier(keys[5], (1, wide, width), wide, width)
        self.down_bias = nnx.Param(jnp.zeros((1, width)))
        self.query = xavier(keys[6], (1, width, hidden), width, hidden)
        self.key = xavier(keys[7], (1, width, hidden), width, hidden)


class ContextualHeads(nnx.Module):
    """The last layers of the query and key networks, stacked over the served layers."""

    def __init__(self, base: BaseConfig, hidden: int, rank: int, key):
        first, second = jax.random.split(key)
        layers = len(base.served_layers)
        shape, outputs = (layers, hidden, base.heads, rank), layers * base.heads * rank
        self.query = xavier(first, shape, hidden, outputs)
        self.key = xavier(second, shape, hidden, outputs)


class Contextual(Predictor):
    """One producer at layer 0 serves all served layers. It has an attention of its own, and k_imp has H heads.

    Its input is the token embeddings after layer 0's input norm. Its attention, q_imp and k_imp are rotated by the
    base's rope settings. A base with longrope gets the default rope here, for longrope's factors fit only its own head
    width.

    Two parts of the published parameter counts are left out: a LayerNorm over E whose output is never used (2 E), and
    the slots of layer 0, which is always dense (2 I H R).

    Raises:
        ValueError: The base's width is not a multiple of 16.
    """

    kind = "contextual"
    objective = "squared_error"
    logical_axes = {
        "inner": ("layers", "width", "none"),
        "q": ("layers", "inputs", "none"),
        "k": ("layers", "inputs", "none"),
        "v": ("layers", "inputs", "none"),
        "norm_scale": ("layers", "norm"),
        "norm_bias": ("layers", "norm"),
        "up": ("layers", "inputs", "none"),
        "up_bias": ("layers", "norm"),
        "down": ("layers", "none", "width"),
        "down_bias": ("layers", "norm"),
        "trunk.query": ("layers", "width", "hidden"),
        "trunk.key": ("layers", "width", "hidden"),
        "heads.query": ("layers", "inputs", "heads", "rank"),
        "heads.key": ("layers", "inputs", "heads", "rank"),
    }

    def __init__(self, base: BaseConfig, config: PredictorConfig, key):
        super().__init__(base, config)
        if base.width % 16 != 0:
            raise ValueError(
                f"the contextual predictor needs a width that is a multiple of 16, got {base.width}; "
                "use --predictor lookahead"
            )
        self.stride = base.layers - 1
        hidden = config.hidden or 512
        first, second = jax.random.split(key)
        self.trunk = ContextualTrunk(base.width, hidden, first)
        self.heads = ContextualHeads(base, hidden, config.rank, second)

    @property
    def blocks(self) -> tuple[ServedBlock, ...]:
        """One block of all served layers."""
        return (ServedBlock(0, self.base.served_layers),)

    @property
    def key_heads(self) -> int:
        """H: every query head has keys of its own."""
        return self.base.heads

    @property
    def attention_heads(self) -> int:
        """Heads of the trunk's attention: the largest number up to H that gives them an even width, as rotary needs."""
        narrow = self.base.width // 8
        return next(h for h in range(self.base.heads, 0, -1) if narrow % (2 * h) == 0)

    def capture(self, view: LayerView):
        """The embeddings after layer 0's input norm, [B, T, E]."""
        return normed_stream(view.weights, view.x, self.base.norm_eps)

    def trunk_cache(self, batch: int, capacity: int, dtype: Any):
        """Empty keys and values of the trunk's attention, [B, S, heads, E/8/heads] each."""
        heads = self.attention_heads
        shape = (batch, capacity, heads, self.base.width // 8 // heads)
        return jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)

    def _rotate(self, x, context: Context):
        """Rotate x [B, T, heads, width] over its whole width by the base's rope at the context's positions."""
        rope = self.base.rope
        if rope.kind == "longrope":
            rope = type(rope)(theta=rope.theta)
        frequencies, factor = rope_frequencies(rope, x.shape[-1], context=self.base.context, length=0)
        cos, sin = rotary_angles(context.positions, frequencies, factor)
        return rotary(x, cos[:, :, None], sin[:, :, None])

    def features(self, trunk: Any, captured, context: Context, attend, dropout):
        """Hidden layers [B, T, I] of the query network and of the key network."""
        x = captured

        def cast(p):
            return p[...].astype(x.dtype)

        z = jnp.einsum("bte,ez->btz", x, cast(trunk.inner))
        heads = self.attention_heads
        q, k, v = (
            jnp.einsum("btz,zy->bty", z, cast(w)).reshape(*z.shape[:2], heads, -1) for w in (trunk.q, trunk.k, trunk.v)
        )
        y, cache = attend(self._rotate(q, context), self._rotate(k, context), v)
        y = layer_norm(y.reshape(z.shape).astype(x.dtype), trunk.norm_scale[...], trunk.norm_bias[...])
        y = jnp.einsum("btz,zy->bty", y, cast(trunk.up)) + cast(trunk.up_bias)[None, None]
        y = jax.nn.gelu(y, approximate=False)
        if dropout is not None:
            keep = jax.random.bernoulli(dropout, 1 - DROPOUT, y.shape)
            y = jnp.where(keep, y / (1 - DROPOUT), 0)
        x = x + jnp.einsum("btz,ze->bte", y, cast(trunk.down)) + cast(trunk.down_bias)[None, None]
        hidden = tuple(jax.nn.silu(jnp.einsum("bte,ei->bti", x, cast(w))) for w in (trunk.query, trunk.key))
        return hidden, cache

    def q_imp(self, head: Any, features, view: LayerView, context: Context):
        """The query network's output [B, T, H, R], rotated."""
        y = jnp.einsum("bti,ihr->bthr", features[0], head.query[...].astype(features[0].dtype))
        return self._rotate(y, context)

    def k_imp(self, head: Any, features, view: LayerView, context: Context):
        """The key network's output [B, T, H, R], rotated."""
        y = jnp.einsum("bti,ihr->bthr", features[1], head.key[...].astype(features[1].dtype))
        return self._rotate(y, context)
