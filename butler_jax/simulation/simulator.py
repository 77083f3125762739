"""Decoding simulated in one pass: in all served layers, every row attends only to its own choice.

    mixer of a layer:  importance_walk -> Chunk -> policy(chunk) -> chosen_mask -> attention over the mask

A policy that evicts runs row by row instead (eviction.py). One that reads everything takes the dense pass.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from butler_jax.data import as_batch, require_batch
from butler_jax.model import (
    BaseConfig,
    BaseModel,
    by_service,
    check_length,
    check_tokens,
    dense_mixer,
    document_places,
    require_fit,
    require_model,
    run_layers,
    sliding_windows,
)
from butler_jax.policies import Evicting, Policy, settle_policy
from butler_jax.predictors import Predictor
from butler_jax.selection import Limits, SelectionConfig, limits_of
from butler_jax.simulation.choice import sparse_chunk
from butler_jax.simulation.chunks import importance_walk, map_chunks, merge_rows
from butler_jax.simulation.eviction import evicting_attention
from butler_jax.simulation.predictions import predict_next
from butler_jax.simulation.programs import compiled
from butler_jax.simulation.prompts import ReadPrompts, last_mixer
from butler_jax.simulation.sharding import embed_split, split_heads, split_text, split_view


class Simulated(NamedTuple):
    """The results of a pass, over all tokens or those after prompts that were read before.

    Attributes:
        nll: Negative log-likelihood of the next token in nats; 0 where it is padding or belongs to another document.
        greedy: The most likely next token; -1 where its logit is not finite.
        attended: Fraction of its causal keys that a row read, mean over the served layers and choosing heads.
        read: Keys that a row read in all layers and heads, those that are not served included.
        served: Keys that a row read in the served layers.
        of_dense: Keys that a row read in all layers, as a share of those that a dense pass reads.
        shares: Fraction of its causal keys that a row read in every layer and choosing head; one head where all heads
            read as many.
        stream: The last residual stream.
        divergence: With a reference, the Jensen-Shannon divergence of both next-token distributions in nats.
        agrees: With a reference, 1 where both have the same greedy token.
    """

    nll: Float[Array, "B T"]
    greedy: Int[Array, "B T"]
    attended: Float[Array, "B T"]
    read: Float[Array, "B T"]
    served: Float[Array, "B T"]
    of_dense: Float[Array, "B T"]
    shares: Float[Array, "L B _ T"]
    stream: Float[Array, "B T E"]
    divergence: Float[Array, "B T"] | None = None
    agrees: Float[Array, "B T"] | None = None


def simulate(
    model: BaseModel,
    batch: dict[str, Int[Array, "B S"]],
    policy: Policy | str,
    selection: SelectionConfig | None,
    predictor: Predictor | None = None,
    *,
    prompts: Int[Array, " B"] | None = None,
    wanted: Bool[Array, "B T"] | None = None,
    reference: Float[Array, "B T E"] | None = None,
    read: ReadPrompts | None = None,
    score_dtype: str | None = None,
    implementation: str | None = None,
) -> Simulated:
    """Run a batch once, every row under a policy and a budget.

    The pass compiles once for each policy and shape, since the budget is data, and the predictions once for each
    shape. Rows of padding are finite but meaningless.

    Args:
        batch: tokens, segments (0 is padding) and positions, int32 [B, T] each.
        read: What `read_prompts` kept of the first tokens of the batch. Only the T rows after these run, and `wanted`,
            `reference` and the results are theirs alone. The batch holds all tokens.
        policy: The policy that ranks or evicts the keys, or its name.
        selection: Budget, sinks, recent tokens and units; None under a policy that reads everything.
        predictor: Needed by policies with `needs_predictor`.
        prompts: How many first tokens of every document of a sequence are a prompt. Their rows read everything, as in a
            prefill. None: no token.
        wanted: Rows whose next token is asked for; None asks for all. Other rows may be 0, and without a wanted row no
            logits are computed.
        reference: `stream` of another pass over the batch, to compare predictions with.
        score_dtype: "int8" rounds k_imp as decoding stores it; None keeps the predictor's precision.
        implementation: As in `model.causal_attention`, for dense attention.

    Raises:
        ValueError: A token is out of range, the text exceeds the model's context, the policy lacks its predictor, the
            thresholds are those of another model, or the interval does not divide the rows of a chunk. Or prompts were
            read before, and the policy evicts, needs a predictor that they were read without, or has an interval that
            does not divide them.
    """
    require_model(model)
    require_batch(batch)
    rows, length = batch["tokens"].shape
    check_length(model.config, length)
    if prompts is not None and np.shape(prompts) != (rows,):
        raise ValueError(f"prompts must be one number for each of the {rows} rows, got shape {np.shape(prompts)}")
    policy = settle_policy(policy)
    if selection is None and not policy.reads_everything:
        raise ValueError(f"the policy {policy.name} needs a selection; give one, as in SelectionConfig(budget=0.25)")
    policy, predictor = policy.for_predictor(predictor), policy.require_predictor(predictor)
    require_fit(model.config, predictor)
    check_tokens(model.config, batch["tokens"], "B T", batch["segments"])
    batch = as_batch(batch)
    selection = policy.selection(selection)
    if read is not None:
        read.check(policy, predictor, 1 if selection is None else selection.interval)
    limits = None
    if selection is not None:
        selection.check_floor(selection.allocation)
        limits = limits_of(selection, model.config, length, policy.choosing_heads(model.config))
        limits = limits._replace(prompts=None if prompts is None else jnp.asarray(prompts, jnp.int32))
    how = dict(policy=policy, rule=selection and selection.rule, score_dtype=score_dtype, implementation=implementation)
    return _simulate(model, predictor, batch, limits, wanted, reference, read, **how)


def _simulate(model, predictor, batch, limits, wanted, reference, read, **how) -> Simulated:
    """Two programs: policies, and passes with and without a reference, differ in one of them alone."""
    x, *shares_read = _run(model, predictor, batch, limits, read, **how)
    found = _predict(model, x, batch, wanted, reference)
    return Simulated(*found[:2], *shares_read, x, *found[2:])


@partial(compiled, static_argnames=("policy", "rule", "score_dtype", "implementation"))
def _run(model, predictor, batch, limits, read, **how) -> tuple[Array, ...]:
    """The last residual stream, and the fields of `Simulated` from `attended` to `shares`."""
    batch = split_text(batch)
    x, (fractions, shares) = hidden_states(model, predictor, batch, limits, read=read, **how)
    base, heads = model.config, how["policy"].choosing_heads(model.config)
    read, served = count_keys(base, batch["segments"], fractions, heads)
    whole, _ = count_keys(base, batch["segments"], jnp.ones_like(fractions), base.kv_heads)
    attended = jnp.mean(fractions[np.asarray(base.served_layers or (0,))], axis=0)
    return x, attended, read, served, read / whole, shares


@partial(compiled, static_argnames=())
def _predict(model, x, batch, wanted, reference) -> tuple[Array, Array, Array | None, Array | None]:
    """`predict_next` after the rows of a stream, which are the last of a batch."""
    batch = split_text(batch)
    tokens, segments = (batch[name][:, -x.shape[1] :] for name in ("tokens", "segments"))
    return predict_next(model, x, tokens, segments, wanted, reference)


def hidden_states(
    model: BaseModel,
    predictor: Predictor | None,
    batch: dict[str, Int[Array, "B S"]],
    limits: Limits | None,
    *,
    policy: Policy,
    rule: SelectionConfig | None,
    read: ReadPrompts | None = None,
    score_dtype: str | None = None,
    implementation: str | None = None,
) -> tuple[Float[Array, "B T E"], tuple[Float[Array, "L B T"], Float[Array, "L B _ T"]]]:
    """The last residual stream under a policy, and the fractions of its causal keys that each row read.

    The fractions are those of all choosing heads together, and those of each.

    Args:
        limits: Budgets as data; None where everything is read.
        rule: `SelectionConfig.rule`; None where everything is read.
        read: As in `simulate`.
    """
    base, segments, first = model.config, batch["segments"], 0 if read is None else read.tokens
    length = segments.shape[1] - first
    positions = batch["positions"][:, first:]
    x = embed_split(model, batch["tokens"][:, first:])
    dense = dense_mixer(base, segments, implementation) if read is None else last_mixer(base, segments)

    def whole(view):
        """The layer with the keys and values of the prompts read before."""
        return view if read is None else read.extend(view)

    if rule is None:
        x, _, _ = run_layers(model, x, positions, lambda carry, view: dense(carry, whole(split_view(view))), None)
        ones = jnp.ones((base.layers, segments.shape[0], length), jnp.float32)
        return x, (ones, ones[:, :, None])
    how = dict(read=read, implementation=implementation, score_dtype=score_dtype)
    begun, step = importance_walk(predictor, x, batch, **how)

    def attend_kept(view, importance, sliding_window):
        found = evicting_attention(view, segments, sliding_window, policy, limits, rule)
        return found.output, (found.fraction, found.fraction[:, None])

    def attend_chosen(view, importance, sliding_window):
        apply = partial(sparse_chunk, policy=policy, limits=limits, rule=rule, softcap=view.softcap)
        outputs, *parts = map_chunks(apply, view, importance, segments, sliding_window)
        parts = (jnp.moveaxis(part, 0, -2) for part in parts)
        return merge_rows(outputs, length), tuple(p.reshape(*p.shape[:-2], -1)[..., :length] for p in parts)

    attend = attend_kept if isinstance(policy, Evicting) else attend_chosen

    def mixer(walk, view):
        view = split_view(view)
        walk, importance = step(walk, view)
        view = whole(view)

        def leave():
            output = dense(None, view)[0].astype(view.v.dtype)
            return output, jax.tree.map(lambda a: jnp.ones(a.shape, a.dtype), jax.eval_shape(serve, None)[1])

        serve = partial(attend, view, importance)
        output, fractions = by_service(base, view.index, serve, leave)
        return split_heads(output), walk, fractions

    x, _, fractions = run_layers(model, x, positions, mixer, begun)
    return x, fractions


def count_keys(
    config: BaseConfig,
    segments: Int[Array, "B S"],
    fractions: Float[Array, "L B T"],
    heads: int,
) -> Float[Array, "2 B T"]:
    """How many keys each row reads in all layers, and in the served ones, over all heads.

    Args:
        fractions: Share of its causal keys that a row reads in each layer; of all rows, or of the last ones.
        heads: Sets of keys that a served layer chooses. The others read all keys of every KV head.
    """
    count = document_places(segments) + 1
    count = count[:, -fractions.shape[2] :]
    limits = sliding_windows(config)
    if limits is None:
        count = jnp.broadcast_to(count[None], fractions.shape)
    else:
        count = jnp.minimum(count[None], jnp.asarray(limits)[:, None, None])
    sets = jnp.where(jnp.asarray(config.served), heads, jnp.asarray([[config.kv_heads], [0]])).astype(jnp.float32)
    return jnp.einsum("nl,lbt->nbt", sets, fractions * count.astype(jnp.float32))
