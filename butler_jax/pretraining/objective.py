"""The objective of pretraining: the cross entropy of the next token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, Key

from butler_jax.model import BaseModel, forward


def next_token_loss(
    model: BaseModel, batch: dict[str, Int[Array, "B T"]], implementation: str | None = None
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Summed cross entropy in nats of every token after the first of its document, and their number."""
    tokens, segments = batch["tokens"], batch["segments"]
    logits = forward(
        model,
        tokens,
        positions=batch["positions"],
        segments=segments,
        implementation=implementation,
    )[:, :-1]
    counted = ((segments[:, 1:] == segments[:, :-1]) & (segments[:, 1:] > 0)).astype(jnp.float32)
    chosen = jnp.take_along_axis(logits, tokens[:, 1:, None], axis=-1)[..., 0]
    return jnp.sum((jax.nn.logsumexp(logits, axis=-1) - chosen) * counted), counted.sum()


@dataclass(frozen=True)
class PretrainingObjective:
    """`next_token_loss` of a model whose parameters are computed with in `dtype`."""

    dtype: str
    implementation: str | None = None

    def differentiate(
        self, model: BaseModel, _: None, batch: dict[str, Int[Array, "B T"]], key: Key[Array, ""] | None = None
    ) -> tuple[Float[Array, ""], Float[Array, ""], Any]:
        """The summed loss, its count and the gradient of the sum; there is no frozen model and no dropout."""
        graph, parameters, rest = nnx.split(model, nnx.Param, ...)

        def loss(parameters):
            computed = jax.tree.map(lambda a: a.astype(self.dtype), parameters)
            return next_token_loss(nnx.merge(graph, computed, rest), batch, self.implementation)

        (total, count), gradients = jax.value_and_grad(loss, has_aux=True)(parameters)
        return total, count, gradients
