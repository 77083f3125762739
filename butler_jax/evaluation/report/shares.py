"""The shares of the keys that rows of a report read: in the served layers, and in all layers of what dense reads."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Row = Mapping[str, Any]
DASH = "\u2013"
READ = ("attended", "attended_of_dense")
"""The shares of the keys that a row of a report has."""


def is_finite(value: Any) -> bool:
    """Whether a value is a number, and finite."""
    return value is not None and math.isfinite(value)


def find_shares(rows: Sequence[Row], name: str) -> tuple[float, float] | None:
    """The smallest and the largest share of this name among the rows that have it and a budget."""
    shares = [r[name] for r in rows if r["budget"] is not None and is_finite(r.get(name))]
    return (min(shares), max(shares)) if shares else None


def _format_shares(shares: tuple[float, float]) -> str:
    """'15.0 %', or a range."""
    low, high = (f"{100 * share:.1f}" for share in shares)
    return f"{low} %" if low == high else f"{low}{DASH}{high} %"


def name_served(rows: Iterable[Row]) -> str:
    """Which layers a share of the keys is about."""
    return "in the served layers" if is_mixed(rows) else "in the layers after the first"


def is_mixed(rows: Iterable[Row]) -> bool:
    """Whether rows are about a base in which a layer other than layer 0 is not served."""
    return any(is_finite(r.get("attended_of_dense")) for r in rows)


@dataclass(frozen=True)
class TableColumn:
    """A budget or a part of a task, with the smallest and the largest share of the keys that policies read there.

    Attributes:
        label: Its heading.
        read: In the served layers.
        of_dense: In all layers, of what dense reads; None where layer 0 alone is not served.
    """

    label: str
    read: tuple[float, float] | None = None
    of_dense: tuple[float, float] | None = None

    @property
    def share(self) -> str:
        """'15.0 % read', or a range where policies differ; empty where unknown."""
        if self.read is None:
            return ""
        words = f"{_format_shares(self.read)} read"
        return words if self.of_dense is None else f"{words}, {_format_shares(self.of_dense)} in all layers"
