"""Where the error in the residual stream sits: by layer, head and token, beside the attention weights.

The error of a token is what the stream changes, relative to its norm, where a query head does not read the token
(`butler_jax.policies.residual`).
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float

from butler_jax.data import Batch, as_batch
from butler_jax.evaluation.analysis.rows import by_heads, last_rows, of_served, see_rows, softmax
from butler_jax.model import BaseModel, check_length
from butler_jax.policies import OracleResidual
from butler_jax.selection import select_best

By = Literal["weight", "error", "tolerance"]


class Errors(NamedTuple):
    """Attention weights and errors of the last C rows of each sequence, in a dense pass; 0 for keys not seen.

    Attributes:
        weights: The attention weight of every key.
        errors: Its error; NaN in layers after the first that are not served.
        seen: Which keys a row sees.
    """

    weights: Float[np.ndarray, "B L H C T"]
    errors: Float[np.ndarray, "B L H C T"]
    seen: Bool[np.ndarray, "B L H C T"]

    def read(self, share: float, by: By) -> Bool[np.ndarray, "B layers H C T"]:
        """The keys that rows read in the layers from 1 on, each query head by itself.

        Args:
            share: Of the keys that a row sees, rounded up.
            by: "weight" and "error" read the keys of largest weight or error in every head. "tolerance" reads those of
                largest error over all heads and layers of a row, as many in all.
        """
        values = (self.weights if by == "weight" else self.errors)[:, 1:]
        keys = self.seen[:, 1:] & ~np.isnan(values)  # errors of layers that are not served
        counts = np.ceil(share * np.count_nonzero(keys, axis=-1)).astype(np.int32)
        if by != "tolerance":
            return np.asarray(_select(values, keys, counts))
        values, keys, counts = (np.moveaxis(a, 3, 1) for a in (values, keys, counts))  # [B, C, layers, H, ...]
        rows = values.shape[:2]
        chosen = _select(values.reshape(*rows, -1), keys.reshape(*rows, -1), counts.sum(axis=(2, 3), dtype=np.int32))
        return np.moveaxis(np.asarray(chosen).reshape(values.shape), 1, 3)

    def left(self, share: float, by: By) -> Float[np.ndarray, "layers H"]:
        """The errors of the keys that are not read, summed over the keys: mean over rows and sequences.

        share and by: as in `read`.
        """
        unread = np.where(self.read(share, by), 0.0, self.errors[:, 1:])
        return unread.sum(axis=-1).mean(axis=(0, 3))

    def share_read(self, share: float, by: By) -> Float[np.ndarray, "layers H"]:
        """The share of the keys that is read, mean over rows and sequences. share and by: as in `read`."""
        read, seen = self.read(share, by), self.seen[:, 1:]
        return (read.sum(axis=-1) / seen.sum(axis=-1)).mean(axis=(0, 3))


def measure_errors(model: BaseModel, batch: Batch, *, rows: int = 50) -> Errors:
    """Measure the attention weights and the centred errors of the last rows of each sequence.

    Args:
        batch: tokens, segments, positions [B, T].
        rows: How many rows, C. The result is B x L x H x C x T.

    Raises:
        ValueError: As `last_rows` does, and where the batch is longer than the model's context.
    """
    check_length(model.config, batch["tokens"].shape[1])
    found = _measure(model, as_batch(batch), jnp.asarray(last_rows(batch, rows)))
    weights, errors, seen = map(by_heads, found)
    return Errors(weights, of_served(model.config, errors), seen)


@jax.jit
def _measure(model, batch, rows):
    def look(chunk):
        weights = softmax(chunk.logits, chunk.allowed, chunk.sink_logits)
        errors = jnp.where(chunk.allowed[:, None, None], jnp.exp(OracleResidual().scores(chunk)), 0.0)
        return tuple(jnp.broadcast_to(a, weights.shape) for a in (weights, errors, chunk.allowed[:, None, None]))

    return see_rows(model, None, batch, rows, look)


_select = jax.jit(select_best)
