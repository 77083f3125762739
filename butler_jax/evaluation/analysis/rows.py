"""What a few query rows see in every layer of one dense pass. Memory is C x S per layer.

The rows of a teacher-forced text are the steps of a dense decoding of that text. The analyses call the last C of them
decode steps.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from butler_jax.data import Batch, cut_windows
from butler_jax.model import (
    BaseConfig,
    BaseModel,
    LayerView,
    by_sliding_window,
    check_length,
    dense_mixer,
    document_starts,
    embed,
    masked_softmax,
    run_layers,
    soft_cap,
)
from butler_jax.policies import Chunk, scaled_products
from butler_jax.predictors import Predictor
from butler_jax.selection import Rows
from butler_jax.simulation import LEAST_KEYS, Importance, importance_walk
from butler_jax.weights import Base


def batch_text(base: Base, text: str, tokens: int | None = None) -> Batch:
    """Make a batch of one row (tokens, segments, positions) of a text, or of its first `tokens` tokens.

    Raises:
        ValueError: The text has fewer than 2 tokens or is beyond the model's context, or the base has no tokenizer.
    """
    ids = base.require_tokenizer().encode(text)[:tokens]
    if len(ids) < 2:
        raise ValueError(f"the text has {len(ids)} tokens; give one of at least 2")
    check_length(base.config, len(ids))
    return cut_windows(ids, context=len(ids))[0]


def last_rows(batch: Batch, count: int) -> Int[np.ndarray, "B C"]:
    """Columns of the last `count` tokens of each sequence without padding, in order.

    Raises:
        ValueError: The last document of a sequence has fewer than count + 31 tokens; the first of the rows must see at
            least LEAST_KEYS keys.
    """
    if count <= 0:
        raise ValueError(f"the number of rows must be at least 1, got {count}")
    found = []
    for segments in np.asarray(batch["segments"]):
        real = np.flatnonzero(segments > 0)
        last = real[segments[real] == segments[real[-1]]] if real.size else real
        needed = count + LEAST_KEYS - 1
        if last.size < needed:
            raise ValueError(
                f"{count} rows need a document of at least {needed} tokens, so that the first of them sees "
                f"{LEAST_KEYS} keys, and one has {last.size}; give a longer text or fewer rows"
            )
        found.append(last[-count:])
    return np.stack(found).astype(np.int32)


def see_rows(
    model: BaseModel,
    predictor: Predictor | None,
    batch: dict[str, Int[Array, "B T"]],
    rows: Int[Array, "B C"],
    look: Callable[[Chunk], Any],
) -> Any:
    """Call look(chunk) in every layer of a dense pass, and stack the results [L, ...]. To be called in jitted code.

    The chunk holds the C query rows of the columns `rows` and all S = T keys. Its predicted scores are None without a
    predictor, and meaningless in layer 0.
    """
    base, segments = model.config, batch["segments"]
    x = embed(model, batch["tokens"])
    dense = dense_mixer(base, segments)
    begun, step = importance_walk(predictor, x, batch)

    def mixer(state, view):
        state, importance = step(state, view)

        def at(sliding_window):
            return look(row_chunk(view, importance, segments, rows, sliding_window))

        return dense(None, view)[0], state, by_sliding_window(base, view.index, at)

    return run_layers(model, x, batch["positions"], mixer, begun)[2]


def row_chunk(
    view: LayerView,
    importance: Importance | None,
    segments: Int[Array, "B T"],
    rows: Int[Array, "B C"],
    sliding_window: int | None,
) -> Chunk:
    """The query rows of the given columns with all keys of the sequence, as policies take them."""
    kv_heads = view.k.shape[2]

    def queries(x):
        x = jnp.take_along_axis(x, rows[:, :, None, None], axis=1)
        return jnp.moveaxis(x.reshape(*x.shape[:2], kv_heads, -1, x.shape[-1]), 1, 3)

    def scores(q, k):
        return scaled_products(q, jnp.moveaxis(k, 1, 2))

    q = queries(view.q)
    predicted = offset = None
    if importance is not None:
        predicted = scores(queries(importance[0]), importance[1])
        offset = None if importance[2] is None else queries(importance[2][..., None])
    columns = jnp.arange(segments.shape[1], dtype=jnp.int32)
    starts = document_starts(segments)
    start = jnp.take_along_axis(starts, rows, axis=1)
    return Chunk(
        layer=view.index,
        weights=view.weights,
        x=jnp.take_along_axis(view.x, rows[..., None], axis=1),
        q=q * jnp.asarray(q.shape[-1] ** -0.5, q.dtype),
        k=jnp.moveaxis(view.k, 1, 2),
        v=jnp.moveaxis(view.v, 1, 2),
        logits=soft_cap(scores(q, view.k), view.softcap),
        predicted=predicted,
        offset=offset,
        rows=Rows(rows, start),
        columns=columns,
        allowed=visible(segments, rows, columns, sliding_window),
        starts=starts,
    )


def visible(
    segments: Int[Array, "B T"], rows: Int[Array, "B C"], columns: Int[Array, " T"], sliding_window: int | None
) -> Bool[Array, "B C T"]:
    """The keys that a row may see: those of its document up to itself, inside the sliding window if there is one."""
    own = jnp.take_along_axis(segments, rows, axis=1)
    seen = (columns[None, None] <= rows[:, :, None]) & (segments[:, None] == own[:, :, None])
    return seen if sliding_window is None else seen & (columns[None, None] > (rows - sliding_window)[:, :, None])


def softmax(
    scores: Float[Array, "B K G C S"],
    keys: Bool[Array, "B C S"],
    sink_logits: Float[Array, "1 K G 1 1"] | None = None,
) -> Float[Array, "B K G C S"]:
    """Weights over the given keys of each row and, where it is given, the head's sink; 0 elsewhere."""
    return masked_softmax(scores, keys[:, None, None], sink_logits)


def of_served(base: BaseConfig, found: Float[np.ndarray, "*_"], axis: int = 1) -> Float[np.ndarray, "*_"]:
    """What was found in every layer of the axis, NaN where a layer other than layer 0 is not served."""
    if not base.mixed:
        return found
    left = [layer for layer in range(1, base.layers) if not base.served[layer]]
    found = np.array(found)
    np.moveaxis(found, axis, 0)[left] = np.nan
    return found


def by_heads(stacked: Array) -> np.ndarray:
    """Reorder [L, B, K, G, ...], as a pass stacks it, to numpy [B, L, H, ...]."""
    found = np.asarray(stacked)
    layers, batch, kv_heads, group = found.shape[:4]
    return np.swapaxes(found.reshape(layers, batch, kv_heads * group, *found.shape[4:]), 0, 1)
