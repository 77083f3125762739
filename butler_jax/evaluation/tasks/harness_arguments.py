"""The arguments of the model `butler`, from `--model_args` of lm-evaluation-harness."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

from butler_jax.evaluation.contenders import prepare_policies
from butler_jax.policies import make_policy
from butler_jax.selection import SelectionConfig, parse_budget

PASSED = ("max_length", "batch_size", "score_dtype", "add_bos_token", "progress", "prompted", "enable_thinking")
"""Arguments that `ButlerLM` takes as they are."""


def read_model_arguments(
    *,
    base: str | None = None,
    run: str | Path | None = None,
    policy: str | None = None,
    budget: str | float | int | None = None,
    sinks: int = 4,
    recent: int = 8,
    allocation: str = "per_head",
    tolerance: float | None = None,
    tail: int = 0,
    dtype: str | None = None,
    data_dir: str | None = None,
    device: str | None = None,
    max_batch_size: int | None = None,
    **others: Any,
) -> dict[str, Any]:
    """Make the arguments of `ButlerLM` from those of `--model_args`.

    Args:
        base: As `load_base` takes it; default: the run's.
        policy: Default: tokenbutler with a run, dense without.
        budget: A fraction (0.25 or 1/4) or a number of tokens (256). Default: 1/4 where the policy chooses.
        sinks: First tokens that are always read.
        recent: Newest tokens that are always read.
        allocation, tolerance, tail: As in SelectionConfig.
        data_dir: Where prepared data sets lie, for a policy that is prepared on text.
        device: Refused; JAX_PLATFORMS names the device.
        max_batch_size: Refused; batch_size is a number.
        others: PASSED, and the policy's own fields.

    Raises:
        ValueError: An argument is refused or invalid.
    """
    if device is not None:
        raise ValueError(f"device={device} is not for the model butler: JAX_PLATFORMS (cpu, cuda, tpu) names it")
    if max_batch_size is not None:
        raise ValueError("max_batch_size is not for the model butler; give batch_size a number")
    if dtype not in (None, "float32", "bfloat16"):
        raise ValueError(f"dtype must be float32 or bfloat16, got {dtype!r}")
    if base is None and run is None:
        raise ValueError(
            "nothing to evaluate: give run=DIR (a run of butler-jax train), or base=SPEC (a directory, a hub id, a "
            ".gguf file, tiny)"
        )
    settings = {name: others.pop(name) for name in PASSED if name in others}
    try:
        chosen = make_policy(policy or ("dense" if run is None else "tokenbutler"), **others)
    except ValueError as error:
        if not others:
            raise
        known = [*(name for name in inspect.signature(read_model_arguments).parameters if name != "others"), *PASSED]
        raise ValueError(f"{error}. The model itself has the arguments {', '.join(known)}") from None
    if chosen.reads_everything and budget is not None:
        raise ValueError(f"budget={budget} needs a policy that chooses, and the policy is {chosen.name}; leave it out")
    share = 1.0 if chosen.reads_everything else parse_budget("1/4" if budget is None else budget)
    limited = dict(allocation=allocation, tolerance=tolerance, tail=tail)
    selection = SelectionConfig(budget=share, sinks=sinks, recent=recent, **limited)
    selection.require_tolerance()
    chosen.require_predictor(run)
    if not chosen.needs_predictor:
        chosen.selection(selection)
    from butler_jax.runs import find_run, load_predictor, load_run_base, run_data

    place = None if run is None else find_run(str(run))
    loaded = load_run_base(place, base, dtype=dtype)
    predictor = load_predictor(place, loaded) if chosen.needs_predictor else None
    if predictor is not None:
        chosen.for_predictor(predictor).selection(selection)
    data = run_data(place)
    (chosen,) = prepare_policies([chosen], loaded, data, data_dir=data_dir)
    return dict(base=loaded, policy=chosen, selection=selection, predictor=predictor, **settings)
