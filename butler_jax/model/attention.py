"""Causal grouped-query attention in memory linear in the sequence: in XLA, by cuDNN or by Splash attention."""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from butler_jax.model.layers import soft_cap
from butler_jax.model.splash import splash_attention
from butler_jax.parallel import mesh

IMPLEMENTATIONS = ("xla", "cudnn", "splash")
CHUNK = 128  # query rows of which the attention matrix is formed at a time
BANDS = 4  # static key ranges; with more, less is computed above the diagonal and compilation takes longer
LANES = 128  # minor dimension of a TPU tile
LOWEST = -1e30  # a logit at or below it counts as -inf; finite, so that a row of such logits gives no NaN


def causal_attention(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B T K D"],
    v: Float[Array, "B T K Dv"],
    *,
    segments: Int[Array, "B T"] | None = None,
    key_segments: Int[Array, "B T"] | None = None,
    sliding_window: int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sink_logits: Float[Array, " H"] | None = None,
    implementation: str | None = None,
    return_lse: bool = False,
) -> Float[Array, "B T H Dv"] | tuple[Float[Array, "B T H Dv"], Float[Array, "B T H"]]:
    """Softmax attention of every token over itself and the tokens before it. H/K query heads share a KV head.

    A logit of -inf (or of -1e30 and below) has weight 0. A row that has only such logits gives 0 and a log-sum-exp of
    -1e30 with "xla". A logit that is NaN or +inf makes its own row and head NaN. A value that is NaN or infinite
    affects all rows of its head.

    Args:
        v: Values; Dv, their dimension, may differ from D.
        segments: The document of each token; a token attends within its document only. 0 is padding, whose rows are
            finite and arbitrary.
        key_segments: The document of each key, where it differs from that of the query at the same position. A row
            without a key in its document is finite and arbitrary.
        sliding_window: A query sees itself and the sliding_window-1 tokens before it; static.
        scale: Factor on the logits; default D**-0.5.
        softcap: Scaled logits x become c tanh(x / c) for this c; static.
        sink_logits: One more logit of every query head, without a value, in the softmax of each of its rows.
        implementation: "xla" forms 128 rows of the attention matrix at a time, also when differentiated. "cudnn" is
            `jax.nn.dot_product_attention` on NVIDIA GPUs for bfloat16 and float16, without segments, softcap and
            sink_logits. "splash" is the TPU kernel of `jax.experimental.pallas`, which is interpreted (slowly) on CPU;
            a mesh splits it by rows and KV heads. None chooses splash on TPU, cudnn on GPU where it applies, and xla
            otherwise.
        return_lse: Also return the log-sum-exp of the scaled logits, the sink's included.

    Returns:
        The output, and with return_lse the log-sum-exp in nats, float32. It carries no gradient. cuDNN rounds it to the
        dtype of q.

    Raises:
        ValueError: The shapes do not fit, or the named implementation is unknown or cannot take these inputs.
    """
    check_shapes(q, k, v, segments, sliding_window, softcap, sink_logits)
    if key_segments is None:
        key_segments = segments
    elif segments is None or key_segments.shape != segments.shape:
        raise ValueError("key_segments goes with segments, both [B, T]")
    terms = {"softcap": softcap, "sink_logits": sink_logits}
    name = choose_implementation(implementation, q, v.shape[-1], segments, **terms)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if name == "xla":
        out, lse = _xla(q, k, v, segments, key_segments, sliding_window, scale, **terms)
    elif name == "cudnn":
        out, lse = _cudnn(q, k, v, sliding_window, scale)
    else:
        out, lse = _splash(q, k, v, segments, key_segments, sliding_window, scale, return_lse, **terms)
    return (out, jax.lax.stop_gradient(lse.astype(jnp.float32))) if return_lse else out


def choose_implementation(
    implementation: str | None,
    q: Float[Array, "B T H D"],
    value_dim: int,
    segments: Int[Array, "B T"] | None,
    *,
    softcap: float | None = None,
    sink_logits: Float[Array, " H"] | None = None,
) -> str:
    """The implementation to run. Raises ValueError where the named one is unknown or cannot take these inputs."""
    platform = mesh.platform()
    plain = softcap is None and sink_logits is None
    half = q.dtype in (jnp.bfloat16, jnp.float16)
    if implementation is None:
        if platform == "tpu":
            return "splash"
        narrow = platform == "gpu" and max(q.shape[-1], value_dim) <= cudnn_head_dim()
        return "cudnn" if narrow and half and plain and segments is None else "xla"
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"unknown implementation {implementation!r}; use None or one of {IMPLEMENTATIONS}")
    if implementation == "cudnn":
        if segments is not None:
            raise ValueError('"cudnn" attention cannot keep documents apart; drop segments or use "xla"')
        if not plain:
            raise ValueError('"cudnn" attention has neither a soft cap nor sinks, and the model has; use "xla"')
        if not half:
            raise ValueError(f'"cudnn" attention needs bfloat16 or float16, got {q.dtype}; cast or use "xla"')
        if platform != "gpu":
            raise ValueError(f'"cudnn" attention needs an NVIDIA GPU, the platform is {platform}; use "xla"')
    if implementation == "splash" and platform == "gpu":
        raise ValueError('"splash" attention is a TPU kernel, the platform is gpu; use "cudnn" or "xla"')
    return implementation


def cudnn_head_dim() -> int:
    """The largest head dimension of cuDNN's flash attention on this GPU: 256 from Hopper on, 128 before."""
    capability = getattr(jax.devices()[0], "compute_capability", "0")
    return 256 if float(capability) >= 9 else 128


def check_shapes(q, k, v, segments, sliding_window, softcap=None, sink_logits=None) -> None:
    """Raise ValueError unless these fit `causal_attention`."""
    if q.ndim != 4 or k.ndim != 4 or v.ndim != 4:
        raise ValueError(f"q, k and v must be [B, T, heads, dim]; got {q.shape}, {k.shape}, {v.shape}")
    if k.shape[:3] != v.shape[:3] or q.shape[:2] != k.shape[:2] or q.shape[3] != k.shape[3]:
        raise ValueError(f"q {q.shape}, k {k.shape}, v {v.shape} differ in batch, length, KV heads or width")
    if 0 in q.shape[:2]:
        raise ValueError(f"q, k and v hold no tokens: q is {q.shape}; give at least one row and one token")
    if q.shape[2] % k.shape[2]:
        raise ValueError(f"{q.shape[2]} query heads cannot share {k.shape[2]} KV heads; use a multiple")
    if segments is not None and segments.shape != q.shape[:2]:
        raise ValueError(f"segments must be [B, T] = {q.shape[:2]}, got {segments.shape}")
    if sliding_window is not None and not (isinstance(sliding_window, (int, np.integer)) and sliding_window >= 1):
        raise ValueError(f"sliding_window must be a whole number, at least 1 (the token itself), got {sliding_window}")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap must be above 0, got {softcap}; None leaves the logits as they are")
    if sink_logits is not None and sink_logits.shape != q.shape[2:3]:
        raise ValueError(f"sink_logits must be one for each of the {q.shape[2]} query heads, got {sink_logits.shape}")


# --- XLA: chunks of query rows, keys in bands -----------------------------------------------------


class Band(NamedTuple):
    """The chunks start ... stop-1 read `keys` keys each: the first ones, or (sliding) the last ones up to the chunk."""

    start: int
    stop: int
    keys: int
    sliding: bool

    def first_key(self, index: Int[Array, ""] | int, chunk: int) -> Int[Array, ""] | int:
        """Position of the first key that chunk `index` reads."""
        return jnp.maximum((index + 1) * chunk - self.keys, 0) if self.sliding else 0

    def take(self, x: Array, first: Int[Array, ""] | int, axis: int) -> Array:
        """The keys read from `first` on, along `axis`."""
        slice_keys = jax.lax.dynamic_slice_in_dim if self.sliding else jax.lax.slice_in_dim
        return slice_keys(x, first, self.keys if self.sliding else first + self.keys, axis=axis)


def make_bands(chunks: int, chunk: int, sliding_window: int | None, least: int = 1) -> list[Band]:
    """Static key ranges for `chunks` chunks of `chunk` query rows.

    Without a sliding window, the chunks of a band read the keys up to the band's end. With one, a chunk reads its own
    keys and those of the sliding window before its first row, so its work does not grow with the sequence.

    least: chunks of a band, so that less is compiled for short sequences.
    """
    reach = chunks * chunk if sliding_window is None else chunk * (1 + -(-(sliding_window - 1) // chunk))
    width = max(-(-chunks // BANDS), least)
    found: list[Band] = []
    for start in range(0, chunks, width):
        stop = min(start + width, chunks)
        if reach < stop * chunk:
            return [*found, Band(start, chunks, reach, True)]
        found.append(Band(start, stop, stop * chunk, False))
    return found


def split_groups(x: Float[Array, "B T H D"], kv_heads: int, chunk: int) -> Float[Array, "chunks B K G C D"]:
    """Chunks of queries by KV head, T padded with 0 to whole chunks."""
    batch, length, heads, dim = x.shape
    x = jnp.pad(x, ((0, 0), (0, -length % chunk), (0, 0), (0, 0)))
    x = x.reshape(batch, -1, chunk, kv_heads, heads // kv_heads, dim)
    return x.transpose(1, 0, 3, 4, 2, 5)


def merge_groups(x: Float[Array, "chunks B K G C D"], length: int) -> Float[Array, "B T H D"]:
    """The inverse of split_groups."""
    chunks, batch, kv_heads, group, chunk, dim = x.shape
    return x.transpose(1, 0, 4, 2, 3, 5).reshape(batch, chunks * chunk, kv_heads * group, dim)[:, :length]


def split_queries(x: Float[Array, "B T H D"], kv_heads: int, chunk: int) -> Float[Array, "chunks B K M D"]:
    """Chunks of queries, where the M = G * chunk rows of a chunk that share a KV head form one tile."""
    groups = split_groups(x, kv_heads, chunk)
    return groups.reshape(*groups.shape[:3], -1, groups.shape[-1])


def merge_queries(x: Float[Array, "chunks B K M D"], chunk: int, length: int) -> Float[Array, "B T H D"]:
    """The inverse of split_queries."""
    return merge_groups(x.reshape(*x.shape[:3], -1, chunk, x.shape[-1]), length)


def split_keys(x: Float[Array, "B T K D"], chunk: int) -> Float[Array, "B K S D"]:
    """Keys or values per KV head, T padded with 0 to whole chunks."""
    return jnp.pad(x, ((0, 0), (0, -x.shape[1] % chunk), (0, 0), (0, 0))).transpose(0, 2, 1, 3)


def split_segments(segments: Int[Array, "B T"] | None, chunk: int) -> Int[Array, "B S"] | None:
    """Segments padded with 0 to whole chunks."""
    return None if segments is None else jnp.pad(segments, ((0, 0), (0, -segments.shape[1] % chunk)))


def document_starts(segments: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """The column where each token's document begins; documents are contiguous."""
    columns = jnp.arange(segments.shape[1], dtype=jnp.int32)[None]
    before = jnp.pad(segments[:, :-1], ((0, 0), (1, 0)), constant_values=-1)
    return jax.lax.cummax(jnp.where(segments != before, columns, 0), axis=1)


def document_places(segments: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """How many tokens of its document lie before each token; documents are contiguous."""
    return jnp.arange(segments.shape[1], dtype=jnp.int32)[None] - document_starts(segments)


def chunk_mask(
    index: Int[Array, ""] | int,
    first: Int[Array, ""] | int,
    keys: int,
    segments: Int[Array, "B S"] | None,
    sliding_window: int | None,
    chunk: int,
    key_segments: Int[Array, "B S"] | None = None,
    before: int = 0,
) -> Bool[Array, "#B C {keys}"]:
    """Which of the keys first ... first+keys-1 the rows of chunk `index` attend to; B is 1 without segments.

    segments: documents of the queries, padded to whole chunks; None where all tokens are of one document. key_segments:
    of the keys, by default those of the queries. before: tokens before the rows of chunk 0.
    """
    start = before + index * chunk
    rows = (start + jnp.arange(chunk))[:, None]
    columns = (first + jnp.arange(keys))[None, :]
    mask = columns <= rows
    if sliding_window is not None:
        mask &= columns > rows - sliding_window
    mask = mask[None]
    if segments is not None:
        own = jax.lax.dynamic_slice_in_dim(segments, start, chunk, axis=1)
        other = segments if key_segments is None else key_segments
        other = jax.lax.dynamic_slice_in_dim(other, first, keys, axis=1)
        mask = mask & (own[:, :, None] == other[:, None, :])
    return mask


def masked_exponentials(
    queries: Float[Array, "B K M D"],
    keys: Float[Array, "B K S D"],
    mask: Bool[Array, "#B C S"],
    scale: float,
    *,
    softcap: float | None = None,
    sink_logits: Float[Array, " H"] | None = None,
) -> tuple[Float[Array, "B K M S"], Float[Array, "B K M 1"], Float[Array, "B K M 1"]]:
    """`exponentials` of the logits of queries and keys; the scale is applied in float32."""
    batch, heads, rows, _ = queries.shape
    chunk, size = mask.shape[1:]
    logits = jnp.einsum("bkmd,bksd->bkms", queries, keys, preferred_element_type=jnp.float32)
    logits = soft_cap(logits * scale, softcap).reshape(batch, heads, rows // chunk, chunk, size)
    found = exponentials(logits, mask[:, None, None], grouped_sinks(sink_logits, heads))
    return tuple(a.reshape(batch, heads, rows, a.shape[-1]) for a in found)


def grouped_sinks(
    sink_logits: Float[Array, " H"] | None, kv_heads: int, *, rows: bool = True
) -> Float[Array, "1 K G *#C 1"] | None:
    """The sink of every query head, float32, to broadcast over logits [B, K, G, C, S], or [B, K, G, S] without rows."""
    shape = (1, kv_heads, -1, 1, 1) if rows else (1, kv_heads, -1, 1)
    return None if sink_logits is None else sink_logits.astype(jnp.float32).reshape(shape)


def exponentials(
    logits: Float[Array, "*B S"], mask: Bool[Array, "*#B S"], sink_logits: Float[Array, "*#B 1"] | None = None
) -> tuple[Float[Array, "*B S"], Float[Array, "*B 1"], Float[Array, "*B 1"]]:
    """Unnormalised softmax weights with their row sums and log-sum-exp, all float32.

    The weights are exp(logits - row maximum) where the mask is set and 0 elsewhere. A row's sink counts in its maximum,
    its sum and its log-sum-exp. A row without a logit above -1e30 has weights of 0, a sum of 1 and a log-sum-exp of
    -1e30, so that nothing divides by zero.
    """
    logits = jnp.where(mask, logits, -jnp.inf)
    maximum = jnp.maximum(jnp.max(logits, axis=-1, keepdims=True), LOWEST)
    maximum = jax.lax.stop_gradient(maximum if sink_logits is None else jnp.maximum(maximum, sink_logits))
    weights = jnp.exp(logits - maximum)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    if sink_logits is not None:
        total = total + jnp.exp(sink_logits - maximum)
    total = jnp.where(total == 0, 1.0, total)
    return weights, total, maximum + jnp.log(total)


def masked_softmax(
    logits: Float[Array, "*B S"], mask: Bool[Array, "*#B S"], sink_logits: Float[Array, "*#B 1"] | None = None
) -> Float[Array, "*B S"]:
    """Softmax over the keys in the mask and the row's sink, 0 elsewhere.

    A row without a logit above -1e30 is 0 everywhere.
    """
    weights, total, _ = exponentials(logits, mask, sink_logits)
    return weights / total


def weighted_values(weights: Float[Array, "B K *M S"], values: Float[Array, "B K S D"]) -> Float[Array, "B K *M D"]:
    """The sums of the values by their weights, accumulated in float32."""
    weights = weights.astype(values.dtype)
    return jnp.einsum("bk...s,bksd->bk...d", weights, values, preferred_element_type=jnp.float32)


def _xla(q, k, v, segments, key_segments, sliding_window, scale, **terms):
    length, chunk = q.shape[1], min(CHUNK, q.shape[1])
    queries = split_queries(q, k.shape[2], chunk)
    keys, values = split_keys(k, chunk), split_keys(v, chunk)
    segments, key_segments = split_segments(segments, chunk), split_segments(key_segments, chunk)

    def attend(band: Band, inputs):
        index, rows = inputs
        first = band.first_key(index, chunk)
        mask = chunk_mask(index, first, band.keys, segments, sliding_window, chunk, key_segments)
        weights, total, lse = masked_exponentials(rows, band.take(keys, first, 2), mask, scale, **terms)
        return (weighted_values(weights, band.take(values, first, 2)) / total).astype(v.dtype), lse

    parts = []
    for band in make_bands(queries.shape[0], chunk, sliding_window):
        inputs = (jnp.arange(band.start, band.stop), queries[band.start : band.stop])
        parts.append(jax.lax.map(jax.checkpoint(functools.partial(attend, band)), inputs))
    out, lse = (jnp.concatenate(part) for part in zip(*parts, strict=True))
    return merge_queries(out, chunk, length), merge_queries(lse, chunk, length)[..., 0]


# --- library kernels: cuDNN and Splash ------------------------------------------------------------


def _pad_last(x: Array, width: int) -> Array:
    return jnp.pad(x, ((0, 0),) * (x.ndim - 1) + ((0, width - x.shape[-1]),))


def _cudnn(q, k, v, sliding_window, scale):
    value_dim = v.shape[-1]
    width = -(-max(q.shape[-1], value_dim) // 8) * 8  # cuDNN takes one width for all three, a multiple of 8
    q, k, v = (_pad_last(x.astype(q.dtype), width) for x in (q, k, v))
    out, lse = jax.nn.dot_product_attention(
        q,
        k,
        v,
        scale=scale,
        is_causal=True,
        local_window_size=None if sliding_window is None else (sliding_window - 1, 0),
        implementation="cudnn",
        return_residual=True,
    )
    return out[..., :value_dim], lse


def _splash(q, k, v, segments, key_segments, sliding_window, scale, return_lse, *, softcap, sink_logits):
    batch, length = q.shape[:2]
    value_dim = v.shape[-1]
    padding = -length % LANES
    q = q * jnp.asarray(scale, q.dtype)
    q, k, v = (_pad_last(x.astype(q.dtype), -(-x.shape[-1] // LANES) * LANES) for x in (q, k, v))
    q, k, v = (jnp.pad(x, ((0, 0), (0, padding), (0, 0), (0, 0))).transpose(0, 2, 1, 3) for x in (q, k, v))
    if segments is None:
        segments = key_segments = jnp.ones((batch, length), jnp.int32)
    segments, key_segments = (jnp.pad(x, ((0, 0), (0, padding))) for x in (segments, key_segments))

    run = functools.partial(splash_attention, sliding_window=sliding_window, return_lse=return_lse, softcap=softcap)
    operands = ("bw--", "bw--", "bw--", "b-", "b-", "w")
    run = mesh.by_rows_and_heads(run, operands, ("bw--", "bw-"), rows=batch, heads=k.shape[1])
    out, lse = run(q, k, v, segments, key_segments, sink_logits)
    return out.transpose(0, 2, 1, 3)[:, :length, :, :value_dim], lse.transpose(0, 2, 1)[:, :length]
