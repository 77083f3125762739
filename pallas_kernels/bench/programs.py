"""The timed programs. They attend to LAYERS caches in turn, with queries that depend on the result before.

So inputs come from memory and layers do not overlap. The time of a layer is that of the program divided by its layers.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import api
from pallas_kernels.bench.cases import Case

LAYERS = 4


def layers_that_fit(case: Case, memory: float) -> int:
    """The number of layers whose caches fit in `memory` bytes, at most LAYERS."""
    return max(1, min(LAYERS, int(memory // (2.5 * case.dense_bytes))))


def make_inputs(case: Case, layers: int) -> dict[str, Any]:
    """Random inputs: q, q_imp and lengths, and for each layer k, v, k_imp and scales (None without int8)."""
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


def chain(attend: Any) -> Any:
    """A program that calls attend(q, q_imp, layer) -> (out, extra) on every layer; queries depend on the last out."""

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


def predict_program(case: Case, given: dict[str, Any]) -> tuple[Any, tuple]:
    """The program that scores, chooses and attends in every layer, with its arguments. It returns the choices too."""
    options = dict(unit=case.unit, implementation=case.implementation, pooling=case.pooling, sinks=4, recent=8)

    def whole(q, q_imp, layer):
        k, v, k_imp, scales = layer
        how = dict(scales=scales, return_selection=True, **options)
        return api.sparse_decode_attention(q, k, v, q_imp, k_imp, given["lengths"], case.units, **how)

    layers = list(zip(given["k"], given["v"], given["k_imp"], given["scales"], strict=True))
    return chain(whole), (given["q"], given["q_imp"], layers)


def sparse_programs(case: Case, given: dict[str, Any]) -> tuple[dict[str, tuple[Any, tuple]], list]:
    """The programs "predict" and "reuse" with their arguments, and the choices of every layer.

    "predict" is `predict_program`; "reuse" attends to its choices.
    """

    def again(q, q_imp, layer):
        k, v, chosen = layer
        options = dict(lengths=given["lengths"], unit=case.unit, implementation=case.implementation)
        return api.masked_topk_decode_attention(q, k, v, *chosen, **options), None

    predict = predict_program(case, given)
    chosen = jax.block_until_ready(predict[0](*predict[1]))[1]
    reused = list(zip(given["k"], given["v"], chosen, strict=True))
    return dict(predict=predict, reuse=(chain(again), (given["q"], given["q_imp"], reused))), chosen
