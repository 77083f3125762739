"""A decoder as another project would write it, with the weights of a BaseModel, and its adapter.

Its layers are a list of modules, its projections are flat, and its rotary embedding turns pairs of neighbours.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from butler_jax.model import AttentionInputs, BaseModel, LayerWeights, ModelAdapter


class OwnLayer(nnx.Module):
    """Parameters of a layer, made from layer `number` of a BaseModel."""

    def __init__(self, model: BaseModel, number: int):
        c, own = model.config, model.layers
        neighbours = np.arange(c.head_dim).reshape(2, -1).T.ravel()  # half layout -> pairs of neighbours

        def linear(weights, pairs=False):
            kernel = weights[number]
            kernel = kernel[..., neighbours] if pairs else kernel
            inputs = kernel.shape[0] if kernel.shape[-1] != c.width else -1
            kernel = kernel.reshape(c.width, -1) if inputs == c.width else kernel.reshape(-1, c.width)
            module = nnx.Linear(*kernel.shape, use_bias=False, rngs=nnx.Rngs(0))
            module.kernel[...] = kernel
            return module

        self.before, self.after = nnx.Param(own.attention_norm[number]), nnx.Param(own.mlp_norm[number])
        self.q, self.k, self.v = linear(own.q, True), linear(own.k, True), linear(own.v)
        self.o, self.gate, self.up, self.down = map(linear, (own.o, own.gate, own.up, own.down))


class OwnDecoder(nnx.Module):
    """The decoder: embedding, layers, norm and unembedding."""

    def __init__(self, model: BaseModel):
        head = model.embedding if model.unembedding is None else model.unembedding
        self.table, self.head = nnx.Param(model.embedding[...]), nnx.Param(head[...].T)
        self.blocks = nnx.List([OwnLayer(model, number) for number in range(model.config.layers)])
        self.norm = nnx.Param(model.final_norm[...])


def normalise(x, scale, eps):
    return x / jnp.sqrt(jnp.mean(x**2, axis=-1, keepdims=True) + eps) * jnp.expand_dims(scale, (0, 1))


def turn_neighbours(x, positions, theta):
    """x [B, T, heads, D] with its pairs of neighbours turned."""
    frequencies = theta ** (-jnp.arange(0, x.shape[-1], 2) / x.shape[-1])
    turned = (x[..., ::2] + 1j * x[..., 1::2]) * jnp.exp(1j * jnp.einsum("bt,f->btf", positions, frequencies))[
        :, :, None
    ]
    return jnp.stack([turned.real, turned.imag], axis=-1).reshape(x.shape)


class OwnAdapter(ModelAdapter):
    """The adapter of OwnDecoder."""

    def __init__(self, decoder: OwnDecoder, config, stacked: bool = False):
        self.decoder, self.config = decoder, config
        if stacked:
            decoder.blocks = jax.tree.map(lambda *a: jnp.stack(a), *decoder.blocks)

    @property
    def layers(self):
        return self.decoder.blocks

    def embed(self, tokens):
        return self.decoder.table[tokens]

    def halves(self, x):
        """Neighbours of the last axis in half layout."""
        return jnp.concatenate([x[..., ::2], x[..., 1::2]], axis=-1)

    def project(self, layer, x, positions):
        c = self.config
        h = normalise(x, layer.before, c.norm_eps)
        q, k, v = (p(h).reshape(*x.shape[:2], -1, c.head_dim) for p in (layer.q, layer.k, layer.v))
        turned = (turn_neighbours(a, positions, c.rope.theta) for a in (q, k))
        return AttentionInputs(*map(self.halves, turned), self.halves(k), v)

    def finish(self, layer, x, mixed):
        x = x + layer.o(mixed.reshape(*x.shape[:2], -1))
        h = normalise(x, layer.after, self.config.norm_eps)
        return x + layer.down(nnx.silu(layer.gate(h)) * layer.up(h))

    def logits(self, x):
        return normalise(x, self.decoder.norm, self.config.norm_eps) @ self.decoder.head

    def weights(self, layer):
        c = self.config
        q = self.halves(layer.q.kernel.reshape(c.width, c.heads, c.head_dim))
        return LayerWeights(layer.before[...], q, layer.o.kernel.reshape(c.heads, c.head_dim, c.width))
