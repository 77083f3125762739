"""The interface of a predictor: producers look ahead, and per-layer heads turn their features into scores.

A predictor serves the layers that `BaseConfig.served` names: 1 ... L-1, or those of them that see everything. It
divides them into blocks that span P layers. Each block has one producer, which sits at the layer before its first one.
Where all layers but layer 0 are served, producer n sits at layer n*P and serves the layers n*P+1 ... (n+1)*P. The
queries' side of those layers' scores is therefore known before they run. For every token:

    captured = predictor.capture(view)                         before the block      [B, T, E]
    features = predictor.features(trunk n, captured, ...)      once for the block
    q_imp    = predictor.q_imp(head of layer l, features, ...) at each of its layers [B, T, H, R]
    k_imp    = predictor.k_imp(head of layer l, features, ...) at each of its layers [B, T, Q, R]
    score of cached token j for query t and head h = q_imp[t, h] . k_imp[j, its head of Q] / sqrt(R)

The training pass, the simulation and decoding call the same methods. Layers that are not served have no scores and
are always dense; layer 0 is one of them (TokenButler, arXiv 2503.07518, section 3).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key

from butler_jax.model import BaseConfig, LayerView, RotaryAngles, rope_angles
from butler_jax.predictors.config import PredictorConfig

if TYPE_CHECKING:
    from butler_jax.weights import Base

Attend = Callable[[Array, Array, Array], tuple[Array, Any]]
"""(q, k, v) -> (output, cache), each [B, T, heads, dim]: the attention of a trunk over the tokens so far."""


class Context(NamedTuple):
    """The tokens' positions in their documents, and the base's rotary cosine and sine there."""

    positions: Int[Array, "B T"]
    angles: RotaryAngles


class ServedBlock(NamedTuple):
    """The served layers of a block in order, and the layer that carries their producer."""

    producer: int
    layers: tuple[int, ...]


class Predictor(nnx.Module):
    """Base class of the predictors.

    A subclass sets two attributes in its constructor: `trunk`, a module whose parameters are stacked over the producers
    (None where it has none), and `heads`, a module whose parameters are stacked over the served layers.

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
    def blocks(self) -> tuple[ServedBlock, ...]:
        """The blocks. Each begins at the first served layer beyond the one before, and spans P layers."""
        found: list[ServedBlock] = []
        for layer in self.base.served_layers:
            if found and layer <= found[-1].producer + self.stride:
                found[-1] = ServedBlock(found[-1].producer, (*found[-1].layers, layer))
            else:
                found.append(ServedBlock(layer - 1, (layer,)))
        return tuple(found)

    @property
    def producers(self) -> int:
        """How many layers of the base carry a producer."""
        return len(self.blocks)

    @property
    def members(self) -> Int[np.ndarray, "producers P"]:
        """The layers of each block; one with fewer than the largest repeats its last."""
        blocks = [block.layers for block in self.blocks]
        most = max(map(len, blocks))
        return np.asarray([layers + layers[-1:] * (most - len(layers)) for layers in blocks], np.int32)

    @property
    def key_heads(self) -> int:
        """Q: heads of k_imp. K by default, each shared by a group of query heads."""
        return self.base.kv_heads

    def context(
        self,
        positions: Int[Array, "B T"],
        length: Int[Array, " B"] | int | None = None,
        near: Int[Array, "B T"] | None = None,
    ) -> Context:
        """The context of tokens at these positions; `length` and `near` as in `rope_angles`."""
        return Context(positions, rope_angles(self.base, positions, length, near))

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

    def save_pretrained(
        self, directory: str | Path, base: Base, *, base_id: str | None = None, report: Any = None
    ) -> Path:
        """Write files to hand on: model.safetensors, config.json with the base, and README.md, a model card.

        `load_predictor` reads them. They hold neither the base nor the state of a training.

        Args:
            base: The base that the predictor was trained for. Its name, revision and fingerprint are recorded.
            base_id: The base's id on the hub, where it was loaded from files of another name.
            report: The `Report` of an evaluation: the card shows its results and how the predictor was trained.

        Returns:
            The directory.

        Raises:
            FileExistsError: The directory is that of a run, or has files of these names that are not of a predictor.
            ValueError: The report is about another base, or base_id is no id on the hub.
        """
        from butler_jax.predictors.pretrained import write_pretrained

        return write_pretrained(directory, self, base, base_id=base_id, report=report)

    def push_to_hub(
        self, name: str, base: Base, *, private: bool = False, base_id: str | None = None, report: Any = None
    ) -> str:
        """Send the files of `save_pretrained` to the Hugging Face hub; takes the extra `hub` and a login there.

        Args:
            name: "organisation/name" of the repository, which is made where it is missing.
            private: Whether a new repository is private.

        Returns:
            The address of the commit.

        Raises:
            ImportError: The extra `hub` is missing.
            OSError: The hub refuses them.
        """
        from butler_jax.predictors.pretrained import push_pretrained

        return push_pretrained(name, self, base, private=private, base_id=base_id, report=report)


def at(stacked: Any, index: Int[Array, ""] | int) -> Any:
    """Entry `index` along the leading axis of every leaf."""
    return jax.tree.map(lambda a: jax.lax.dynamic_index_in_dim(a, index, keepdims=False), stacked)


def zeros_of(function: Callable[..., Any], *arguments: Any) -> Any:
    """Zeros in the shapes of what a function would return; arguments as of `jax.eval_shape`."""
    return jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), jax.eval_shape(function, *arguments))


class Schedule(NamedTuple):
    """A layer's place among the blocks of a predictor.

    Attributes:
        serves: Whether the layer belongs to a block, that is, is served.
        producer: Index of the block's producer.
        head: Index of the layer's head.
        place: Index of the layer in its block.
        starts: The layer is the first of its block.
        ends: The layer is the last of its block.
        captures: The layer carries the producer of the next block.
    """

    serves: Bool[Array, "*layers"]
    producer: Int[Array, "*layers"]
    head: Int[Array, "*layers"]
    place: Int[Array, "*layers"]
    starts: Bool[Array, "*layers"]
    ends: Bool[Array, "*layers"]
    captures: Bool[Array, "*layers"]


def schedule(predictor: Predictor, index: Int[Array, "*layers"]) -> Schedule:
    """The place of layer `index` (from 0; or of several layers) among the predictor's blocks.

    Producer, head and place of a layer that is not served mean nothing; they are 0.
    """
    shape = predictor.base.layers
    numbers, flags = np.zeros((3, shape), np.int32), np.zeros((4, shape), bool)
    for producer, block in enumerate(predictor.blocks):
        layers = list(block.layers)
        heads = np.searchsorted(predictor.base.served_layers, layers)
        numbers[:, layers] = np.full(len(layers), producer), heads, np.arange(len(layers))
        flags[0, layers] = flags[1, layers[0]] = flags[2, layers[-1]] = flags[3, block.producer] = True
    numbers, flags = (jnp.asarray(table)[:, index] for table in (numbers, flags))
    return Schedule(flags[0], *numbers, *flags[1:])


def xavier(key: Key[Array, ""], shape: tuple[int, ...], inputs: int, outputs: int) -> nnx.Param:
    """A Xavier-uniform parameter for these numbers of inputs and outputs; float32."""
    bound = (6.0 / (inputs + outputs)) ** 0.5
    return nnx.Param(jax.random.uniform(key, shape, jnp.float32, -bound, bound))


def project_heads(x: Float[Array, "B T K D"], weights: Float[Array, "K*D R"]) -> Float[Array, "B T K R"]:
    """Project every KV head by its own D rows of the weights.

    Heads and inputs share one dimension of the parameter, so that it can be split over more devices than either alone.
    """
    return jnp.einsum("btkd,kdr->btkr", x, weights.reshape(*x.shape[2:], -1).astype(x.dtype))
