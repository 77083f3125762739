"""The distillation objective: a predictor's loss and its gradient, in one pass through the frozen base.

The base is never differentiated, so the gradient of a layer's loss reaches only that layer's head and the features of
its producer. Both are taken inside the scan over layers, where q and k already are. Nothing is stacked over layers but
the gradients themselves.

From a batch to the loss:

    DistillationObjective.differentiate        embeds the batch and begins the predictor's walk
    model.run_layers                           scans the layers
    LayerGradients.mix                         per layer: advances the walk, adds up losses and gradients
    LayerGradients.differentiate               value_and_grad of layer_loss: q_imp, k_imp and the loss from them
    model.by_service                           compiles for the sliding window of the served layers, and dense ones
    LayerGradients.attend                      calls the loss that the settings name
    attend_with_cross_entropy                  run_fused, run_two_calls or run_flash: the gradient in closed form
    attend_with_squared_error                  causal_attention, and sum_squared_errors
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, Key

from butler_jax.model import (
    BaseModel,
    LayerView,
    by_service,
    causal_attention,
    dense_mixer,
    document_places,
    embed,
    output_gram,
    output_projection,
    run_layers,
)
from butler_jax.predictors import Context, Predictor, at, predictor_class, walk
from butler_jax.training.config import TrainConfig
from butler_jax.training.losses import (
    ErrorRule,
    ErrorTarget,
    FarKeys,
    attend_with_cross_entropy,
    attend_with_squared_error,
)
from butler_jax.training.stretching import find_far_keys

LOSSES = ("cross_entropy", "squared_error")


@dataclass(frozen=True)
class DistillationObjective:
    """What a predictor is trained for.

    Attributes:
        loss: One of LOSSES.
        sinks, recent: Tokens that are always read; the cross entropy is about the other ones.
        implementation: Of the attention, as in `model.causal_attention`.
        chosen: The budget of the second stage, as in `attend_with_cross_entropy`.
    """

    loss: str
    sinks: int = 0
    recent: int = 0
    implementation: str | None = None
    chosen: int | float | None = None

    def __post_init__(self):
        if self.loss == "squared_error" and self.chosen is not None:
            raise ValueError("--chosen is about the cross entropy; give --objective cross_entropy, or leave it out")
        if self.loss not in LOSSES:
            raise ValueError(f"unknown objective {self.loss!r}; known: {', '.join(LOSSES)}")

    @classmethod
    def from_config(cls, config: TrainConfig) -> DistillationObjective:
        """The objective of these settings."""
        loss = config.objective or predictor_class(config.predictor.kind).objective
        always = dict(sinks=config.selection.sinks, recent=config.selection.recent)
        return cls(loss, **always, implementation=config.attention, chosen=config.chosen)

    def differentiate(
        self,
        predictor: Predictor,
        model: BaseModel,
        batch: dict[str, Int[Array, "B T"]],
        dropout: Key[Array, ""] | None = None,
    ) -> tuple[Float[Array, ""], Float[Array, ""], Any]:
        """The summed loss, its count and the gradient of the sum.

        Args:
            batch: tokens, segments and positions [B, T] as `read_batches` gives them.

        Returns:
            The loss, summed over rows and heads (cross entropy, in nats) or over pairs and heads (squared error) and
            averaged over the served layers; the number of these terms; and the gradient, in the shape of
            nnx.state(predictor, nnx.Param). Divide loss and gradient by the count.
        """
        positions, segments = batch["positions"], batch["segments"]
        near = document_places(segments)
        context = predictor.context(positions, near=near)
        far = find_far_keys(positions, segments)
        layers = LayerGradients(self, predictor, model, segments, context, far, dropout)
        x = embed(model, batch["tokens"])
        first = walk.begin(predictor, x, context)
        zeros = jax.tree.map(jnp.zeros_like, predictor.trunk)
        start = PassState(first, first.features, zeros, jnp.zeros(()), jnp.zeros(()))
        _, end, heads = run_layers(model, x, positions, layers.mix, start, near=near)
        as_heads = partial(_as_heads, layers=np.asarray(model.config.served_layers))
        gradients = jax.tree.map(as_heads, heads, nnx.state(predictor.heads, nnx.Param)), end.trunk_gradients
        structure = jax.tree.structure(nnx.state(predictor, nnx.Param))
        return end.loss, end.count, jax.tree.unflatten(structure, jax.tree.leaves(gradients))


class PassState(NamedTuple):
    """What the scan over layers carries: the predictor's walk, its gradients so far, and the sums of the loss."""

    walk: walk.Walk
    feature_gradients: Any
    trunk_gradients: Any
    loss: Float[Array, ""]
    count: Float[Array, ""]


@dataclass(frozen=True, eq=False)
class LayerGradients:
    """The pass at one layer: it attends as the base does, and takes the gradient of the layer's loss."""

    objective: DistillationObjective
    predictor: Predictor
    model: BaseModel
    segments: Int[Array, "B T"]
    context: Context
    far: FarKeys
    dropout: Key[Array, ""] | None

    def mix(self, state: PassState, view: LayerView) -> tuple[Float[Array, "B T H D"], PassState, Any]:
        """The mixer of `run_layers`: attention output, state after this layer, and the gradient of its head."""
        step = walk.advance(self.predictor, state.walk, view, self.context, self.attend_in_trunk, self.dropout)
        (loss, (output, count)), gradients = self.differentiate(step, view)
        of_features, of_trunk = state.feature_gradients, state.trunk_gradients
        if self.predictor.trunk is not None:
            of_features = jax.tree.map(
                lambda old, new: jnp.where(step.place.starts, 0, old) + new, of_features, gradients[1]
            )
            of_trunk = jax.lax.cond(
                step.place.ends,
                lambda: self.pull_back(step.place.producer, state.walk.captured, of_features, of_trunk),
                lambda: state.trunk_gradients,
            )
        after = PassState(step.state, of_features, of_trunk, state.loss + loss, state.count + count)
        return output, after, gradients[0]

    def differentiate(self, step: walk.WalkStep, view: LayerView) -> tuple[Any, Any]:
        """((loss, (output, count)), gradients of the head's parameters and, with a trunk, of its features)."""
        graph, weights, constants = nnx.split(step.head, nnx.Param, ...)
        config = self.model.config
        serves = step.place.serves.astype(jnp.float32) / len(config.served_layers)

        def layer_loss(weights, features):
            head = nnx.merge(graph, weights, constants)

            def serve(sliding_window):
                q_imp = self.predictor.q_imp(head, features, view, self.context)
                k_imp = self.predictor.k_imp(head, features, view, self.context)
                offset = self.predictor.offset(head, features, view, self.context)
                return self.attend(view, q_imp, k_imp, offset, sliding_window)

            def leave():
                output = dense_mixer(config, self.segments, self.objective.implementation)(None, view)[0]
                return output.astype(view.q.dtype), jnp.zeros(()), jnp.zeros(())

            output, loss, count = by_service(config, view.index, serve, leave)
            return loss * serves, (output, count * serves)

        # Without a trunk the features are the frozen stream itself.
        wanted = (0,) if self.predictor.trunk is None else (0, 1)
        return jax.value_and_grad(layer_loss, wanted, has_aux=True)(weights, step.features)

    def attend(self, view: LayerView, q_imp: Array, k_imp: Array, offset: Array | None, sliding_window: int | None):
        """Output, loss and count of the layer in view."""
        arrays = (view.q, view.k, view.v, q_imp, k_imp)
        own = self.objective
        options = {"segments": self.segments, "sliding_window": sliding_window, "implementation": own.implementation}
        options |= view.attention_terms
        if own.loss == "squared_error":
            return attend_with_squared_error(*arrays, **options)
        if offset is not None:
            norm = jnp.linalg.norm(view.x.astype(jnp.float32), axis=-1)
            gram = output_gram(output_projection(view.weights), view.k.shape[2])
            options["target"] = ErrorTarget(gram, norm, offset, self.far)
            options["rule"] = ErrorRule(
                self.predictor.config.target, normalised=self.predictor.config.offset == "share"
            )
        return attend_with_cross_entropy(*arrays, sinks=own.sinks, recent=own.recent, chosen=own.chosen, **options)

    def attend_in_trunk(self, _, q: Array, k: Array, v: Array) -> tuple[Array, None]:
        """The attention of a producer's trunk; it keeps no cache."""
        return causal_attention(q, k, v, segments=self.segments, implementation=self.objective.implementation), None

    def pull_back(self, producer: Int[Array, ""], captured: Array, of_features: Any, of_trunk: Any) -> Any:
        """The trunk gradients with this producer's, which follow from its features' summed over its block."""

        def features(trunk):
            attend = partial(self.attend_in_trunk, None)
            return self.predictor.features(trunk, captured, self.context, attend, self.dropout)[0]

        _, pull = jax.vjp(features, at(self.predictor.trunk, producer))
        return jax.tree.map(lambda all_, one: all_.at[producer].set(one), of_trunk, pull(of_features)[0])


def _as_heads(gradient: Array, parameter: Array, layers: Int[np.ndarray, " layers"]) -> Array:
    """Gradients stacked over all layers in the shape of the heads of the served ones; unused heads get zeros."""
    gradient = gradient[layers]
    missing = parameter.shape[0] - gradient.shape[0]
    return jnp.pad(gradient, [(0, missing)] + [(0, 0)] * (gradient.ndim - 1))
