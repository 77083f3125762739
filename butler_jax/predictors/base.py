"""The interface of a predictor: producers look ahead, and per-layer heads turn their features into scores.

A predictor divides the layers 1 ... L-1 into blocks of P layers. Each block has one producer, which sits at the layer
before it: producer n at layer n*P serves the layers n*P+1 ... (n+1)*P. The queries' side of those layers' scores is
therefore known before they run. For every token:

    captured = predictor.capture(view)                         at layer n*P          [B, T, E]
    features = predictor.features(trunk n, captured, ...)      once for the block
    q_imp    = predictor.q_imp(head of layer l, features, ...) at each of its layers [B, T, H, R]
    k_imp    = predictor.k_imp(head of layer l, features, ...) at each of its layers [B, T, Q, R]
    score of cached token j for query t and head h = q_imp[t, h] . k_imp[j, its head of Q] / sqrt(R)

The training pass, the simulation and decoding call the same methods. Layer 0 has no scores and is always dense
(TokenButler, arXiv 2503.07518, section 3).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key

from butler_jax.model import BaseConfig, LayerView, rope_angles
from butler_jax.predictors.config import PredictorConfig

Attend = Callable[[Array, Array, Array], tuple[Array, Any]]
"""(q, k, v) -> (output, cache), each [B, T, heads, dim]: the attention of a trunk over the tokens so far."""


class Context(NamedTuple):
    """The tokens' positions in their documents, and the base's rotary cosine and sine there (F = rotary_dim/2)."""

    positions: Int[Array, "B T"]
    cos: Float[Array, "B T F"]
    sin: Float[Array, "B T F"]


class Predictor(nnx.Module):
    """Base class of the predictors.

    A subclass sets two attributes in its constructor: `trunk`, a module whose parameters are stacked over the producers
    (None where it has none), and `heads`, a module whose parameters are stacked over the layers 1 ... L-1.

    Attributes:
        kind: The name in PredictorConfig and PREDICTORS.
        objective: The default loss of distillation.
        learning_rate: The default peak learning rate.
        logical_axes: The logical axes of every parameter by name, for sharding.
    """

    kind: ClassVar[str]
    objective: ClassVar[str] = "cross_entropy"
    learning_rate: ClassVar[float] = 1e-3
    logical_axes: ClassVar[dict[str, tuple[str, ...]]]
    trunk: nnx.Module | None
    heads: nnx.Module

    def __init__(self, base: BaseConfig, config: PredictorConfig):
        if base.layers < 2:
            raise ValueError(f"a predictor needs a base of at least 2 layers, got {base.layers}")
        self.base = base
        self.config = config
        self.stride = min(config.stride, base.layers - 1)

    @property
    def producers(self) -> int:
        """How many layers of the base carry a producer."""
        return -(-(self.base.layers - 1) // self.stride)

    @property
    def key_heads(self) -> int:
        """Q: heads of k_imp. K by default, each shared by a group of query heads."""
        return self.base.kv_heads

    def context(self, positions: Int[Array, "B T"], length: Int[Array, " B"] | int | None = None) -> Context:
        """The context of tokens at these positions; `length` as in `rope_angles`."""
        return Context(positions, *rope_angles(self.base, positions, length))

    def capture(self, view: LayerView) -> Float[Array, "B T E"]:
        """What a producer reads at its layer. Default: the residual stream that enters the layer."""
        return view.x

    def features(
        self,
        trunk: Any,
        captured: Float[Array, "B T E"],
        context: Context,
        attend: Attend,
        dropout: Key[Array, ""] | None,
    ) -> tuple[Any, Any]:
        """Features of one producer. Default: the captured stream itself.

        Args:
            trunk: The producer's parameters, an entry of `self.trunk`.
            captured: What `capture` returned at the producer's layer.
            attend: The trunk's attention over the tokens so far, for a trunk that has one.

        Returns:
            The features, any pytree of arrays [B, T, ...], and the cache that `attend` returned (None without a cache).
        """
        return captured, None

    def trunk_cache(self, batch: int, capacity: int, dtype: Any) -> Any:
        """The empty cache of one producer's attention for `capacity` tokens a row; None where the trunk has none."""
        return None

    def q_imp(self, head: Any, features: Any, view: LayerView, context: Context) -> Float[Array, "B T H R"]:
        """Queries of the predictor at the layer in view; `head` is that layer's entry of `self.heads`."""
        raise TypeError(f"{type(self).__name__} must define q_imp")

    def k_imp(self, head: Any, features: Any, view: LayerView, context: Context) -> Float[Array, "B T Q R"]:
        """Keys of the predictor at the layer in view; Q = key_heads."""
        raise TypeError(f"{type(self).__name__} must define k_imp")

    def offset(self, head: Any, features: Any, view: LayerView, context: Context) -> Float[Array, "B T H"] | None:
        """What makes the scores of a row and query head logarithms of errors; None where the config has no offset."""
        if self.config.offset == "none":
            return None
        raise TypeError(f"{type(self).__name__} has no offset; leave it out, or take the lookahead predictor")

    def initialise(self, model: Any, batches: list[dict]) -> Predictor:
        """The predictor before the first training step on this base. Default: as constructed.

        Args:
            batches: calibration text; dictionaries with "tokens", "segments" and "positions", int32 [B, T].
        """
        return self


def at(stacked: Any, index: Int[Array, ""] | int) -> Any:
    """Entry `index` along the leading axis of every leaf."""
    return jax.tree.map(lambda a: jax.lax.dynamic_index_in_dim(a, index, keepdims=False), stacked)


class Schedule(NamedTuple):
    """A layer's place among the blocks of a predictor.

    Attributes:
        serves: Whether the layer belongs to a block; false for layer 0 alone.
        producer: Index of the block's producer.
        head: Index of the layer's head.
        starts: The layer is the first of its block.
        ends: The layer is the last of its block.
        captures: The layer carries the producer of the next block.
    """

    serves: Bool[Array, "*layers"]
    producer: Int[Array, "*layers"]
    head: Int[Array, "*layers"]
    starts: Bool[Array, "*layers"]
    ends: Bool[Array, "*layers"]
    captures: Bool[Array, "*layers"]


def schedule(predictor: Predictor, index: Int[Array, "*layers"]) -> Schedule:
    """The place of layer `index` (from 0; or of several layers) among the predictor's blocks."""
    stride, last = predictor.stride, predictor.base.layers - 1
    before = jnp.maximum(index - 1, 0)
    serves = index > 0
    starts = serves & (before % stride == 0)
    ends = serves & ((index % stride == 0) | (index == last))
    return Schedule(serves, before // stride, before, starts, ends, index % stride == 0)


def xavier(key: Key[Array, ""], shape: tuple[int, ...], inputs: int, outputs: int) -> nnx.Param:
    """A Xavier-uniform parameter for these numbers of inputs and outputs; float32."""
    bound = (6.0 / (inputs + outputs)) ** 0.5
    return nnx.Param(jax.random.uniform(key, shape, jnp.float32, -bound, bound))


def project_heads(x: Float[Array, "B T K D"], weights: Float[Array, "K*D R"]) -> Float[Array, "B T K R"]:
    """Project every KV head by its own D rows of the weights.

    Heads and inputs share one dimension of the parameter, so that it can be split over more devices than either alone.
    """
    return jnp.einsum("btkd,kdr->btkr", x, weights.reshape(*x.shape[2:], -1).astype(x.dtype))
