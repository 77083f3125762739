"""What every step of a decoding does, settled before the first one."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import jax
import numpy as np
from jaxtyping import Array, Int

from butler_jax.decoding.parts import check_units
from butler_jax.decoding.span_means import SpanMeans
from butler_jax.model import BaseConfig, require_fit
from butler_jax.parallel import current_mesh, token_axis
from butler_jax.policies import Evicting, Policy, settle_policy
from butler_jax.selection import SelectionConfig, budget_table, limits_of, room_for
from pallas_kernels import check_implementation

if TYPE_CHECKING:
    from butler_jax.decoding.cache import DecodeState
    from butler_jax.decoding.store import KVStore
    from butler_jax.predictors import Predictor


@dataclass(frozen=True)
class Plan:
    """What is chosen, by which policy and when.

    Attributes:
        selection: The selection as the policy uses it; None where everything is read.
        policy: The policy that ranks the tokens.
        when: "never": everything is read. "ahead": the predictor's scores alone decide, so that a block of layers has
            its choice before it runs. "in_layer": the policy ranks by the layer's own queries and keys. "evicting": the
            policy evicts.
        heads: Sets of units that a layer chooses for a row.
        room: Units that a set has room for.
        implementation: Of pallas_kernels; None takes the platform's.
    """

    selection: SelectionConfig | None
    policy: Policy
    when: Literal["never", "ahead", "in_layer", "evicting"]
    heads: int
    room: int
    implementation: str | None = None

    @property
    def interval(self) -> int:
        """Steps from one choice to the next."""
        return 1 if self.selection is None else self.selection.interval

    @property
    def tail(self) -> int:
        """Tokens of a span whose unread keys are estimated; 0 where none are."""
        return 0 if self.selection is None else self.selection.tail

    def span_means(self, kv: KVStore, lengths: Int[Array, " B"]) -> SpanMeans | None:
        """The means that the steps need of a cache whose rows hold `lengths` tokens; None without a tail."""
        return SpanMeans.of(kv, lengths, self.tail) if self.tail else None


def settle_choice(
    selection: SelectionConfig | None, policy: Policy | str | None, predictor: Predictor | None
) -> tuple[SelectionConfig | None, Policy]:
    """The selection and the policy of a decoding: the default ones where only the other or a predictor is given.

    Raises ValueError where no policy has the name, and where either is another thing.
    """
    if not isinstance(selection, SelectionConfig | None):
        raise ValueError(f"selection must be a SelectionConfig, got {selection!r}; write SelectionConfig(budget=0.25)")
    if selection is None and (predictor is not None or policy is not None):
        selection = SelectionConfig()
    return selection, settle_policy(policy)


def make_plan(
    base: BaseConfig,
    capacity: int,
    selection: SelectionConfig | None,
    policy: Policy | None = None,
    *,
    predictor: Predictor | None = None,
    most: int | None = None,
    implementation: str | None = None,
) -> Plan:
    """The plan of a decoding.

    Args:
        selection: Which cached tokens are read; None reads all.
        policy: The policy that ranks them; None is `TokenButler()`.
        predictor: Whose scores the policy uses; None where it uses none, or where that is not yet known.
        most: The largest budget of any row, in tokens, where it is known to be below that of a full cache.

    Raises:
        ValueError: For a floor without per_layer, thresholds of another model, a predictor of a base of other sizes,
            units that a mesh would split, a policy that evicts on a mesh, and where jax_enable_x64 is set.
    """
    check_implementation(implementation)
    if jax.config.jax_enable_x64:
        raise ValueError(
            "decoding computes in 32 bits: leave jax_enable_x64 off, or decode under jax.enable_x64(False)"
        )
    require_fit(base, predictor)
    _, policy = settle_choice(selection, policy, predictor)
    policy = policy if predictor is None else policy.for_predictor(predictor)
    selection = None if selection is None else policy.selection(selection)
    if selection is None:
        return Plan(None, policy, "never", base.kv_heads, 0, implementation)
    if selection.tail > capacity:  # there is no whole span
        selection = replace(selection, tail=0)
    selection.check_floor(selection.allocation)
    heads = policy.choosing_heads(base)
    limits_of(selection, base, capacity, heads)
    check_units(capacity, selection.unit)
    if isinstance(policy, Evicting):
        if current_mesh() is not None:
            raise ValueError(
                f"the policy {policy.name} decodes on one device: leave the mesh, or take a policy that does not evict"
            )
        when = "evicting"
    else:
        ahead = policy.predictor_pooling is not None and selection.allocation != "top_p"  # weighed per query head
        when = "ahead" if ahead else "in_layer"
    room = room_for(selection, capacity, most, heads=heads)
    return Plan(selection, policy, when, heads, room, implementation)


def plan_step(plan: Plan, base: BaseConfig, capacity: int, lengths: Int[np.ndarray, " B"], step: int) -> Plan:
    """The plan of one step: dense while no row is beyond min_context, with less room where no row needs more.

    A policy that evicts keeps from the first token on.

    Args:
        lengths: Tokens of the prompts.
        step: Steps before this one.
    """
    selection = plan.selection
    if selection is None or selection.min_context == 0 or plan.when == "evicting":
        return plan
    window = base.sliding_window if base.serves_windows else capacity
    seen = np.minimum(lengths + step + 1 - step % selection.interval, window)  # by each row when its units were chosen
    if (seen <= selection.min_context).all():
        return make_plan(base, capacity, None, plan.policy, implementation=plan.implementation)
    if (seen <= selection.min_context).any():
        return plan
    most = int(budget_table(selection, capacity)[selection.min_context + 1 :].max())
    return replace(plan, room=room_for(selection, capacity, most, heads=plan.heads))


def check_plan(plan: Plan, state: DecodeState, predictor: Predictor | None) -> None:
    """Raise ValueError where a step cannot be done; lengths that are still on the device are not checked."""
    if not isinstance(state.lengths, jax.core.Tracer):
        longest, capacity = int(np.max(np.asarray(state.lengths))), state.kv.capacity
        if longest >= capacity:
            raise ValueError(
                f"the cache is full: a row holds {longest} of {capacity} tokens; prefill with a larger capacity"
            )
    if plan.when == "evicting":
        _check_eviction(plan, state)
        return
    if state.kv.evicting:
        raise ValueError(
            "the state was prefilled under a policy that evicts; decode with the same selection and policy"
        )
    if predictor is not None and state.scores is None:
        raise ValueError(
            "the state has no k_imp: prefill or a step ran without the predictor; give it to prefill and every step"
        )
    if plan.selection is not None:
        plan.policy.require_predictor(predictor)
    if plan.tail and (state.spans is None or state.spans.size != plan.tail):
        raise ValueError(
            f"a tail of spans of {plan.tail} tokens needs their means, which the state does not have; give the "
            "selection to prefill too"
        )
    if plan.interval == 1:
        return
    if state.memory is None:
        raise ValueError(
            f"an interval of {plan.interval} keeps a choice over the steps, and the state has no room for one; give "
            "the selection to prefill too"
        )
    heads, room = state.memory.indices.shape[2:]
    if (heads, room) != (plan.heads, plan.room):
        raise ValueError(
            f"the state has room for {room} units of {heads} heads, and this selection chooses {plan.room} of "
            f"{plan.heads}: prefill was done for another one; give both the same"
        )


def check_offload(plan: Plan, capacity: int) -> None:
    """Raise ValueError where keys and values cannot lie in host memory."""
    if plan.when == "evicting":
        raise ValueError(f"the policy {plan.policy.name} needs its caches on the device: leave out offload")
    if token_axis(capacity) is not None:
        raise ValueError(
            "the mesh splits the tokens of the caches, and caches in host memory stay whole: leave out offload, or the "
            "sequence axis"
        )


def _check_eviction(plan: Plan, state: DecodeState) -> None:
    """Raise ValueError for a state in host memory, or one that was not prefilled under this policy."""
    name = plan.policy.name
    if state.kv.on_host:
        raise ValueError(f"the policy {name} needs its caches on the device: leave out offload")
    fits = state.kv.evicting
    if fits:
        wanted = jax.eval_shape(lambda: plan.policy.begin(state.memory.kept.shape[1:]))
        found = state.memory.memory
        fits = jax.tree.structure(wanted) == jax.tree.structure(found) and all(
            a.shape == b.shape[1:] for a, b in zip(jax.tree.leaves(wanted), jax.tree.leaves(found), strict=True)
        )
    if not fits:
        raise ValueError(
            f"the state was not prefilled under the policy {name}, which has to know what was kept; give prefill the "
            "same selection and policy"
        )
