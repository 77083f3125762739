"""A layer's queries in chunks of rows, with everything that policies use. Memory is linear in the length.

The predictor's q_imp and k_imp come from `importance_walk`, layer by layer during the pass of the base.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from butler_jax.decoding import check_score_dtype, rounded
from butler_jax.model import (
    CHUNK,
    Band,
    BaseModel,
    LayerView,
    by_service,
    causal_attention,
    chunk_mask,
    dense_mixer,
    document_starts,
    make_bands,
    merge_groups,
    run_layers,
    soft_cap,
    split_groups,
    split_keys,
)
from butler_jax.policies import Chunk, scaled_products
from butler_jax.predictors import Predictor, walk, zeros_of
from butler_jax.selection import Rows
from butler_jax.simulation.prompts import ReadPrompts, attend_last
from butler_jax.simulation.sharding import (
    embed_split,
    split_chunks,
    split_heads,
    split_keys_whole,
    split_scores,
    split_text,
    split_view,
)
from butler_jax.storage import whole

LEAST = 4  # chunks of a band, twice as many where few rows run: each band is compiled by itself, which takes long
Importance = tuple[Float[Array, "B T H R"], Float[Array, "B S Q R"], Float[Array, "B T H"] | None]
Step = Callable[[Any, LayerView], tuple[Any, Importance | None]]


def map_chunks(
    apply: Callable[[Chunk], Any],
    view: LayerView,
    importance: Importance | None,
    segments: Int[Array, "B S"],
    sliding_window: int | None,
    rows: int | None = None,
    first: int = 0,
) -> Any:
    """Call a function on the chunks of query rows of a layer.

    Args:
        view: The layer, with queries of all tokens or of the last ones, and keys and values of all.
        importance: (q_imp, k_imp, offset), with k_imp per KV head or per query head; None without a predictor.
        sliding_window: Of the layer, in tokens, static; None without one.
        rows: About how many query rows to take, in chunks spread evenly along the sequence; None takes all.
        first: The first of the rows over which chunks are spread.

    Returns:
        The results, stacked [chunks, ...].
    """
    length = view.q.shape[1]
    size, before = min(CHUNK, length), segments.shape[1] - length
    kv_heads = view.k.shape[2]
    view = split_view(view)

    def pad(a):
        """T or S in whole chunks."""
        return jnp.pad(a, ((0, 0), (0, -length % size)) + ((0, 0),) * (a.ndim - 2))

    def keys_of(a):
        return split_keys_whole(split_keys(pad(a), 1))

    x = pad(view.x)
    queries = split_rows(view.q, kv_heads, size)
    keys, values = keys_of(view.k), keys_of(view.v)
    starts, segments = pad(document_starts(segments)), pad(segments)
    if importance is not None:
        q_imp, k_imp, offset = importance
        offset = None if offset is None else split_rows(offset[..., None], kv_heads, size)
        importance = split_rows(q_imp, kv_heads, size), keys_of(k_imp), offset

    def one(band, number):
        first = band.first_key(number, size)
        q, k = queries[number], band.take(keys, first, 2)
        predicted = offset = None
        if importance is not None:
            predicted = split_scores(scaled_products(importance[0][number], band.take(importance[1], first, 2)))
            if importance[2] is not None:
                offset = importance[2][number]
        row = before + number * size
        start = jax.lax.dynamic_slice_in_dim(starts, row, size, axis=1)
        own = jnp.broadcast_to((row + jnp.arange(size, dtype=jnp.int32))[None], start.shape)
        chunk = Chunk(
            layer=view.index,
            weights=view.weights,
            x=jax.lax.dynamic_slice_in_dim(x, number * size, size, axis=1),
            q=q * jnp.asarray(q.shape[-1] ** -0.5, q.dtype),
            k=k,
            v=band.take(values, first, 2),
            logits=soft_cap(split_scores(scaled_products(q, k)), view.softcap),
            predicted=predicted,
            offset=offset,
            rows=Rows(own, start),
            columns=first + jnp.arange(band.keys, dtype=jnp.int32),
            allowed=chunk_mask(number, first, band.keys, segments, sliding_window, size, before=before),
            starts=band.take(starts, first, 1),
        )
        return apply(chunk)

    parts = []
    chosen = spread(length, rows, first)
    chunks = x.shape[1] // size
    if before:
        bands = [Band(0, chunks, segments.shape[1], False)]
    else:
        bands = make_bands(chunks, size, sliding_window, LEAST if rows is None else 2 * LEAST)
    for band in bands:
        numbers = [n for n in range(band.start, band.stop) if n in chosen]
        if numbers:
            parts.append(jax.lax.map(lambda number, band=band: one(band, number), jnp.asarray(numbers)))
    return jax.tree.map(lambda *a: jnp.concatenate(a), *parts)


def split_rows(x: Float[Array, "B T H D"], kv_heads: int, size: int) -> Float[Array, "chunks B K G C D"]:
    """Queries in chunks of rows, T padded with 0 to whole chunks."""
    return split_chunks(split_groups(x, kv_heads, size))


def merge_rows(x: Float[Array, "chunks B K G C D"], length: int) -> Float[Array, "B T H D"]:
    """The inverse of split_rows."""
    return split_heads(merge_groups(split_chunks(x), length))


def spread(length: int, rows: int | None, first: int = 0) -> list[int]:
    """The numbers of chunks that are spread evenly along a sequence and hold about `rows` rows; None takes all.

    first: The first row; chunks that end before it are left out, except by None.

    Raises ValueError for fewer than one row.
    """
    size = min(CHUNK, length)
    chunks = -(-length // size)
    if rows is None:
        return list(range(chunks))
    rows = whole(rows, "rows")
    before = min(first // size, chunks - 1)
    left = chunks - before
    taken = min(max(rows // size, 1), left)
    return [before + (2 * i + 1) * left // (2 * taken) for i in range(taken)]


def spread_rows(length: int, rows: int | None, first: int = 0) -> Bool[np.ndarray, " T"]:
    """The rows of a sequence that lie in the chunks of `spread`."""
    return np.isin(np.arange(length) // min(CHUNK, length), spread(length, rows, first))


def importance_walk(
    predictor: Predictor | None,
    x: Float[Array, "B T E"],
    batch: dict[str, Int[Array, "B S"]],
    *,
    read: ReadPrompts | None = None,
    implementation: str | None = None,
    score_dtype: str | None = None,
) -> tuple[Any, Step]:
    """Run a predictor along the layers of the base's pass.

    Args:
        predictor: Without one the importance is None.
        x: The embeddings, of the tokens after those read.
        read: The first tokens, where a pass of them was run before.
        implementation: As in `model.causal_attention`, for attention in the predictor.
        score_dtype: "int8" rounds k_imp as decoding stores it; None keeps the predictor's precision.

    Returns:
        The first state, and the step of a layer: (state, view) -> (state, (q_imp, k_imp, offset)).
    """
    check_score_dtype(score_dtype)
    if predictor is None:
        return None, lambda state, view: (state, None)
    segments = batch["segments"]
    context = predictor.context(batch["positions"][:, -x.shape[1] :])

    def attend(cache, q, k, v):
        if read is not None:
            k, v = (jnp.concatenate(parts, axis=1) for parts in zip(cache, (k, v), strict=True))
            return attend_last(q, k, v, segments), cache
        return causal_attention(q, k, v, segments=segments, implementation=implementation), None

    def step(state, view):
        at = walk.advance(predictor, state, view, context, attend)
        functions = predictor.q_imp, predictor.k_imp, predictor.offset
        q_imp, k_imp, offset = (f(at.head, at.features, view, context) for f in functions)
        if read is not None:
            k_imp = jnp.concatenate([read.k_imp[view.index], k_imp], axis=1)
        if score_dtype is not None:
            k_imp = rounded(k_imp, segments > 0)
        return at.state, (q_imp, k_imp, offset)

    return walk.begin(predictor, x, context, None if read is None else read.trunk), step


def sum_chunks(
    model: BaseModel,
    predictor: Predictor | None,
    batch: dict[str, Int[Array, "B T"]],
    look: Callable[[Chunk], Any],
    *,
    rows: int | None = None,
    first: int = 0,
    implementation: str | None = None,
    score_dtype: str | None = None,
) -> Any:
    """Sum look(chunk) over the chunks of every layer of a dense pass. To be called in jitted code.

    The sums are stacked over the layers. Only those of the served layers mean something.

    rows, first: as in `map_chunks`. The others are those of `importance_walk`.
    """
    batch = split_text(batch)
    base, segments = model.config, batch["segments"]
    x = embed_split(model, batch["tokens"])
    dense = dense_mixer(base, segments, implementation)
    begun, step = importance_walk(predictor, x, batch, implementation=implementation, score_dtype=score_dtype)

    def mixer(state, view):
        view = split_view(view)
        state, importance = step(state, view)

        def total(sliding_window):
            found = map_chunks(look, view, importance, segments, sliding_window, rows, first)
            return jax.tree.map(lambda a: jnp.sum(a, axis=0), found)

        return dense(None, view)[0], state, by_service(base, view.index, total, partial(zeros_of, total, None))

    return run_layers(model, x, batch["positions"], mixer, begun)[2]
