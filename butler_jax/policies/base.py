"""The interface that all policies share. The two kinds of policies are in scoring.py and eviction.py."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, get_args

import numpy as np

from butler_jax.selection import Allocation, SelectionConfig

if TYPE_CHECKING:
    from butler_jax.model import BaseConfig, BaseModel
    from butler_jax.predictors import Predictor


@dataclass(frozen=True, kw_only=True)
class Policy:
    """Root of `Scoring` and `Evicting`: a frozen dataclass whose fields are the policy's hyper-parameters.

    Derive a policy from one of these two, not from this class.

    Attributes:
        name: What the command line and reports call the policy.
        needs_predictor: Whether a trained predictor's scores are needed.
        is_bound: Whether the policy ranks by what no choice can know beforehand. Reports never name it as the best.
        one_unit: Whether scores are logarithms in one unit for all heads and layers, so that they can share reads.
        estimates_logits: Whether scores estimate attention logits, so that their softmax estimates attention weights.
        form: How the policy differs from its publication, for reports.
    """

    name: ClassVar[str]
    needs_predictor: ClassVar[bool] = False
    is_bound: ClassVar[bool] = False
    one_unit: ClassVar[bool] = False
    estimates_logits: ClassVar[bool] = False
    form: ClassVar[str] = ""

    def prepare(self, model: BaseModel, batches: Sequence[dict[str, np.ndarray]]) -> Policy:
        """Learn from text what the policy needs to know about a model; by default nothing.

        batches: tokens, segments and positions, int32 [B, T] each.
        """
        return self

    def require_predictor(self, predictor: Any) -> Any:
        """The predictor, or the run that holds it, if the policy needs one. Raise ValueError where that is None."""
        if self.needs_predictor and predictor is None:
            raise ValueError(
                f"the policy {self.name} needs a trained predictor; give --run RUN (a run of butler-jax train; "
                "run=RUN in --model_args, predictor= in Python), or another policy"
            )
        return predictor if self.needs_predictor else None

    def for_predictor(self, predictor: Predictor | None) -> Policy:
        """The policy as it uses a predictor; by default the policy itself. Raises ValueError as `require_predictor`."""
        self.require_predictor(predictor)
        return self

    def selection(self, config: SelectionConfig) -> SelectionConfig | None:
        """The selection under which the policy runs; None reads everything. By default it is `config`.

        Raises:
            ValueError: The selection has an allocation between heads that the policy cannot compare.
        """
        if not self.allows(config.allocation):
            lack = "are no estimates of attention logits"
            if config.allocation != "top_p":
                lack = "have no common unit for all heads"
            others = [name for name in get_args(Allocation) if self.allows(name)]
            raise ValueError(
                f"the scores of the policy {self.name} {lack}, which the allocation {config.allocation} needs; take "
                f"{' or '.join(others)}"
            )
        return config

    def allows(self, allocation: Allocation) -> bool:
        """Whether heads can share reads in this way by the policy's scores."""
        if allocation == "top_p":
            return self.estimates_logits
        return allocation == "per_head" or self.one_unit

    @property
    def reads_everything(self) -> bool:
        """Whether every key is read, whatever the budget."""
        return self.selection(SelectionConfig()) is None

    @property
    def generation_mode(self) -> str:
        """How a prompt and new tokens are read in generation, for reports."""
        return "the prompt is prefilled densely, every new token attends its own choice"

    def choosing_heads(self, base: BaseConfig) -> int:
        """How many sets of tokens a layer chooses for a row; by default one for each KV head."""
        return base.kv_heads

    def numbers_read_per_key(self, base: BaseConfig, predictor: Predictor | None) -> float:
        """The numbers read per cached token and KV head to make a choice; by default 0."""
        return 0.0

    def cached_numbers_per_key(self, base: BaseConfig) -> float:
        """Those of `numbers_read_per_key` that are keys or values, and so in the cache's precision; by default 0."""
        return 0.0

    def row_by_row(self) -> Policy:
        """The form of the policy that an evaluation runs: it limits row after row. By default the policy itself."""
        return self


def describe(policy: Policy) -> dict[str, Any]:
    """The name and the hyper-parameters for reports, without the arrays that `prepare` found on text."""
    settings = {field.name: getattr(policy, field.name) for field in dataclasses.fields(policy)}
    return {"name": policy.name, **{f: value for f, value in settings.items() if not isinstance(value, np.ndarray)}}
