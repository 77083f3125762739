"""What every predictor is: producers that look ahead, and per-layer heads that turn their features into scores.

A predictor has N producers. Producer n sits at layer n*P and serves the layers n*P+1 ... (n+1)*P, so the scores of
those layers can be had before they run. Per token:

    captured = predictor.capture(view)                     at layer n*P
    features = predictor.features(trunk n, captured, ...)  once per producer
    q_imp    = predictor.q_imp(head of layer l, features, ...)   [B, T, H, R]
    k_imp    = predictor.k_imp(head of layer l, features, ...)      [B, T, key_heads, R]
    score of cached token j for query t and head h = q_imp[t, h] . k_imp[j] / sqrt(R)

The same methods serve the training pass, the masked simulation and step-by-step decoding. Layer 0 has no scores: it
is always dense (TokenButler, arXiv 2503.07518, section 3).
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
"""(q, k, v each [B,T,H',D']) -> (output, cache): how a trunk with an attention of its own reaches earlier tokens."""


class Context(NamedTuple):
    """Where the tokens stand: positions [B,T] and the base's rotary tables [B,T,rotary_dim/2]."""

    positions: Int[Array, "B T"]
    cos: Float[Array, "B T F"]
    sin: Float[Array, "B T F"]


class Predictor(nnx.Module):
    """Base class. Subclasses set `trunk` (stacked over producers, or None) and `heads` (stacked over layers 1..)."""

    kind: ClassVar[str]
    objective: ClassVar[str] = "cross_entropy"
    learning_rate: ClassVar[float] = 1e-3
    logical_axes: ClassVar[dict[str, tuple[str, ...]]]
    trunk: nnx.Module | None
    heads: nnx.Module

    def __init__(self, base: BaseConfig, config: PredictorConfig):
        if not base.layers > 1:
            raise ValueError(f"a predictor needs a base of at least 2 layers, got {base.layers}")
        self.base = base
        self.config = config
        self.stride = min(config.stride, base.layers - 1)

    @property
    def producers(self) -> int:
        """N: how many layers of the base carry a producer."""
        return -(-(self.base.layers - 1) // self.stride)

    @property
    def key_heads(self) -> int:
        """Heads of the importance keys: K (shared by a group of queries) unless a predictor says otherwise."""
        return self.base.kv_heads

    def context(self, positions: Int[Array, "B T"], length: int) -> Context:
        """Rotary tables at these positions; length as in layers.rope_frequencies."""
        return Context(positions, *rope_angles(self.base, positions, length))

    def capture(self, view: LayerView) -> Float[Array, "B T E"]:
        """What a producer layer hands over; default: the residual stream entering it."""
        return view.x

    def features(
        self,
        trunk: Any,
        captured: Float[Array, "B T E"],
        context: Context,
        attend: Attend,
        dropout: Key[Array, ""] | None,
    ) -> tuple[Any, Any]:
        """Features of one producer and its cache (None where it keeps none); default: the captured stream itself."""
        return captured, None

    def trunk_cache(self, batch: int, capacity: int, dtype: Any) -> Any:
        """Empty cache for a trunk that attends, else None."""
        return None

    def q_imp(self, head: Any, features: Any, view: LayerView, context: Context) -> Float[Array, "B T H R"]:
        """Importance queries of the layer in view."""
        raise TypeError(f"{type(self).__name__} must define q_imp")

    def k_imp(self, head: Any, features: Any, view: LayerView, context: Context) -> Float[Array, "B T Q R"]:
        """Importance keys of the layer in view, Q = key_heads."""
        raise TypeError(f"{type(self).__name__} must define k_imp")

    def initialise(self, model: Any, batches: list[dict]) -> Predictor:
        """The predictor at step 0 for this base; default: as constructed."""
        return self


def at(stacked: Any, index: Int[Array, ""] | int) -> Any:
    """Entry `index` of every leaf of a stacked module."""
    return jax.tree.map(lambda a: jax.lax.dynamic_index_in_dim(a, index, keepdims=False), stacked)


class Schedule(NamedTuple):
    """Which producer serves layer `index`, and whether its block starts or ends there.

    captures: this layer carries a producer of later layers. Layer 0 belongs to no block (`serves` is false).
    """

    serves: Bool[Array, ""]
    producer: Int[Array, ""]
    head: Int[Array, ""]
    starts: Bool[Array, ""]
    ends: Bool[Array, ""]
    captures: Bool[Array, ""]


def schedule(predictor: Predictor, index: Int[Array, ""]) -> Schedule:
    """The place of layer `index` (from 0) in the predictor's blocks."""
    stride, last = predictor.stride, predictor.base.layers - 1
    before = jnp.maximum(index - 1, 0)
    serves = index > 0
    starts = serves & (before % stride == 0)
    ends = serves & ((index % stride == 0) | (index == last))
    return Schedule(serves, before // stride, before, starts, ends, index % stride == 0)


def xavier(key: Key[Array, ""], shape: tuple[int, ...], inputs: int, outputs: int) -> nnx.Param:
    """Xavier-uniform parameter, float32."""
    bound = (6.0 / (inputs + outputs)) ** 0.5
    return nnx.Param(jax.random.uniform(key, shape, jnp.float32, -bound, bound))


def project_heads(x: Float[Array, "B T K D"], weights: Float[Array, "KD R"]) -> Float[Array, "B T K R"]:
    """Every KV head under its own D rows of the weights.

    Heads and inputs are one dimension of the parameter, so that more devices than either has divide it.
    """
    return jnp.einsum("btkd,kdr->btkr", x, weights.reshape(*x.shape[2:], -1).astype(x.dtype))
