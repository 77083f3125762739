"""The settings of `generate` and `serve` that hold for all rows."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from butler_jax.decoding.plan import Plan, check_offload, make_plan, settle_choice
from butler_jax.decoding.prefill_pass import Kept
from butler_jax.decoding.score_cache import check_score_dtype
from butler_jax.policies import Policy
from butler_jax.predictors import Predictor
from butler_jax.selection import SelectionConfig
from butler_jax.storage import whole

if TYPE_CHECKING:
    from butler_jax.weights import Base

TURN = 64  # tokens that run together where a few follow kept ones


@dataclass(frozen=True)
class Decoding:
    """What a compiled prefill or step depends on, beside shapes; the fields are as in `generate`."""

    plan: Plan
    capacity: int
    chunk: int
    score_dtype: str | None
    offload: bool = False

    @property
    def prompts(self) -> dict[str, Any]:
        """The settings of `run_prompts`."""
        return dict(capacity=self.capacity, chunk=self.chunk, score_dtype=self.score_dtype)

    def resumes(self, predictor: Predictor | None) -> bool:
        """Whether a prefill can go on from kept caches.

        A policy that evicts runs the prompt from its first token. The scales of int8 are those of the whole prompt.
        Caches in host memory are not kept.
        """
        if self.offload or self.plan.when == "evicting":
            return False
        return predictor is None or self.score_dtype is None

    def after(self, kept: Kept | None, longest: int) -> Decoding:
        """The same for a prefill that goes on from kept tokens. It has two sizes of chunks, so it compiles twice."""
        if kept is None:
            return self
        few = longest - int(kept.tokens) <= 4 * TURN
        return dataclasses.replace(self, chunk=min(TURN, self.chunk) if few else self.chunk)


def settle_decoding(
    base: Base,
    predictor: Predictor | None,
    selection: SelectionConfig | None,
    policy: Policy | str | None,
    capacity: int,
    *,
    chunk: int,
    offload: bool,
    score_dtype: str | None,
    implementation: str | None,
) -> Decoding:
    """The settings of `generate` or `serve` that hold for all rows, checked. Raises ValueError where one is wrong."""
    chunk = min(whole(chunk, "chunk"), capacity)
    check_score_dtype(score_dtype)
    if score_dtype is not None and predictor is None:
        raise ValueError(f"score_dtype {score_dtype} is for the keys of a predictor, and there is none; leave it out")
    selection, policy = settle_choice(selection, policy, predictor)
    plan = make_plan(base.config, capacity, selection, policy, predictor=predictor, implementation=implementation)
    if selection is not None:
        policy.require_predictor(predictor)
    if offload:
        check_offload(plan, capacity)
    return Decoding(plan, capacity, chunk, score_dtype, offload)
