"""Perplexity of text under a policy, beside that of the dense pass."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from butler_jax.data import Batch, find_counted, require_batches
from butler_jax.evaluation.cells import Cell
from butler_jax.evaluation.config import EvalConfig
from butler_jax.evaluation.contenders import EvaluatedPolicy
from butler_jax.evaluation.tasks.base import Task
from butler_jax.evaluation.tasks.texts import name_windows
from butler_jax.model import BaseConfig, BaseModel, check_length
from butler_jax.parallel import current_mesh, hash_arrays, on_host
from butler_jax.policies import Dense, Policy
from butler_jax.predictors import Predictor
from butler_jax.selection import SelectionConfig
from butler_jax.simulation import Estimate, count_keys, estimate_ratio, simulate
from butler_jax.weights import Base

BINS = 32  # of positions in a window


@dataclass(frozen=True)
class TextSums:
    """Sums over the counted rows of each sequence; a row counts where its next token is predicted.

    Attributes:
        rows: How many rows count.
        nll: Negative log-likelihoods of the next tokens, in nats.
        attended: Keys that were read in the served layers, mean over the choosing heads, in the units of `served_held`.
        read: Keys that were read in all layers and KV heads.
        held: Keys that a dense pass reads there.
        served: Keys that were read in the served layers.
        served_held: Keys that a dense pass reads there; of a base without served layers, those of all layers.
        heads: Keys that every layer and choosing head read, in the units of `served_held`.
        positions: Attended fractions of the rows in each bin of positions, and how many rows count there.
        divergence: Divergences from a reference, as in `Simulated`; None without one.
        agrees: Agreements with a reference, likewise.
    """

    rows: Float[np.ndarray, " sequences"]
    nll: Float[np.ndarray, " sequences"]
    attended: Float[np.ndarray, " sequences"]
    read: Float[np.ndarray, " sequences"]
    held: Float[np.ndarray, " sequences"]
    served: Float[np.ndarray, " sequences"]
    served_held: Float[np.ndarray, " sequences"]
    heads: Float[np.ndarray, "sequences L _"]
    positions: Float[np.ndarray, "sequences 2 _"]
    divergence: Float[np.ndarray, " sequences"] | None = None
    agrees: Float[np.ndarray, " sequences"] | None = None

    @property
    def perplexity(self) -> Estimate:
        """exp of the mean negative log-likelihood."""
        return self.mean("nll").exp()

    def excess_over(self, other: TextSums) -> Estimate:
        """The fraction by which the perplexity exceeds that of another pass over the same text, paired by sequence."""
        return estimate_ratio(self.nll - other.nll, self.rows).expm1()

    def mean(self, name: str) -> Estimate:
        """The mean over rows of one of the sums."""
        return estimate_ratio(getattr(self, name), self.rows)

    @property
    def share_attended(self) -> Estimate:
        """The share of all causal keys that was read in the served layers."""
        return estimate_ratio(self.attended, self.served_held)._replace(n=self.mean("nll").n)

    def find_reads(self, base: BaseConfig) -> dict[str, list]:
        """Shares of the keys that were read, JSON-ready.

        Returns:
            heads: [L - 1][heads], of the keys of all rows, in the layers after the first; None where a layer is not
            served. positions: of each bin, the mean over rows, in all served layers and heads; None where no row
            counts.
        """
        heads = self.heads.sum(axis=0) / self.served_held.sum()
        heads[~np.asarray(base.served)] = np.nan
        attended, rows = self.positions.sum(axis=0)
        positions = [round(a / n, 5) if n else None for a, n in zip(attended.tolist(), rows.tolist(), strict=True)]
        return {"heads": list_known(heads[1:]), "positions": positions}


def measure_perplexity(
    model: BaseModel,
    batches: Sequence[Batch],
    policy: Policy,
    selection: SelectionConfig,
    predictor: Predictor | None = None,
    *,
    prompt_tokens: int = 0,
    references: Sequence[Float[Array | np.ndarray, "B T E"]] | None = None,
    keep: list | None = None,
    score_dtype: str | None = None,
    implementation: str | None = None,
) -> TextSums:
    """Run batches under a policy and a budget.

    Args:
        batches: tokens, segments, positions [B, T], and `counted` where not every token is predicted.
        predictor: Needed by policies that rank by a predictor's scores.
        prompt_tokens: First tokens of every document that are read densely; their rows do not count.
        references: The last residual streams of another pass over the batches, to compare predictions with.
        keep: A list that receives the last residual streams of this pass.
        score_dtype: As `simulate` takes it.

    Raises:
        ValueError: There is no token to predict, or a window is longer than the model's context.
    """
    require_batches(batches)
    if not batches:
        raise ValueError("perplexity is measured on text: give at least one batch")
    masks = [find_counted(batch) & (batch["positions"] >= prompt_tokens) for batch in batches]
    if not any(mask.any() for mask in masks):
        longest = max(int(batch["positions"].max()) + 1 for batch in batches)
        raise ValueError(
            f"there is no token to predict: the longest document has {longest} tokens, of which the first "
            f"{prompt_tokens} are a prompt; give longer texts, or a smaller --prompt-tokens (0 limits every row)"
        )
    check_length(model.config, batches[0]["tokens"].shape[1])
    found: dict[str, list] = {f.name: [] for f in dataclasses.fields(TextSums)}
    options = dict(score_dtype=score_dtype, implementation=implementation)
    for number, batch in enumerate(batches):
        counted = masks[number]
        wanted = counted if "counted" in batch or prompt_tokens else None
        prompts = jnp.full(len(counted), prompt_tokens, jnp.int32) if prompt_tokens else None
        reference = None if references is None else references[number]
        result = simulate(
            model, batch, policy, selection, predictor, prompts=prompts, wanted=wanted, reference=reference, **options
        )
        every = jnp.ones((model.config.layers, *counted.shape))
        held, served = count_keys(model.config, jnp.asarray(batch["segments"]), every, model.config.kv_heads)
        served = served if model.config.served_layers else held
        names = ("nll", "read", "served", "divergence", "agrees")
        parts = {"rows": counted, "held": held, "served_held": served, "attended": result.attended * served}
        parts |= {name: getattr(result, name) for name in names}
        for name, values in parts.items():
            if values is not None:
                found[name].extend(np.where(counted, _float64(values), 0).sum(axis=1))
        found["heads"].extend(np.einsum("lbht,bt->blh", _float64(result.shares), counted * _float64(served)))
        found["positions"].extend(_sum_bins(batch["positions"], _float64(result.attended), counted))
        if keep is not None:  # on a mesh it stays where it is: no device and no host has to hold all of it
            keep.append(np.asarray(result.stream) if current_mesh() is None else result.stream)
    return TextSums(**{name: np.asarray(values) if values else None for name, values in found.items()})


def _float64(values: Array | np.ndarray) -> np.ndarray:
    return on_host(values).astype(np.float64)


def find_bin_size(length: int) -> int:
    """Tokens of a bin of positions in windows of `length` tokens."""
    return -(-length // BINS)


def list_known(values: Float[np.ndarray, "*_"]) -> list:
    """The values as nested lists, rounded; None for NaN."""
    rounded = np.round(values, 5)
    return np.where(np.isnan(rounded), None, rounded).tolist() if np.isnan(rounded).any() else rounded.tolist()


def _sum_bins(
    positions: Int[np.ndarray, "B T"], attended: Float[np.ndarray, "B T"], counted: Bool[np.ndarray, "B T"]
) -> Float[np.ndarray, "B 2 _"]:
    """The attended fractions of the counted rows in each bin of positions, and their number."""
    places = positions // find_bin_size(positions.shape[1])
    inside = (places[..., None] == np.arange(BINS)) & counted[..., None]
    return np.stack([np.einsum("bt,btn->bn", attended, inside), inside.sum(axis=1)], axis=1)


class PerplexityTask(Task):
    """Perplexity, how next-token distributions differ from the dense ones, and what is read for a token."""

    name = "perplexity"

    def __init__(self, base: Base, config: EvalConfig, batches: Sequence[Batch]):
        check_length(base.config, batches[0]["tokens"].shape[1])
        super().__init__(base, config, {"batches": hash_arrays(batches)})
        self.batches, self.unit = batches, name_windows(config)

    @cached_property
    def dense(self) -> tuple[TextSums, list]:
        """The dense pass, and its last residual streams."""
        streams: list = []
        options = dict(prompt_tokens=self.config.prompt_tokens, keep=streams)
        sums = measure_perplexity(self.base.model, self.batches, Dense(), self.config.selection_at(1.0), **options)
        return sums, streams

    def evaluate(self, policy, selections):
        """Measure one budget."""
        ((budget, selection),) = selections.items()
        reference, streams = self.dense
        result = reference
        if not policy.dense:
            result = measure_perplexity(
                self.base.model,
                self.batches,
                policy.policy,
                selection,
                policy.predictor,
                prompt_tokens=self.config.prompt_tokens,
                references=streams,
                score_dtype=self.config.score_dtype,
            )
        found = {"perplexity": result.perplexity}
        if result.divergence is not None:
            found["over_dense"] = result.excess_over(reference)
            found["js_divergence"], found["top1_agreement"] = result.mean("divergence"), result.mean("agrees")
        base = self.base.config
        attended, layers, served = result.share_attended, base.layers, len(base.served_layers)
        found["effective_sparsity"] = attended.through(
            lambda share: 1 - (layers - served + served * share) / layers, served / layers
        )
        for prefix in ("", "served_") if base.mixed else ("",):
            read = self._sum_bytes(policy, result, prefix, selection.interval)
            found[f"{prefix}bytes_read"] = estimate_ratio(read, result.rows)
            if not policy.dense:
                whole = self._sum_bytes(EvaluatedPolicy("dense", Dense()), reference, prefix)
                share = estimate_ratio(read, whole)._replace(n=found["bytes_read"].n)
                found[f"{prefix}bytes_of_dense"] = share
        shares = dict(attended=attended.value, of_dense=estimate_ratio(result.read, result.held).value)
        size = find_bin_size(self.batches[0]["tokens"].shape[1])
        return Cell(
            [self.make_row(policy, name, e, budget=budget, **shares) for name, e in found.items()],
            {} if policy.dense else {"reads": [{"budget": budget, "bin_size": size, **result.find_reads(base)}]},
        )

    def _sum_bytes(
        self, policy: EvaluatedPolicy, sums: TextSums, prefix: str = "", interval: int = 1
    ) -> Float[np.ndarray, " sequences"]:
        """Bytes of caches read in all rows of each sequence: keys and values, what the policy ranks by, and the tail.

        Args:
            prefix: "served_" for the served layers alone.
            interval: Rows of which one chooses, and so reads what the policy ranks by.
        """
        base = self.base.config
        size = self.base.dtype.itemsize
        numbers = policy.policy.numbers_read_per_key(base, policy.predictor)
        scored = 1 if policy.policy.needs_predictor and self.config.score_dtype == "int8" else size
        whole = 0 < policy.tail <= self.batches[0]["tokens"].shape[1]  # a longer span is never whole
        means = 2 * base.head_dim / policy.tail if whole else 0.0
        held = sums.served_held if base.mixed else sums.held * (base.layers - 1) / base.layers
        read = sums.served if prefix else sums.read
        cached = policy.policy.cached_numbers_per_key(base)
        ranked = ((numbers - cached) * scored + cached * size) / interval
        return read * 2 * base.head_dim * size + held * (ranked + means * size)
