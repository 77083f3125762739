"""Settings of a selection: the budget, and what is read whatever its score."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class SelectionConfig:
    """How many tokens a query attends, and which of them are never left to the scores.

    budget: all attended tokens, sinks, recent and neighbours included. A float is a fraction of the keys a dense query
    would attend, rounded up, and never less than `least`; an int is a number of tokens. sinks: first tokens of the
    document. recent: newest tokens, the query's own included. unit: tokens are chosen in pages of so many, a power of
    two, each by its best token. threshold: per layer and KV head [L][K], what scores below it is not read even where
    the budget has room (`calibrate_thresholds` makes them; layer 0's are ignored); the budget is then the most a row
    takes. interval: decode steps from one choice to the next; the chosen stay until then, the recent tokens move on.
    neighbours: of what scores choose, only half the room is filled, and each run of c consecutive units brings the c
    units to its right. min_context: rows of up to so many tokens attend everything.
    """

    budget: float | int = 0.25
    sinks: int = 4
    recent: int = 8
    unit: int = 1
    threshold: tuple[tuple[float, ...], ...] | None = None
    interval: int = 1
    neighbours: bool = False
    min_context: int = 0

    def __post_init__(self):
        for name in ("budget", "sinks", "recent", "unit", "interval", "min_context"):
            value = getattr(self, name)
            if hasattr(value, "item"):  # of numpy
                value = value.item()
                object.__setattr__(self, name, value)
            kinds = (int, float) if name == "budget" else int
            if not (isinstance(value, kinds) and not isinstance(value, bool)):
                raise ValueError(f"{name} must be a {'number' if name == 'budget' else 'whole number'}, got {value!r}")
        if not self.sinks >= 0:
            raise ValueError(f"sinks must be 0 or more, got {self.sinks}")
        if not self.recent >= 1:
            raise ValueError(f"recent must be at least 1 (the token itself), got {self.recent}")
        if not (self.unit >= 1 and self.unit & (self.unit - 1) == 0):
            raise ValueError(f"the unit must be a power of two (1, 2, 4, ...), got {self.unit!r}")
        if not self.interval >= 1:
            raise ValueError(f"the interval must be at least 1 step, got {self.interval}")
        if not self.min_context >= 0:
            raise ValueError(f"min_context must be 0 or more tokens, got {self.min_context}")
        if not self.budget > 0:
            raise ValueError(
                f"the budget must be above 0, got {self.budget}; give a fraction such as 0.25 or a number of tokens"
            )
        if isinstance(self.budget, float):
            if not self.budget <= 1:
                raise ValueError(
                    f"a fractional budget is at most 1.0, got {self.budget}; give an integer for a number of tokens"
                )
        else:
            pages = "" if self.unit == 1 else f" in pages of {self.unit}"
            if not self.budget >= self.least:
                raise ValueError(
                    f"a budget of {self.budget} tokens is below {self.sinks} sinks + {self.recent} recent{pages} = "
                    f"{self.least}; give at least {self.least}, or a fraction such as 0.25 (everything is 1.0)"
                )
        if self.threshold is not None:
            shape = "threshold must hold one number for every layer and KV head, [L][K]"
            try:
                rows = tuple(tuple(float(value) for value in row) for row in self.threshold)
            except TypeError:
                raise ValueError(f"{shape}; got {self.threshold!r}") from None
            if not (len(rows) > 0 and len({len(row) for row in rows}) == 1 and len(rows[0]) > 0):
                raise ValueError(f"{shape}; got rows of {sorted({len(row) for row in rows})} numbers")
            object.__setattr__(self, "threshold", rows)

    @property
    def rule(self) -> SelectionConfig:
        """The same without budget, thresholds and min_context, which jitted code takes as data."""
        return dataclasses.replace(self, budget=1.0, threshold=None, min_context=0)

    @property
    def least(self) -> int:
        """The most tokens that sinks and recent take, whole pages counted: every row's budget is at least this."""
        return -(-self.sinks // self.unit) * self.unit + self.recent + self.unit - 1


def parse_budget(text: str | float | int) -> float | int:
    """'0.25' or '1/4' -> 0.25, '256' -> 256 tokens; numbers stay. Raises ValueError for anything else."""
    if not isinstance(text, str):
        return text
    top, slash, bottom = text.partition("/")
    try:
        return float(top) / float(bottom) if slash else float(text) if not text.isdigit() else int(text)
    except (ValueError, ZeroDivisionError):
        raise ValueError(
            f"budget {text!r} is not a number; write a fraction (0.25 or 1/4) or a number of tokens (256)"
        ) from None
