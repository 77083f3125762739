"""The timed programs. They attend to LAYERS caches in turn, with queries that depend on the result before.

So inputs come from memory and layers do not overlap. The time of a layer is that of the program divided by its layers.
"""

from __future__ import annotations

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp

import pallas_kernels as pk
from pallas_kernels.bench.cases import Case

LAYERS = 4


def layers_that_fit(case: Case, memory: float) -> int:
    """The number of layers whose caches fit in `memory` bytes, at most LAYERS; a multiple of those that go together."""
    fitting = min(max(LAYERS, case.together), int(memory // (2.5 * case.dense_bytes)))
    return max(case.together, fitting // case.together * case.together)


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
        pairs = [jax.jit(pk.quantise_k_imp)(key) for key in found["k_imp"]]
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


def choose_and_attend(
    case: Case, q: jax.Array, q_imp: jax.Array, layers: dict[str, Any], lengths: jax.Array, interpret: Any = None
) -> tuple[jax.Array, list[pk.Selection]]:
    """The attention of `case.together` layers and their choices; k, v and scales by layer, k_imp of several stacked."""
    run = dict(implementation=case.implementation, interpret=interpret)
    rules, scored = dict(unit=case.unit, sinks=4, recent=8), dict(pooling=case.pooling)
    if case.together == 1:
        (k,), (v,), (scales,) = layers["k"], layers["v"], layers["scales"]
        how = rules | scored | run | dict(scales=scales, return_selection=True)
        out, chosen = pk.sparse_decode_attention(q, k, v, q_imp, layers["k_imp"], lengths, case.units, **how)
        return out, [chosen]
    q_imp, rows = (jnp.repeat(a, case.together, axis=0) for a in (q_imp, lengths))
    if case.int8:
        scored |= dict(scales=jnp.stack(layers["scales"], axis=1).reshape(-1, case.shape.kv_heads))
    scored |= dict(layer=jnp.arange(case.together, dtype=jnp.int32))
    chosen = pk.choose_by_importance(q_imp, layers["k_imp"], rows, case.units, **rules, **scored, **run)
    found = []
    for place, (k, v) in enumerate(zip(layers["k"], layers["v"], strict=True)):
        found.append(pk.Selection(*(a[place :: case.together] for a in chosen)))
        q = pk.masked_topk_decode_attention(q, k, v, *found[-1], unit=case.unit, lengths=lengths, **run)
    return q, found


def predict_program(case: Case, given: dict[str, Any]) -> tuple[Any, tuple]:
    """The program that scores, chooses and attends in every layer, with its arguments. It returns the choices too."""

    def block(q, q_imp, layers):
        return choose_and_attend(case, q, q_imp, layers, given["lengths"])

    def part(begin):
        found = {name: given[name][begin : begin + case.together] for name in ("k", "v", "k_imp", "scales")}
        keys = found["k_imp"]
        return found | dict(k_imp=keys[0] if case.together == 1 else jnp.stack(keys))

    return chain(block), (given["q"], given["q_imp"], [part(i) for i in range(0, len(given["k"]), case.together)])


def sparse_programs(case: Case, given: dict[str, Any]) -> tuple[dict[str, tuple[Any, tuple]], list]:
    """The programs "predict" and "reuse" with their arguments, and the choices of every layer.

    "predict" is `predict_program`; "reuse" attends to its choices.
    """

    def again(q, q_imp, layer):
        k, v, chosen = layer
        options = dict(lengths=given["lengths"], unit=case.unit, implementation=case.implementation)
        return pk.masked_topk_decode_attention(q, k, v, *chosen, **options), None

    predict = predict_program(case, given)
    chosen = list(itertools.chain(*jax.block_until_ready(predict[0](*predict[1]))[1]))
    reused = list(zip(given["k"], given["v"], chosen, strict=True))
    return dict(predict=predict, reuse=(chain(again), (given["q"], given["q_imp"], reused))), chosen
