"""One token a row: score the cached tokens, choose a few, attend to those, in every served layer.

plan.py      what is chosen, by which policy and when
forecast.py  score: what the predictor says of a layer before it runs
choice.py    choose: the units that a layer reads
store/       attend: where keys and values lie, and how the chosen ones are read
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from butler_jax.decoding.cache import DecodeState, constrain_state
from butler_jax.decoding.choice import Chooser, forget, make_chooser
from butler_jax.decoding.forecast import Forecaster
from butler_jax.decoding.newest_tokens import Newest, newest_of
from butler_jax.decoding.plan import Plan, check_plan, make_plan
from butler_jax.decoding.score_cache import append_scores, select_scored
from butler_jax.decoding.store import KVStore
from butler_jax.model import (
    BaseConfig,
    BaseModel,
    LayerView,
    by_sliding_window,
    check_tokens,
    embed,
    is_served,
    logits,
    require_model,
    run_layers,
)
from butler_jax.parallel import platform
from butler_jax.policies import Policy
from butler_jax.predictors import Predictor
from butler_jax.selection import SelectionConfig, limits_of


class Found(NamedTuple):
    """What a step read.

    Attributes:
        attended: Tokens that every layer and choosing head read, the row's own included.
        chosen: With details, the set itself; None where everything is read.
        scores: With details, the predictor's per query head, -inf where a row holds no token; None without a predictor.
            Layers that are not served are dense: their scores mean nothing.
    """

    attended: Int[Array, "L B K"]
    chosen: Bool[Array, "L B K S"] | None = None
    scores: Float[Array, "L B H S"] | None = None


class LayerResult(NamedTuple):
    """Results of a layer: the new token's keys, values and k_imp, the memory of the choice, and what was read."""

    k: Float[Array, "B K D"]
    v: Float[Array, "B K D"]
    k_imp: Float[Array, "B Q R"] | None
    memory: Any
    found: Found


def decode_step(
    model: BaseModel,
    tokens: Int[Array, " B"],
    state: DecodeState,
    *,
    predictor: Predictor | None = None,
    selection: SelectionConfig | None = None,
    policy: Policy | None = None,
    most: int | None = None,
    implementation: str | None = None,
    details: bool = False,
) -> tuple[Float[Array, "B V"], DecodeState, Found]:
    """Feed one token a row and return the logits after it.

    Donate `state` under jit. Everything that is not an array is static there.

    The gradient of a sparse step with respect to the predictor is 0, since a choice has none. Train with
    `butler_jax.training`, whose loss compares the scores with the attention.

    A base with longrope computes each row by its own length: with the short factors up to the original context, and
    with the long ones beyond. The step that makes a row longer than the original context needs a cache of the long
    ones: prefill that row's tokens again with following=1, as `generate` does.

    Args:
        model: The base model.
        tokens: The next token of every row.
        state: As `prefill` or the step before left it.
        predictor: Its caches are kept up to date under every policy. A step without it leaves them out for good.
        selection: Which cached tokens are read; None reads all, after which the next step of an interval chooses.
        policy: The policy that ranks them; None is `TokenButler()`, the predictor. A policy that evicts goes on from a
            prefill under the same policy and takes no predictor.
        most: The largest budget of any row at this step, in tokens, where it is known to be below that of a full cache.
        implementation: Of pallas_kernels; None takes the platform's.
        details: Whether `Found` has the chosen sets and the predictor's scores.

    Returns:
        Logits in float32, the state with the token, and what was read.

    Raises:
        ValueError: A token is known to be out of range or the cache to be full, a needed predictor is missing,
            thresholds are another model's, or `prefill` did not make the state for this interval or policy.
    """
    require_model(model)
    check_tokens(model.config, tokens, "B")
    options = dict(predictor=predictor, most=most, implementation=implementation)
    plan = make_plan(model.config, state.kv.capacity, selection, policy, **options)
    if np.shape(tokens) != state.lengths.shape:
        raise ValueError(
            f"tokens must be an id for each of the {len(state.lengths)} rows of the state, got shape {np.shape(tokens)}"
        )
    check_plan(plan, state, predictor)
    return take_step(model, tokens, state, predictor, plan, details=details)


def take_step(
    model: BaseModel,
    tokens: Int[Array, " B"],
    state: DecodeState,
    predictor: Predictor | None,
    plan: Plan,
    *,
    details: bool = False,
) -> tuple[Float[Array, "B V"], DecodeState, Found]:
    """Take the step of `decode_step` under a plan that is made."""
    predictor = None if plan.when == "evicting" else predictor
    newest, kv = newest_of(model.config, state.lengths), state.kv
    limits = None if plan.selection is None else limits_of(plan.selection, model.config, kv.capacity, plan.heads)
    chooser = make_chooser(plan, limits=limits, newest=newest, steps=state.steps, kv=kv, memory=state.memory)
    per_head = predictor is not None and (details or (plan.when == "in_layer" and plan.policy.needs_predictor))
    context = None if predictor is None else predictor.context(state.lengths[:, None], newest.total)
    forecaster = Forecaster(model, predictor, context, state.scores, chooser, per_head=per_head, every_step=details)

    def mixer(carry, view: LayerView):
        carry, known = forecaster.forecast(carry, view)

        def sparse():
            chosen, memory = chooser.choose(view, known)
            how = dict(unit=plan.selection.unit, rows=known.rows, implementation=plan.implementation)
            if plan.tail:
                how["spans"] = state.spans.unread(view, chosen, newest, plan.selection.unit)
            out, weights = kv.attend(view, chosen, newest, **how)
            mask = chooser.mask_tokens(chosen, view.index) if details else None
            return out, chooser.remember(view, memory, weights), (chooser.count_tokens(chosen, view.index), mask)

        def dense():
            out = attend_unserved(model.config, kv, view, newest, plan.implementation)
            return out, chooser.recall(view.index), read_all(chooser, view, details)

        if plan.selection is None:
            attend = partial(kv.attend_seen, view, newest, implementation=plan.implementation)
            out, memory = by_sliding_window(model.config, view.index, attend), None
            read = read_all(chooser, view, False)
        else:
            out, memory, read = jax.lax.cond(is_served(model.config, view.index), sparse, dense)
        found = Found(*read, scores=shown_scores(known.scores, newest.total) if details and per_head else None)
        result = LayerResult(view.k[:, 0], view.v[:, 0], known.k_imp, memory, found)
        return out, forecaster.fetch_next(carry, view), result

    x = embed(model, tokens[:, None])
    # With layers apart, no condition stays around what runs on the host: the TPU compiler takes none there.
    unroll = platform() == "gpu" or (kv.on_host and plan.selection is not None)
    how = dict(length=newest.total, unroll=unroll)
    x, carry, new = run_layers(model, x, state.lengths[:, None], mixer, forecaster.begin(x), **how)
    scores = None
    if predictor is not None:
        k_imp = select_scored(model.config, new.k_imp)
        scores = append_scores(state.scores, k_imp, state.lengths, carry.walk.cache)
    memory = forget(state.memory) if plan.selection is None else new.memory
    written, spans = kv.append(new.k, new.v, state.lengths), state.spans
    if spans is not None:
        spans = spans.append(new.k, new.v, state.lengths)
    state = DecodeState(written, scores, newest.total, state.steps + 1, memory, spans)
    return logits(model, x[:, 0]), constrain_state(state), new.found


def attend_unserved(
    config: BaseConfig, kv: KVStore, view: LayerView, newest: Newest, implementation: str | None
) -> Float[Array, "B 1 H D"]:
    """Dense attention of a layer that is not served: layer 0, or one that slides where others see everything."""
    window = config.sliding_window

    def first():
        return kv.attend_first(view, newest, window if config.sliding[0] else None, implementation=implementation)

    def sliding():
        return kv.attend_seen(view, newest, window, implementation=implementation)

    return jax.lax.cond(view.index > 0, sliding, first) if config.mixed else first()


def read_all(chooser: Chooser, view: LayerView, details: bool) -> tuple[Int[Array, "B K"], Bool[Array, "B K S"] | None]:
    """How many tokens a layer reads that reads everything, and with details the set of them."""
    newest, heads = chooser.newest, chooser.plan.heads
    first, count = newest.first(view.index), newest.count(view.index)
    count = jnp.broadcast_to(count[:, None], (count.shape[0], heads))
    if not details:
        return count, None
    columns = jnp.arange(chooser.kv.capacity, dtype=jnp.int32)[None, None]
    mask = jnp.broadcast_to(columns < newest.total[:, None, None], (*count.shape, columns.shape[-1]))
    return count, mask if first is None else mask & (columns >= first[:, None, None])


def shown_scores(scores: Float[Array, "B Q G S"], total: Int[Array, " B"]) -> Float[Array, "B H S"]:
    """Scores per query head, -inf where a row holds no token."""
    batch, capacity = scores.shape[0], scores.shape[-1]
    held = jnp.arange(capacity, dtype=jnp.int32)[None] < total[:, None]
    return jnp.where(held[:, None], scores.reshape(batch, -1, capacity), -jnp.inf)
