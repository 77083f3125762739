"""Loki (Singhania et al. 2024, arXiv 2406.02542): q . k in the first principal directions of the keys."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from butler_jax.data import as_batch, require_batches
from butler_jax.model import BaseModel, dense_mixer, embed, require_model, run_layers
from butler_jax.parallel import on_host
from butler_jax.policies.scoring import Chunk, Scoring
from butler_jax.storage import settle_types


@dataclass(frozen=True, kw_only=True, eq=False)
class LowRank(Scoring):
    """Scores by q . k in the first `rank` principal directions of the keys after rotary, which are found on text.

    Attributes:
        rank: Number of directions; None takes a quarter of the head dimension, as published.
        directions: The directions [L, K, D, rank], from `prepare`.
    """

    name = "lowrank"
    estimates_logits = True
    rank: int | None = None
    directions: np.ndarray | None = None

    def __post_init__(self):
        settle_types(self)

    __eq__ = object.__eq__  # compiled once for each set of directions
    __hash__ = object.__hash__

    def prepare(self, model: BaseModel, batches: Sequence[dict[str, np.ndarray]]) -> LowRank:
        """The policy with the principal directions of the keys of a text.

        Raises:
            ValueError: The rank exceeds the head dimension, or there are no batches, or they are no list.
        """
        require_model(model)
        require_batches(batches)
        dim = model.config.head_dim
        rank = dim // 4 if self.rank is None else self.rank
        if rank < 1 or rank > dim:
            raise ValueError(f"the rank of lowrank must be 1 ... {dim}, the head dimension, got {rank}")
        sums = None
        for batch in batches:
            part = key_moments(model, as_batch(batch))
            sums = part if sums is None else jax.tree.map(jnp.add, sums, part)
        if sums is None:
            raise ValueError("lowrank finds its directions on text: give at least one batch")
        products, mean, count = (on_host(a).astype(np.float64) for a in sums)
        mean = mean / count
        covariance = products / count - mean[..., :, None] * mean[..., None, :]
        directions = np.linalg.eigh(covariance)[1][..., ::-1][..., :rank]  # largest first
        return dataclasses.replace(self, rank=rank, directions=directions.astype(np.float32))

    def numbers_read_per_key(self, base, predictor):
        """The rank: keys are stored in their principal directions, and the first coordinates are read."""
        return float(base.head_dim // 4 if self.rank is None else self.rank)

    def scores(self, chunk: Chunk):
        """q . k in the first directions, per query head."""
        if self.directions is None:
            raise ValueError("lowrank has no directions yet; use what prepare(model, batches) gives")
        basis = jnp.asarray(self.directions)[chunk.layer]
        exact = dict(preferred_element_type=jnp.float32, precision="highest")
        q = jnp.einsum("bkgcd,kdr->bkgcr", chunk.q.astype(jnp.float32), basis, **exact)
        k = jnp.einsum("bksd,kdr->bksr", chunk.k.astype(jnp.float32), basis, **exact)
        return jnp.einsum("bkgcr,bksr->bkgcs", q, k, **exact)


@jax.jit
def key_moments(
    model: BaseModel, batch: dict[str, Int[Array, "B T"]]
) -> tuple[Float[Array, "L K D D"], Float[Array, "L K D"], Float[Array, ""]]:
    """The sums of k k^T, k and 1 over all tokens that are not padding."""
    dense = dense_mixer(model.config, batch["segments"])
    real = (batch["segments"] > 0).astype(jnp.float32)

    def mixer(state, view):
        keys = view.k.astype(jnp.float32) * real[..., None, None]
        products = jnp.einsum("btkd,btke->kde", keys, keys, precision="highest")
        return dense(None, view)[0], state, (products, jnp.sum(keys, axis=(0, 1)))

    x = embed(model, batch["tokens"])
    _, _, (products, sums) = run_layers(model, x, batch["positions"], mixer, None)
    return products, sums, jnp.sum(real)
