"""Settings of a selection: the budget, and the tokens that are read whatever their scores."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Literal

from butler_jax.storage import settle_types

Allocation = Literal["per_head", "per_layer", "tolerance", "top_p"]
LIMITED = ("tolerance", "top_p")  # allocations whose rows read what reaches a tolerance


@dataclass(frozen=True, kw_only=True)
class AlwaysReadConfig:
    """The tokens that a query reads whatever their scores.

    Raises:
        ValueError: A number is not a whole number, or negative.
    """

    sinks: int = 4
    """First tokens of a document that are always read."""
    recent: int = 8
    """Newest tokens that are always read, the query's own among them."""

    def __post_init__(self):
        settle_types(self)
        self._require_at_least(0, "sinks", "recent")

    def _require_at_least(self, least: int, *names: str) -> None:
        """Raise ValueError where a field is below `least`."""
        for name in names:
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True)
class SelectionConfig(AlwaysReadConfig):
    """How many cached tokens a query reads, and how they are chosen.

    Raises:
        ValueError: A setting is out of its range, or the budget does not cover sinks and recent tokens.
    """

    budget: int | float | str = 0.25
    """Tokens that a query reads, with sinks, recent tokens and neighbours: a fraction of the tokens it may see (0.25 or
    1/4), rounded up, or a number of tokens (256)."""
    unit: int = 1
    """Tokens chosen together, a power of two. A page counts by its best token."""
    threshold: tuple[tuple[float, ...], ...] | None = field(default=None, metadata={"flag": None})
    """[L][K] scores: a token with a lower score is not read even where the budget has room. `calibrate_thresholds`
    makes them. The entries of layers that are not served are ignored."""
    interval: int = 1
    """Decode steps from one choice to the next. The steps between read what was chosen, and all tokens since."""
    neighbours: bool = False
    """Choose half of the budget beside sinks and recent tokens by score. Each run of c chosen units then brings the c
    units to its right."""
    min_context: int = 0
    """Rows of up to this many tokens read everything."""
    allocation: Allocation = "per_head"
    """How reads are shared out. per_head: every head reads its own budget. per_layer: the K choosing heads of a layer
    share K budgets, and their tokens are ranked together. tolerance: every head of every layer reads the tokens that
    score at least the logarithm of --tolerance. per_layer and tolerance need a policy whose scores have one unit for
    all heads. top_p: every head reads the fewest tokens whose estimated attention weights sum to p = 1 - tolerance
    (Twilight, Lin et al. 2025, arXiv 2502.02770). It needs a policy whose scores estimate attention logits. Under
    tolerance and top_p, the budget is the most that a head may read."""
    tolerance: float | None = None
    """Under the allocation tolerance, the error in the residual stream, relative to its norm, below which a token is
    not read. Under top_p, the share of the estimated attention weight that may stay unread, 1 - p.
    `calibrate_tolerance` finds both for a mean budget."""
    tail: int = 0
    """Tokens of a span. The keys of a span that are not read are estimated by the means of its keys and values
    (RetroInfer, Chen et al. 2025, arXiv 2505.02922, with spans for its clusters). 0: they count for nothing."""
    floor: float = 0.0
    """Under the allocation per_layer, the share of its budget that every head reads in any case (0.2 in AdaKV, Feng et
    al. 2024, arXiv 2407.11550)."""

    def __post_init__(self):
        object.__setattr__(self, "budget", parse_budget(self.budget))
        settle_types(self)
        self._require_at_least(0, "sinks", "unit", "min_context", "tail")
        self._require_at_least(1, "recent", "interval")
        if self.unit.bit_count() != 1:
            raise ValueError(f"the unit must be a power of two (1, 2, 4, ...), got {self.unit}")
        if self.tail % self.unit:
            raise ValueError(f"the tail must be a multiple of the unit {self.unit}, got {self.tail}")
        self._check_budget()
        self._check_allocation()
        if self.threshold is not None:
            object.__setattr__(self, "threshold", _table(self.threshold))

    def _check_budget(self) -> None:
        """Raise ValueError where the budget is out of its range."""
        if not self.budget > 0:
            raise ValueError(
                f"the budget must be above 0, got {self.budget}; give a fraction such as 0.25 or a number of tokens"
            )
        if isinstance(self.budget, float):
            if self.budget > 1:
                raise ValueError(
                    f"a fractional budget is at most 1.0, got {self.budget}; give an integer for a number of tokens"
                )
        elif self.budget < self.least:
            pages = "" if self.unit == 1 else f" in pages of {self.unit}"
            raise ValueError(
                f"a budget of {self.budget} tokens is below {self.sinks} sinks + {self.recent} recent{pages} = "
                f"{self.least}; give at least {self.least}, or a fraction such as 0.25 (everything is 1.0)"
            )

    def _check_allocation(self) -> None:
        """Raise ValueError for settings that belong to another allocation."""
        if self.tolerance is not None:
            if self.allocation not in LIMITED:
                known = " and ".join(LIMITED)
                raise ValueError(f"a tolerance goes with the allocations {known}, the allocation is {self.allocation}")
            if not self.tolerance >= 0:
                raise ValueError(f"the tolerance must be at least 0, got {self.tolerance}")
            if self.allocation == "top_p" and 1 < self.tolerance < math.inf:
                raise ValueError(
                    f"under top_p the tolerance is 1 - p, a share (0 ... 1) of weight; got {self.tolerance}"
                )
        if self.threshold is not None and self.allocation != "per_head":
            raise ValueError(f"thresholds go with the allocation per_head, the allocation is {self.allocation}")
        if not 0 <= self.floor <= 1:
            raise ValueError(f"the floor is a share (0 ... 1) of a head's budget, got {self.floor}")

    def check_floor(self, *allocations: str) -> None:
        """Raise ValueError for a floor that none of the allocations uses."""
        if self.floor and "per_layer" not in allocations:
            raise ValueError(
                f"a floor goes with the allocation per_layer, and this is {', '.join(allocations)}; leave out the floor"
            )

    def require_tolerance(self) -> None:
        """Raise ValueError where the allocation needs a tolerance, and there is none."""
        if self.allocation in LIMITED and self.tolerance is None:
            raise ValueError(
                f"the allocation {self.allocation} needs a tolerance; give one, or let calibrate_tolerance find it"
            )

    @property
    def rule(self) -> SelectionConfig:
        """The same without budget, thresholds, tolerance and min_context, which jitted code takes as data."""
        return dataclasses.replace(self, budget=1.0, threshold=None, tolerance=None, min_context=0)

    @property
    def least(self) -> int:
        """The most tokens that sinks and recent take, whole pages counted: every row's budget is at least this."""
        return -(-self.sinks // self.unit) * self.unit + self.recent + self.unit - 1


def parse_budget(budget: str | float | int) -> float | int:
    """A budget as a number, from "0.25" or "1/4" (a fraction), "256" (tokens), or a number.

    Raises:
        ValueError: It is none of these.
    """
    if getattr(budget, "size", 0) == 1:  # a number of numpy
        budget = budget.item()
    if isinstance(budget, (int, float)) and not isinstance(budget, bool):
        return budget
    if isinstance(budget, Fraction):
        return float(budget)
    try:
        top, slash, bottom = budget.partition("/")
        return float(top) / float(bottom) if slash else int(top) if top.isdigit() else float(top)
    except (ValueError, ZeroDivisionError, AttributeError):
        raise ValueError(
            f"budget {budget!r} is not a number; write a fraction (0.25 or 1/4) or a number of tokens (256)"
        ) from None


def _table(threshold: tuple[tuple[float, ...], ...]) -> tuple[tuple[float, ...], ...]:
    """Thresholds as tuples of floats; raises ValueError where the rows are not of one length."""
    shape = "threshold must hold one number for every layer and KV head, [L][K]"
    try:
        rows = tuple(tuple(float(value) for value in row) for row in threshold)
    except (TypeError, ValueError):
        raise ValueError(f"{shape}; got {threshold!r}") from None
    if any(math.isnan(value) for row in rows for value in row):
        raise ValueError(f"{shape}; one of them is NaN")
    widths = {len(row) for row in rows}
    if len(widths) != 1 or 0 in widths:
        raise ValueError(f"{shape}; got rows of {sorted(widths)} numbers")
    return rows
