"""The frozen decoder: one Flax NNX module tree for every family, and one scan over its layers.

Modules only hold parameters, which are stacked over the layers. Every pass through the decoder is a call of
`run_layers`. The caller passes the attention (dense, distilling, sparse or cached) as a mixer.

`embed`, `run_layers`, `weights_of` and `logits` are all that a pass asks of a model. They dispatch on its type, so that
a decoder of another library takes the place of BaseModel (adapter.py).
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from functools import partial, singledispatch
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key

from butler_jax.model.angles import rope_angles
from butler_jax.model.attention import causal_attention
from butler_jax.model.checks import check_length
from butler_jax.model.config import BaseConfig
from butler_jax.model.experts import mix_experts
from butler_jax.model.layers import gated, head_norm, rms_norm, rotary, soft_cap
from butler_jax.parallel import constrain, token_axis

# Logical axes of every parameter by name; parallel.mesh maps them to mesh axes.
LOGICAL_AXES: dict[str, tuple[str, ...]] = {
    "embedding": ("vocab", "width"),
    "unembedding": ("vocab", "width"),
    "final_norm": ("norm",),
    "attention_norm": ("layers", "norm"),
    "attention_output_norm": ("layers", "norm"),
    "mlp_norm": ("layers", "norm"),
    "mlp_output_norm": ("layers", "norm"),
    "q": ("layers", "width", "heads", "head_dim"),
    "k": ("layers", "width", "kv_heads", "head_dim"),
    "v": ("layers", "width", "kv_heads", "head_dim"),
    "o": ("layers", "heads", "head_dim", "width"),
    "q_bias": ("layers", "heads", "head_dim"),
    "k_bias": ("layers", "kv_heads", "head_dim"),
    "v_bias": ("layers", "kv_heads", "head_dim"),
    "o_bias": ("layers", "norm"),
    "q_norm": ("layers", "heads", "head_dim"),
    "k_norm": ("layers", "kv_heads", "head_dim"),
    "sinks": ("layers", "heads"),
    "gate": ("layers", "width", "hidden"),
    "up": ("layers", "width", "hidden"),
    "down": ("layers", "hidden", "width"),
    "gate_bias": ("layers", "hidden"),
    "up_bias": ("layers", "hidden"),
    "down_bias": ("layers", "norm"),
    "router": ("layers", "width", "routed"),
    "router_bias": ("layers", "routed"),
    "expert_gate": ("layers", "experts", "width", "hidden"),
    "expert_up": ("layers", "experts", "width", "hidden"),
    "expert_down": ("layers", "experts", "hidden", "width"),
    "expert_gate_bias": ("layers", "experts", "hidden"),
    "expert_up_bias": ("layers", "experts", "hidden"),
    "expert_down_bias": ("layers", "experts", "norm"),
}


class Layers(nnx.Module):
    """Parameters of all decoder layers, each array with a leading axis L. Those that the family lacks are None."""

    def __init__(self, config: BaseConfig, key: Key[Array, ""], dtype: Any = jnp.float32):
        c = config
        L, E, H, K, D, hidden = c.layers, c.width, c.heads, c.kv_heads, c.head_dim, c.hidden
        keys = iter(jax.random.split(key, 7))

        def dense(*shape: int, inputs: int, gain: float = 1.0) -> nnx.Param:
            return nnx.Param((jax.random.normal(next(keys), (L, *shape)) * gain * inputs**-0.5).astype(dtype))

        quiet = (2 * L * E) ** -0.5  # the sum of all blocks starts at the scale of the embeddings

        def vector(*shape: int, fill: float, when: bool = True, dtype: Any = dtype) -> nnx.Param | None:
            return nnx.Param(jnp.full((L, *shape), fill, dtype)) if when else None

        norm = partial(vector, fill=1.0, dtype=norm_dtype(c, dtype))
        before, after = c.norms != "post", c.norms != "pre"
        self.attention_norm, self.attention_output_norm = norm(E, when=before), norm(E, when=after)
        self.q, self.k, self.v = dense(E, H, D, inputs=E), dense(E, K, D, inputs=E), dense(E, K, D, inputs=E)
        self.o = dense(H, D, E, inputs=H * D, gain=quiet)
        self.q_bias, self.k_bias, self.v_bias = (vector(n, D, fill=0.0, when=c.qkv_bias) for n in (H, K, K))
        self.o_bias = vector(E, fill=0.0, when=c.output_bias)
        self.q_norm, self.k_norm = (norm(n if c.joint_qk_norm else 1, D, when=c.qk_norm) for n in (H, K))
        self.sinks = vector(H, fill=0.0, when=c.attention_sinks)
        self.mlp_norm, self.mlp_output_norm = norm(E, when=before), norm(E, when=after)
        X = (c.experts,) if c.experts else ()  # one dense block, or a router and experts
        blocks = dense(*X, E, hidden, inputs=E), dense(*X, E, hidden, inputs=E)
        blocks = *blocks, dense(*X, hidden, E, inputs=hidden, gain=quiet)
        self.gate, self.up, self.down = (None,) * 3 if X else blocks
        self.expert_gate, self.expert_up, self.expert_down = blocks if X else (None,) * 3
        plain, mixed = c.mlp_bias and not X, c.mlp_bias and bool(X)
        self.gate_bias, self.up_bias, self.down_bias = (vector(n, fill=0.0, when=plain) for n in (hidden, hidden, E))
        self.expert_gate_bias, self.expert_up_bias, self.expert_down_bias = (
            vector(*X, n, fill=0.0, when=mixed) for n in (hidden, hidden, E)
        )
        keys = iter([jax.random.fold_in(key, 0)])
        self.router = dense(E, *X, inputs=E) if X else None
        self.router_bias = vector(*X, fill=0.0, when=c.router_bias)


def norm_dtype(config: BaseConfig, dtype: Any) -> Any:
    """The dtype of the scales of RMS norms in a model of this dtype."""
    return jnp.float32 if config.wide_norms else dtype


class BaseModel(nnx.Module):
    """A decoder-only language model: embedding [V, E], stacked layers, final norm, unembedding [V, E] (None: tied)."""

    def __init__(self, config: BaseConfig, key: Key[Array, ""], dtype: Any = jnp.float32):
        first, second, third = jax.random.split(key, 3)
        self.config = config

        def table(k: Key[Array, ""]) -> nnx.Param:
            values = jax.random.normal(k, (config.vocab_size, config.width)) * config.width**-0.5
            return nnx.Param(values.astype(dtype))

        self.embedding = table(first)
        self.layers = Layers(config, second, dtype)
        self.final_norm = nnx.Param(jnp.ones((config.width,), norm_dtype(config, dtype)))
        self.unembedding = None if config.tied else table(third)


class LayerView(NamedTuple):
    """A layer as its mixer sees it.

    Attributes:
        index: The layer, from 0.
        weights: The layer's parameters, without the layer axis; of another library's model, its `LayerWeights`.
        x: The residual stream that enters the layer.
        q, k: Queries and keys after norm and rotary. Queries are scaled so that logits have the factor D**-0.5.
        k_pre: Keys after norm and before rotary.
        v: Values.
        softcap: `BaseConfig.attention_softcap`.
    """

    index: Int[Array, ""]
    weights: Layers
    x: Float[Array, "B T E"]
    q: Float[Array, "B T H D"]
    k: Float[Array, "B T K D"]
    k_pre: Float[Array, "B T K D"]
    v: Float[Array, "B T K D"]
    softcap: float | None = None

    @property
    def attention_terms(self) -> dict[str, Any]:
        """What else counts in the softmax: softcap and sink_logits, as `causal_attention` takes them."""
        return {"softcap": self.softcap, "sink_logits": sink_logits(self.weights)}


def sink_logits(weights: Any) -> Float[Array, " H"] | None:
    """The attention sinks of a layer from its parameters; None where it has none."""
    sinks = getattr(weights, "sinks", None)
    return None if sinks is None else sinks[...]


FAR = 2**30  # the sliding window of a layer that sees everything

Mixer = Callable[[Any, LayerView], tuple[Float[Array, "B T H D"], Any, Any]]
"""(carry, view) -> (attention output, new carry, a pytree to stack over the layers or None)."""


@singledispatch
def embed(model: BaseModel, tokens: Int[Array, "B T"]) -> Float[Array, "B T E"]:
    """Token embeddings, which enter layer 0."""
    x = jnp.take(model.embedding[...], tokens, axis=0)
    scale = model.config.embedding_scale
    return x if scale == 1 else x * jnp.asarray(scale, x.dtype)


@singledispatch
def logits(model: BaseModel, x: Float[Array, "*B E"]) -> Float[Array, "*B V"]:
    """Final norm and unembedding of the residual stream; float32."""
    table = model.embedding if model.unembedding is None else model.unembedding
    y = rms_norm(few_tokens(x), model.final_norm[...], model.config.norm_eps)
    found = jnp.einsum("...e,ve->...v", y, table[...], preferred_element_type=jnp.float32)
    found = soft_cap(
        found if model.config.logit_scale == 1 else found * model.config.logit_scale, model.config.logit_softcap
    )
    return constrain(found, ("batch", "vocab")) if found.ndim == 2 else found


def few_tokens(x: Float[Array, "B *T E"]) -> Float[Array, "B *T E"]:
    """Split the width of x over the mesh where it holds one token a row; return x itself for more tokens.

    x is then split as the weights' rows are: the weights stay where they are, and only small partial sums are
    communicated. With many tokens a row it is cheaper to communicate the weights.
    """
    if x.ndim == 3 and x.shape[1] > 1:
        return x
    return constrain(x, ("whole",) * (x.ndim - 1) + ("width",))


def normed_stream(layer: Layers, x: Float[Array, "B T E"], eps: float) -> Float[Array, "B T E"]:
    """The residual stream under the norm before a layer's attention. A family without that norm has a scale of 1."""
    return rms_norm(x, None if layer.attention_norm is None else layer.attention_norm[...], eps)


def project(config: BaseConfig, layer: Layers, x: Float[Array, "B T E"]) -> tuple[Array, Array, Array]:
    """Queries [B, T, H, D], keys and values [B, T, K, D], after bias and norm and before rotary."""
    h = x if config.norms == "post" else normed_stream(layer, x, config.norm_eps)
    q, k, v = (jnp.einsum("bte,ehd->bthd", h, w[...]) for w in (layer.q, layer.k, layer.v))
    if layer.q_bias is not None:
        q, k, v = (a + b[...][None, None] for a, b in ((q, layer.q_bias), (k, layer.k_bias), (v, layer.v_bias)))
    if layer.q_norm is not None:
        q, k = (head_norm(a, scale[...], config.norm_eps) for a, scale in ((q, layer.q_norm), (k, layer.k_norm)))
    return q, k, v


def add_block(
    config: BaseConfig, x: Float[Array, "B T E"], output: Float[Array, "B T E"], norm: nnx.Param | None
) -> Float[Array, "B T E"]:
    """The residual stream after a block; `norm` is that of the block's output."""
    if norm is not None:
        output = rms_norm(output, norm[...], config.norm_eps)
    return x + (output if config.residual_scale == 1 else output * config.residual_scale)


def mlp(
    config: BaseConfig, layer: Layers, x: Float[Array, "B T E"], stacked: tuple[Layers, Int[Array, ""]] | None = None
) -> Float[Array, "B T E"]:
    """The gated feed-forward block, or the mixture of such blocks, before `add_block`.

    Args:
        stacked: All layers, and the index of this one, so that a decode step reads chosen experts in place.
    """
    h = x if layer.mlp_norm is None else rms_norm(x, layer.mlp_norm[...], config.norm_eps)
    if layer.router is not None or token_axis(x.shape[1]) is None:  # two split dimensions cannot become one
        h = h.reshape(-1, x.shape[-1])  # in two dimensions XLA's CPU backward is twice as fast
    if layer.router is not None:
        return mix_experts(config, layer, h, stacked if x.shape[1] == 1 else None).reshape(x.shape)
    gate, up = h @ layer.gate[...], h @ layer.up[...]
    if layer.gate_bias is not None:
        ones = (1,) * (h.ndim - 1)
        gate, up = gate + layer.gate_bias[...].reshape(*ones, -1), up + layer.up_bias[...].reshape(*ones, -1)
    y = (gated(gate, up, config.activation) @ layer.down[...]).reshape(x.shape)
    return y if layer.down_bias is None else y + layer.down_bias[...][None, None]


@singledispatch
def weights_of(model: BaseModel, layers: Int[Array, "*P"] | int) -> Layers:
    """The parameters of a layer as its view has them; those of several layers are stacked."""
    return jax.tree.map(lambda a: a[layers], model.layers)


@singledispatch
def run_layers(
    model: BaseModel,
    x: Float[Array, "B T E"],
    positions: Int[Array, "B T"],
    mixer: Mixer,
    carry: Any,
    *,
    length: Int[Array, " B"] | None = None,
    near: Int[Array, "B T"] | None = None,
    unroll: bool = False,
) -> tuple[Float[Array, "B T E"], Any, Any]:
    """Scan x through all layers; `mixer` computes the attention of each.

    Args:
        positions: Of the tokens in their documents.
        mixer: (carry, view) -> (attention output, carry, value).
        length: Tokens of each row, as in `rope_angles`. In decoding, those that the cache holds too.
        near: As in `rope_angles`.
        unroll: Whether the program has every layer apart. It compiles longer. The GPU compiler copies the weights of a
            layer out of the stacked arrays in a loop, and reads them in place without one.

    Returns:
        The residual stream after the last layer, the mixer's last carry, and its values stacked over the layers.
    """
    config = model.config
    angles = rope_angles(config, positions, length, near)

    def body(state, scanned):
        x, carry = state
        x = few_tokens(x)
        layer, index = scanned
        q, k_pre, v = project(config, layer, x)
        cos, sin = (a[:, :, None] for a in angles.of(index))
        q, k = rotary(q, cos, sin, config.query_factor), rotary(k_pre, cos, sin)
        view = LayerView(index, layer, x, q, k, k_pre, v, config.attention_softcap)
        mixed, carry, out = mixer(carry, view)
        y = jnp.einsum("bthd,hde->bte", mixed.astype(x.dtype), layer.o[...])
        if layer.o_bias is not None:
            y = y + layer.o_bias[...][None, None]
        x = add_block(config, x, y, layer.attention_output_norm)
        x = add_block(config, x, mlp(config, layer, x, (model.layers, index)), layer.mlp_output_norm)
        return (x, carry), out

    if not unroll:
        (x, carry), outs = jax.lax.scan(body, (x, carry), (model.layers, jnp.arange(config.layers)))
        return x, carry, outs
    layers = (jax.tree.map(operator.itemgetter(index), model.layers) for index in range(config.layers))
    state, outs = run_apart(body, (x, carry), layers)
    return *state, outs


def run_apart(body: Callable[[Any, Any], tuple[Any, Any]], state: Any, layers: Iterable[Any]) -> tuple[Any, Any]:
    """`jax.lax.scan` of body over layers and their indices, where the program has every layer apart.

    An index is a constant: conditions on it are decided while compiling.
    """
    found = []
    for index, layer in enumerate(layers):
        state, out = body(state, (layer, jnp.asarray(index, jnp.int32)))
        found.append(out)
    return state, jax.tree.map(lambda *parts: jnp.stack(parts), *found)


def sliding_windows(config: BaseConfig) -> tuple[int, ...] | None:
    """How many tokens each layer sees, FAR where it does not slide; None where no layer slides."""
    return tuple(config.sliding_window if s else FAR for s in config.sliding) if any(config.sliding) else None


def by_sliding_window(config: BaseConfig, index: Int[Array, ""], attend: Callable[[int | None], Any]) -> Any:
    """Call `attend` with the static sliding window of layer `index` (None where the layer does not slide).

    Where layers differ, `attend` compiles for both and one of the two runs.
    """
    sliding = config.sliding
    if all(sliding) or not any(sliding):
        return attend(config.sliding_window if all(sliding) else None)
    return jax.lax.cond(jnp.asarray(sliding)[index], partial(attend, config.sliding_window), partial(attend, None))


def is_served(config: BaseConfig, index: Int[Array, ""]) -> Bool[Array, ""]:
    """Whether layer `index` is served, `BaseConfig.served` of it."""
    return jnp.asarray(config.served)[index] if config.mixed else index > 0


def by_service(
    config: BaseConfig, index: Int[Array, ""], serve: Callable[[int | None], Any], leave: Callable[[], Any]
) -> Any:
    """Call `serve` with the static sliding window of layer `index` where the layer is served, else `leave`.

    Where layer 0 alone is not served, `serve` is called there too, so that no layer needs a condition. It has to treat
    layer 0 by itself.
    """
    if not config.mixed:
        return by_sliding_window(config, index, serve)
    sliding_window = config.sliding_window if config.serves_windows else None
    return jax.lax.cond(is_served(config, index), partial(serve, sliding_window), leave)


def dense_mixer(config: BaseConfig, segments: Int[Array, "B T"] | None, implementation: str | None = None) -> Mixer:
    """The mixer of full causal attention within each document."""

    def mixer(carry, view):
        def attend(sliding_window):
            how = dict(segments=segments, sliding_window=sliding_window, implementation=implementation)
            return causal_attention(view.q, view.k, view.v, **how, **view.attention_terms)

        return by_sliding_window(config, view.index, attend), carry, None

    return mixer


def forward(
    model: BaseModel,
    tokens: Int[Array, "B T"],
    *,
    positions: Int[Array, "B T"] | None = None,
    segments: Int[Array, "B T"] | None = None,
    implementation: str | None = None,
) -> Float[Array, "B T V"]:
    """Next-token logits of a dense causal pass, float32.

    Args:
        positions: Of the tokens in their documents; default 0 ... T-1.
        segments: The document of each token, 0 for padding; None where each row is one document.
        implementation: As in causal_attention.

    Raises:
        ValueError: T exceeds the model's context.
    """
    check_length(model.config, tokens.shape[1])
    if positions is None:
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32)[None], tokens.shape)
    mixer = dense_mixer(model.config, segments, implementation)
    x, _, _ = run_layers(model, embed(model, tokens), positions, mixer, None)
    return logits(model, x)


def parameter_count(tree: Any) -> int:
    """The number of trained parameters of a module or of its shapes from jax.eval_shape."""
    return sum(leaf.size for leaf in jax.tree.leaves(nnx.state(tree, nnx.Param)))
