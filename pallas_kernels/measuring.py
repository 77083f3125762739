"""What the benchmark times and what it holds the times against: a byte model, a copy, and other attention.

Every timed program attends LAYERS caches one after the other, each with a cache of its own and a query that depends on
the one before, so that inputs come from memory and nothing overlaps; the time is that of the program over its layers.
"""

from __future__ import annotations

import functools
import statistics
import time
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import api

LAYERS = 4
COPIED = 2**28  # bytes of the array whose copy measures the bandwidth


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Attention of one layer of a model: H query heads, K KV heads, head dimension D, rank R of the importance keys."""

    heads: int
    kv_heads: int
    dim: int
    rank: int = 16
    layers: int = 32
    weights: int = 0  # parameters of the whole model


SHAPES = {
    "llama8b": Shape(heads=32, kv_heads=8, dim=128, layers=32, weights=8_030_261_248),
    "llama1b": Shape(heads=32, kv_heads=8, dim=64, layers=16, weights=1_235_814_400),
    "smollm2": Shape(heads=9, kv_heads=3, dim=64, layers=30, weights=134_515_008),
}


@dataclass(frozen=True, kw_only=True)
class Case:
    """One setting of the benchmark."""

    shape: Shape
    context: int
    batch: int
    tokens: int  # attended of the cache, a row and KV head
    dtype: Any
    unit: int = 1
    pooling: str = "normalised"
    int8: bool = False
    implementation: str | None = None

    @property
    def units(self) -> int:
        """n, chosen units a row."""
        return -(-self.tokens // self.unit)


def dense_bytes(case: Case) -> float:
    """What dense decode attention reads of one layer: all keys and values."""
    return 2.0 * case.batch * case.shape.kv_heads * case.context * case.shape.dim * jnp.dtype(case.dtype).itemsize


def sparse_bytes(case: Case, interval: int) -> float:
    """What the sparse step reads and writes of one layer on average: score keys and scores every `interval` steps
    (scores are written and read once, in float32), and the chosen keys and values."""
    rows = case.batch * case.shape.kv_heads
    item = jnp.dtype(case.dtype).itemsize
    keys = rows * case.context * case.shape.rank * (1 if case.int8 else item)
    scores = 2 * rows * case.context * 4
    return (keys + scores) / interval + 2.0 * rows * case.units * case.unit * case.shape.dim * item


def model_cap(case: Case, interval: int) -> float:
    """The speed-up of a whole decode step if bytes alone count: the weights are read too, once for the batch."""
    weights = case.shape.weights * jnp.dtype(case.dtype).itemsize
    dense, sparse = (case.shape.layers * part for part in (dense_bytes(case), sparse_bytes(case, interval)))
    return (weights + dense) / (weights + sparse)


def take_turns(programs: dict[str, tuple[Any, tuple]], repeats: int) -> dict[str, float]:
    """Median seconds of every warmed-up (program, arguments); in turns, so that a busy machine slows all alike."""
    times: dict[str, list[float]] = {name: [] for name in programs}
    for _ in range(repeats):
        for name, (program, arguments) in programs.items():
            start = time.perf_counter()
            jax.block_until_ready(program(*arguments))
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def copy_bandwidth(repeats: int) -> float:
    """Bytes a second, read and written, of scaling an array in place."""
    program = jax.jit(lambda x: x * 1.0009765625, donate_argnums=0)
    x = program(jnp.ones(COPIED // 4, jnp.float32))
    times = []
    for _ in range(repeats):
        jax.block_until_ready(x)
        start = time.perf_counter()
        x = jax.block_until_ready(program(x))
        times.append(time.perf_counter() - start)
    return 2 * COPIED / statistics.median(times)


def layers_that_fit(case: Case, memory: float) -> int:
    """How many layers' caches there is room for, at most LAYERS."""
    return max(1, min(LAYERS, int(memory // (2.5 * dense_bytes(case)))))


def operands(case: Case, layers: int) -> dict[str, Any]:
    """Random inputs: q, q_imp, lengths, and per layer k, v, score keys (and scales)."""
    shape, batch = case.shape, case.batch
    group = shape.heads // shape.kv_heads

    @functools.partial(jax.jit, static_argnums=(1,))
    def draw(key, size):
        return jax.random.normal(key, size, jnp.float32).astype(case.dtype)

    keys = iter(jax.random.split(jax.random.key(0), 3 * layers + 2))
    cache = (batch, shape.kv_heads, case.context, shape.dim)
    found = dict(
        q=draw(next(keys), (batch, shape.heads, shape.dim)),
        q_imp=draw(next(keys), (batch, shape.kv_heads, group, shape.rank)),
        lengths=jnp.full((batch,), case.context, jnp.int32),
        k=[draw(next(keys), cache) for _ in range(layers)],
        v=[draw(next(keys), cache) for _ in range(layers)],
        k_imp=[draw(next(keys), (batch, shape.kv_heads, shape.rank, case.context)) for _ in range(layers)],
        scales=[None] * layers,
    )
    if case.int8:
        pairs = [jax.jit(api.quantise_k_imp)(key) for key in found["k_imp"]]
        found["k_imp"], found["scales"] = ([pair[i] for pair in pairs] for i in (0, 1))
    return found


def _chain(attend: Any) -> Any:
    """A program over layers: attend(q, q_imp, layer's inputs) -> (out, more); queries depend on the layer before."""

    @jax.jit
    def program(q, q_imp, layers):
        more = []
        for layer in layers:
            out, extra = attend(q, q_imp, layer)
            more.append(extra)
            drift = jnp.mean(out.astype(jnp.float32)) * 1e-6
            q, q_imp = (a + drift.astype(a.dtype) for a in (q, q_imp))
        return q, more

    return program


def sparse_programs(case: Case, given: dict[str, Any]) -> tuple[dict[str, tuple[Any, tuple]], list]:
    """("predict": a step that scores, chooses and attends; "reuse": one that attends to an earlier choice), choices."""
    common = dict(unit=case.unit, implementation=case.implementation)

    def whole(q, q_imp, layer):
        k, v, k_imp, scales = layer
        return api.sparse_decode_attention(
            q, k, v, q_imp, k_imp, given["lengths"], case.units, sinks=4, recent=8,
            pooling=case.pooling, scales=scales, return_selection=True, **common,
        )  # fmt: skip

    def again(q, q_imp, layer):
        k, v, chosen = layer
        return api.masked_topk_decode_attention(q, k, v, *chosen, lengths=given["lengths"], **common), None

    layers = list(zip(given["k"], given["v"], given["k_imp"], given["scales"], strict=True))
    predict = _chain(whole), (given["q"], given["q_imp"], layers)
    chosen = jax.block_until_ready(predict[0](*predict[1]))[1]
    reused = [(k, v, selection) for (k, v, *_), selection in zip(layers, chosen, strict=True)]
    return dict(predict=predict, reuse=(_chain(again), (given["q"], given["q_imp"], reused))), chosen


def peer_programs(
    case: Case, given: dict[str, Any], chosen: list
) -> tuple[dict[str, tuple[Any, tuple]], dict[str, str]]:
    """(other decode attention on the same inputs, and why what is missing cannot run).

    The dense ones read the whole cache; "masked" attends to the chosen tokens by a mask over everything.
    """
    shape, batch = case.shape, case.batch
    lengths = given["lengths"]

    def grouped(q, k, v, mask):
        rows = q.reshape(batch, shape.kv_heads, -1, shape.dim)
        logits = jnp.einsum("bkgd,bksd->bkgs", rows, k, preferred_element_type=jnp.float32) * shape.dim**-0.5
        weights = jax.nn.softmax(jnp.where(mask, logits, -jnp.inf), axis=-1).astype(v.dtype)
        return jnp.einsum("bkgs,bksd->bkgd", weights, v, preferred_element_type=jnp.float32)

    def einsum(q, q_imp, layer):
        seen = jnp.arange(case.context)[None] < lengths[:, None]
        return grouped(q, *layer[:2], seen[:, None, None]), None

    def masked(q, q_imp, layer):
        k, v, (indices, valid) = layer
        units = -(-case.context // case.unit)
        rows = jnp.arange(batch)[:, None, None], jnp.arange(shape.kv_heads)[None, :, None]
        mask = jnp.zeros((batch, shape.kv_heads, units), bool).at[*rows, indices].max(valid)
        mask = jnp.repeat(mask, case.unit, axis=-1)[..., : case.context]
        return grouped(q, k, v, mask[:, :, None]), None

    def library(q, q_imp, layer):
        k, v = (a.swapaxes(1, 2) for a in layer[:2])
        return jax.nn.dot_product_attention(q[:, None], k, v, key_value_seq_lengths=lengths)[:, 0], None

    layers = list(zip(given["k"], given["v"], chosen, strict=True))
    runs = dict(einsum=(einsum, layers), masked=(masked, layers), dot_product_attention=(library, layers))
    if jax.default_backend() == "gpu":
        swapped = [(k.swapaxes(1, 2), v.swapaxes(1, 2)) for k, v, _ in layers]
        if jnp.dtype(case.dtype).itemsize == 2:
            runs["dot_product_attention"] = (_cudnn, swapped)
        runs["pallas_decode_attention"] = (_pallas_decode, swapped)
    programs, missing = {}, {}
    for name, (attend, own) in runs.items():
        program = _chain(attend), (given["q"], given["q_imp"], own)
        try:
            jax.block_until_ready(program[0](*program[1]))
            programs[name] = program
        except Exception as error:  # a peer's limits are no reason to end the run; the row says what they were
            missing[name] = _reason(error)
    return programs, missing


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:100]}"


def _cudnn(q, q_imp, layer):
    out = jax.nn.dot_product_attention(q[:, None], *layer, implementation="cudnn")
    return out[:, 0], None


def _pallas_decode(q, q_imp, layer):
    from jax.experimental.pallas.ops.gpu import decode_attention

    return decode_attention.gqa(q, *layer), None


def torch_seconds(case: Case, layers: int, repeats: int) -> float | str:
    """torch's scaled_dot_product_attention on the same sizes, or why it cannot be timed."""
    try:
        import torch

        if not torch.cuda.is_available():
            return "torch sees no GPU"
        dtype = getattr(torch, jnp.dtype(case.dtype).name)
        shape = case.shape
        size = (case.batch, shape.kv_heads, case.context, shape.dim)
        q = torch.randn(case.batch, shape.heads, 1, shape.dim, dtype=dtype, device="cuda")
        caches = [[torch.randn(size, dtype=dtype, device="cuda") for _ in range(2)] for _ in range(layers)]
        times = []
        for _ in range(repeats + 1):
            torch.cuda.synchronize()
            start = time.perf_counter()
            for k, v in caches:
                torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)
            torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
        return statistics.median(times[1:]) / layers
    except Exception as error:
        return _reason(error)


def rows(case: Case, intervals: tuple[int, ...], repeats: int, memory: float, bandwidth: float) -> list[dict[str, Any]]:
    """The rows of one case, one an interval."""
    layers = layers_that_fit(case, memory)
    given = operands(case, layers)
    programs, chosen = sparse_programs(case, given)
    others, missing = peer_programs(case, given, chosen)
    timed = {name: value / layers for name, value in take_turns(programs | others, repeats).items()}
    first, again = timed.pop("predict"), timed.pop("reuse")
    if jax.default_backend() == "gpu":
        found = torch_seconds(case, layers, repeats)
        (missing if isinstance(found, str) else timed)["torch_sdpa"] = found
    dense_name, dense = min(((n, t) for n, t in timed.items() if n != "masked"), key=lambda pair: pair[1])
    found_rows = []
    for interval in intervals:
        spent = (first + (interval - 1) * again) / interval
        read = sparse_bytes(case, interval)
        cap = dense_bytes(case) / read
        found_rows.append(
            dict(
                context=case.context, budget=case.tokens / case.context, tokens=case.tokens, batch=case.batch,
                interval=interval, seconds=spent, dense_seconds=dense, speedup=dense / spent, cap=cap,
                share_of_cap=dense / spent / cap, predicted_bytes=read, dense_bytes=dense_bytes(case),
                gb_s=read / spent / 1e9, dense_gb_s=dense_bytes(case) / dense / 1e9, copy_gb_s=bandwidth / 1e9,
                model_cap=model_cap(case, interval), predict_seconds=first, reuse_seconds=again,
                dense_form=dense_name, peers=timed | missing,
            )
        )  # fmt: skip
    return found_rows
