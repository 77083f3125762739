"""Attention over a part of the keys of a row, to be merged with attention over other parts in one softmax."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from butler_jax.model.attention import LOWEST


class PartialAttention(NamedTuple):
    """The output over some of the keys, and the log-sum-exp of their logits, -inf where there is none of them."""

    output: Float[Array, "*B D"]
    lse: Float[Array, "*B"]

    @classmethod
    def of_sums(
        cls, top: Float[Array, "*B"], total: Float[Array, "*B"], sums: Float[Array, "*B D"]
    ) -> PartialAttention:
        """From sums over the keys: of weights exp(logit - top), and of values so weighted."""
        held = total > 0
        total = jnp.where(held, total, 1.0)
        return cls(sums / total[..., None], jnp.where(held, top + jnp.log(total), -jnp.inf))

    def merge(self, other: PartialAttention) -> PartialAttention:
        """Attention over both sets of keys, float32."""
        top = jnp.maximum(jnp.maximum(self.lse, other.lse), LOWEST)
        own, others = jnp.exp(self.lse - top), jnp.exp(other.lse - top)
        total = own + others
        held = total > 0
        share = jnp.where(held, 1.0 / jnp.where(held, total, 1.0), 0.0)
        output = self.output.astype(jnp.float32) * (own * share)[..., None] + other.output * (others * share)[..., None]
        return PartialAttention(output, jnp.where(held, top + jnp.log(total), -jnp.inf))
