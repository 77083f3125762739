"""Settings of predictors."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from butler_jax.storage import settle_types

Target = Literal["attention", "weight", "value", "centred"]
Offset = Literal["none", "share", "self_normalised"]


@dataclass(frozen=True, kw_only=True)
class PredictorConfig:
    """The kind of a predictor and its sizes.

    Raises:
        ValueError: A size is out of its range.
    """

    kind: Literal["lookahead", "producer", "contextual"] = field(default="lookahead", metadata={"flag": "predictor"})
    """lookahead (ours), producer (the paper's second version) or contextual (its first)."""
    rank: int = 16
    """R, the length of q_imp and k_imp; even."""
    stride: int | None = None
    """P, the number of layers that one producer serves. Default: 2 for lookahead, 4 for the others. The contextual
    predictor has a single producer and ignores it."""
    target: Target | None = None
    """What exp(score) is trained to be in proportion to: attention, the weight a among the contested keys of a head; or
    an error in the residual stream x that follows from not reading a token: weight a / |x|, value a |v W| / |x|,
    centred a |(v - o) W| / |x|, with v the value, o the output of the row and W the output projection of the head. An
    error has one unit for all heads and layers. Default: centred for lookahead, attention for the others."""
    offset: Offset | None = None
    """A number for each row and query head that makes scores the logarithms of errors. share: added to scores from
    which their log-sum-exp is taken off. self_normalised: added to the scores as they are. Default: share, and none
    where the target is attention."""
    value_channels: int = 0
    """How many of the R numbers of k_imp describe the token's value instead of its key; even, for the lookahead
    predictor."""
    hidden: int | None = None
    """Hidden width I of the predictors contextual and producer. Default: 512."""

    @property
    def counts_values(self) -> bool:
        """Whether the target is an error that follows from a token's value, and not from its weight alone."""
        return self.target in ("value", "centred")

    def __post_init__(self):
        self._set_defaults()
        settle_types(self, "kind")  # a kind may be registered later
        if self.rank <= 0 or self.rank % 2:
            raise ValueError(f"rank must be positive and even, got {self.rank}")
        if (self.target == "attention") != (self.offset == "none"):
            remedy = "leave out the offset" if self.target == "attention" else "leave out one of the two"
            raise ValueError(
                f"a target that is an error needs an offset, and attention has none; got target {self.target} and "
                f"offset {self.offset}: {remedy}"
            )
        if self.offset != "none" and self.kind != "lookahead":
            raise ValueError(
                f"only the lookahead predictor has an offset, not {self.kind}; leave out target and offset, or take it"
            )
        if self.value_channels and self.kind != "lookahead":
            raise ValueError(f"only the lookahead predictor has value channels, not {self.kind}; leave them out")
        if not 0 <= self.value_channels < self.rank or self.value_channels % 2:
            raise ValueError(f"value channels must be even and fewer than the rank, got {self.value_channels}")
        if self.stride <= 0:
            raise ValueError(f"stride must be at least 1, got {self.stride}")
        if self.hidden is not None and self.hidden <= 0:
            raise ValueError(f"hidden must be positive, got {self.hidden}")

    def _set_defaults(self) -> None:
        """Fill in what is left out: stride, target and offset. An offset alone asks for an error as the target."""
        target, offset = self.target, self.offset
        if target is None:
            errors = self.kind == "lookahead" and offset != "none"
            target = "centred" if errors else "attention"
        if offset is None:
            offset = "none" if target == "attention" else "share"
        if self.stride is None:
            object.__setattr__(self, "stride", 2 if self.kind == "lookahead" else 4)
        object.__setattr__(self, "target", target)
        object.__setattr__(self, "offset", offset)
